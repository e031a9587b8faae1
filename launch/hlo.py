"""What one device does in a compiled program, read from its HLO text: FLOPs, bytes of HBM, collectives.

XLA's own cost analysis counts the body of a loop once and knows no collectives. Here a body counts as often as the
loop's condition says, or as the caller does of a loop whose length depends on data; of a conditional counts the branch
that moves the fewest bytes of HBM, so that a time made of all this is a floor. A fusion reads its operands once and
writes its result once, of an operand that it only slices the slices; what the compiler keeps in on-chip memory is no
traffic; a Pallas kernel costs what its `pl.CostEstimate` says. All of it is an estimate.
"""

import collections
import math
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id", "replica-id"}
SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_PASSES = 6  # a float32 product at highest precision is as many bfloat16 ones


class Instruction(NamedTuple):
    name: str
    result: str  # shapes with layouts
    opcode: str
    inputs: str  # what stands in the brackets: operands, or a constant's value
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.inputs)

    def called(self, role: str) -> str | None:
        """The computation that this instruction runs in a role, such as a loop's body."""
        match = re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)
        return match and match[1]


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """One kind of collective and the group it runs in, over a whole run of the program."""

    kind: str
    devices: int  # in a group
    count: float
    sent: float  # bytes that a device sends over its links


class Cost(NamedTuple):
    """Of one device."""

    flops: float  # of matrix products, as bfloat16 ones
    bytes: float  # to and from HBM
    collectives: list[Collective]
    unknown_loops: int  # whose length is known only when they run, and which nobody told; counted once

    @property
    def sent(self) -> float:
        """Bytes that the device sends over its links."""
        return sum(c.sent for c in self.collectives)


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A program, and its HLO as the compiler left it; jaxlib cannot read what some TPU compilers return."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = lowered.compile(compiler_options=options)
        texts = [path.read_text() for path in pathlib.Path(folder).glob("*after_optimizations.txt")]
    return program, max(texts, key=len)


def cost(text: str, trips: Mapping[str, int] | None = None) -> Cost:
    """The cost of a program, from its HLO text.

    `trips`: how often loops run whose length depends on data, by the `jax.named_scope` that they stand in.
    """
    computations, entry = parse(text)
    counter = _Counter(computations, trips or {})
    counter.run(entry, 1, entry, fused=False)
    return counter.total()


def combined(*terms: tuple[float, Cost]) -> Cost:
    """The sum of costs of one program, each so many times."""
    sums: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for times, term in terms:
        for c in term.collectives:
            sums[c.kind, c.devices][0] += times * c.count
            sums[c.kind, c.devices][1] += times * c.sent
    found = [Collective(*key, *counted) for key, counted in sorted(sums.items()) if counted[0]]
    total = lambda field: sum(times * getattr(term, field) for times, term in terms)
    return Cost(total("flops"), total("bytes"), found, max(term.unknown_loops for _, term in terms))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Instructions of every computation by name, in order, and the name of the first computation that runs."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (match := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            current[match[1]] = _instruction(match[1], match[2])
    return computations, entry


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    result, rest = text[:end], text[end:].strip()
    opcode = rest.partition("(")[0]
    end = _closing(rest, len(opcode))
    return Instruction(name, result, opcode, rest[len(opcode) + 1 : end - 1], rest[end:])


def _closing(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _elements(shape: str) -> list[str]:
    """The parts of a tuple's shape."""
    parts, depth = [""], 0
    for c in shape[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        parts = [*parts, ""] if c == "," and not depth else [*parts[:-1], parts[-1] + c]
    return parts


def dims(shape: str) -> list[int]:
    """The axes of the first array in a result."""
    match = _ARRAY.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def nbytes(shape: str, *, on_chip: bool = False) -> float:
    """Bytes of all arrays in a result; 0 for those in on-chip memory unless they count too."""
    arrays = (m for m in _ARRAY.finditer(shape) if on_chip or "S(" not in (m[3] or ""))
    return sum(SIZES.get(m[1], 0) * math.prod(int(n) for n in m[2].split(",") if n) for m in arrays)


class _Counter:
    def __init__(self, computations: dict[str, Computation], trips: Mapping[str, int]):
        self.computations, self.trips = computations, trips
        self.flops = self.bytes = 0.0
        self.unknown: set[str] = set()
        # By what makes two of them one, then by computation: an asynchronous collective stands in several computations
        # of a loop's body. Channels alone do not tell: all that come from a `shard_map` have the same one.
        self.collectives: dict[tuple[str, ...], dict[str, list[Collective]]] = {}

    def total(self) -> Cost:
        sums: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
        for places in self.collectives.values():
            for kind, devices, times, sent in max(places.values(), key=len):
                sums[kind, devices][0] += times
                sums[kind, devices][1] += times * sent
        found = [Collective(*key, *counted) for key, counted in sorted(sums.items()) if counted[0]]
        return Cost(self.flops, self.bytes, found, len(self.unknown))

    def run(self, name: str, times: float, loop: str, *, fused: bool) -> None:
        """Adds a computation that runs so many times, in a loop; in a fusion nothing but its ends is in HBM."""
        within = self.computations[name]
        for i in within.values():
            kind = i.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                if name.startswith("all-reduce-scatter"):  # fused with the slice that each device keeps
                    kind = "reduce-scatter"
                devices, sent = group_and_sent(kind, i)
                noted = (re.search(what, i.attributes) for what in (r"channel_id=(\d+)", r'op_name="([^"]*)"'))
                channel, source = (match[1] if match else "" for match in noted)
                places = self.collectives.setdefault((loop, kind, channel or i.name, source), {})
                places.setdefault(name, []).append(Collective(kind, devices, times, sent))
            elif i.opcode == "convolution":
                self.flops += times * _convolution(i, within)
            elif i.opcode == "dot":
                self.flops += times * _dot(i, within)
            self.flops += times * (_estimated(i, "flops") or 0)
            if body := i.called("body"):
                trips = self._trips(i)
                self.unknown |= {body} if trips is None else set()
                self.run(body, times * (1 if trips is None else trips), body, fused=fused)
            elif i.opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", i.attributes.partition("}")[0])
                self._add_cheapest(branches, times, loop, fused=fused)
            elif i.opcode == "call":
                self.run(str(i.called("to_apply")), times, loop, fused=fused)
            elif i.opcode == "async-start" and (inner := i.called("calls")):
                self.run(inner, times, loop, fused=fused)
            else:
                if inner := i.called("calls"):
                    self.run(inner, times, loop, fused=True)
                if not fused:
                    self.bytes += times * self._traffic(i, within)

    def _add_cheapest(self, branches: list[str], times: float, loop: str, *, fused: bool) -> None:
        """Adds the branch of a conditional that moves the fewest bytes of HBM."""
        counted = [_Counter(self.computations, self.trips) for _ in branches]
        for counter, branch in zip(counted, branches, strict=True):
            counter.run(branch, times, loop, fused=fused)
        least = min(counted, key=lambda counter: (counter.bytes, counter.flops))
        self.flops += least.flops
        self.bytes += least.bytes
        self.unknown |= least.unknown
        self.collectives |= least.collectives

    def _trips(self, loop: Instruction) -> int | None:
        """How often a loop runs: as the compiler noted, as a condition says that compares a counter with a constant,
        or as the caller says of its scope; None where nobody knows."""
        if noted := re.search(r'"known_trip_count":{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition = self.computations[str(loop.called("condition"))]
        *_, root = condition.values()
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            bound = condition[root.operands[1]]
            if bound.opcode == "constant":
                return int(bound.inputs)
        scope = re.search(r'op_name="[^"]*?([^/"]+)/while"', loop.attributes)
        return self.trips.get(scope[1]) if scope else None

    def _traffic(self, i: Instruction, within: Computation) -> float:
        """Bytes of HBM that an instruction reads and writes."""
        if i.opcode in FREE or i.opcode.endswith("-done"):
            return 0
        if estimated := _estimated(i, "bytes_accessed"):
            return estimated
        read = [nbytes(within[name].result) if name in within else 0 for name in i.operands]
        written = nbytes(i.result)
        if i.opcode == "copy-start":  # hands on (result, operand, context)
            return read[0] + nbytes(_elements(i.result)[0])
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return (nbytes(i.result, on_chip=True) if read[0] else 0) + written
        if i.opcode == "dynamic-update-slice":
            return read[1] + (nbytes(within[i.operands[1]].result, on_chip=True) if written else 0)
        if i.opcode == "fusion":
            inner = self.computations[str(i.called("calls"))]
            for parameter in (p for p in inner.values() if p.opcode == "parameter"):
                sliced = _read_in_slices(parameter, inner, self.computations)
                if sliced is not None and read[int(parameter.inputs)]:
                    read[int(parameter.inputs)] = sliced
            *_, root = inner.values()
            if root.opcode == "dynamic-update-slice":
                written = min(written, 2 * nbytes(inner[root.operands[1]].result, on_chip=True))
        return sum(read) + written


def _estimated(i: Instruction, what: str) -> float | None:
    """What the `pl.CostEstimate` of a Pallas kernel says."""
    estimate = re.search(r'"cost_estimate":{([^}]*)}', i.attributes)
    value = estimate and re.search(rf'"{what}":"(\d+)"', estimate[1])
    return float(value[1]) if value else None


def _read_in_slices(parameter: Instruction, within: Computation, computations: dict[str, Computation]) -> float | None:
    """Bytes that a fusion reads of a parameter of which it only takes or replaces slices; None if it reads it whole."""
    total = 0.0
    for user in (i for i in within.values() if parameter.name in i.operands):
        if user.opcode == "bitcast":
            inner = _read_in_slices(user, within, computations)
            if inner is None:
                return None
            total += inner
        elif user.opcode == "fusion":
            called = computations[str(user.called("calls"))]
            for place in (n for n, name in enumerate(user.operands) if name == parameter.name):
                passed = next(p for p in called.values() if p.opcode == "parameter" and int(p.inputs) == place)
                inner = _read_in_slices(passed, called, computations)
                if inner is None:
                    return None
                total += inner
        elif user.opcode in ("dynamic-slice", "slice"):
            total += nbytes(user.result, on_chip=True)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name):
            return None
    return total


def group_and_sent(kind: str, i: Instruction) -> tuple[int, float]:
    """Devices in a collective's group, and the bytes that each of them sends, on a ring."""
    n = _group(i.attributes)
    # What starts an all-gather or a permutation hands on (operands, results, ...), each an array or a tuple of them.
    handed_on = i.opcode in ("all-gather-start", "collective-permute-start")
    whole = nbytes(_elements(i.result)[1] if handed_on else i.result, on_chip=True)
    if i.opcode == "all-reduce" and kind == "reduce-scatter":
        return n, whole * (n - 1) / n
    sent = {"all-reduce": 2 * whole * (n - 1) / n, "reduce-scatter": whole * (n - 1), "collective-permute": whole}
    return n, sent.get(kind, whole * (n - 1) / n)


def _group(attributes: str) -> int:
    """Devices in a group of `replica_groups`, in any of the ways it is written."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?{([^}]*)}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups={{([\d,]*)}", attributes):
        return len(match[1].split(","))
    return 2  # a permutation, from one to another


def _passes(i: Instruction) -> int:
    return _PASSES if "operand_precision={highest" in i.attributes else 1


def _dot(i: Instruction, within: Computation) -> float:
    left = dims(within[i.operands[0]].result)
    match = re.search(r"lhs_contracting_dims={([\d,]*)}", i.attributes)
    contracted = math.prod(left[int(d)] for d in match[1].split(",") if d) if match else 1
    return 2 * math.prod(dims(i.result)) * contracted * _passes(i)


def _convolution(i: Instruction, within: Computation) -> float:
    """A matrix product, to a TPU's compiler, whose other axes may be spatial ones."""
    left, right = (dims(within[name].result) for name in i.operands[:2])
    match = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert match
    lhs, rhs, out = match.groups()
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window={([^}]*)}", i.attributes) or [""])[0]))
    pairs = 1
    for axis in (c for c in out if c.isdigit()):
        at = int(axis)
        of = lambda field, default, at=at: window.get(field, "x".join([default] * 9)).split("x")[at]
        stride, dilation, base = (int(of(f, "1")) for f in ("stride", "rhs_dilate", "lhs_dilate"))
        low = int(of("pad", "0_0").split("_")[0])
        results, taps = np.arange(dims(i.result)[out.index(axis)]), np.arange(right[rhs.index(axis)])
        place = results[:, None] * stride + taps[None] * dilation - low
        size = (left[lhs.index(axis)] - 1) * base + 1
        pairs *= int(((place >= 0) & (place < size) & (place % base == 0)).sum())
    batch = dims(i.result)[out.index("b")]
    return 2 * batch * right[rhs.index("o")] * right[rhs.index("i")] * pairs * _passes(i)
