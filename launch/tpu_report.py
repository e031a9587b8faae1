"""What `compile_for_tpu.py` says of a program: the time of its parts at a chip's peaks, speed and price."""

import math
import re
from typing import Any, NamedTuple

import chips
import hlo


class Part(NamedTuple):
    """Something that a program does several times, one after the other."""

    what: str
    times: int
    cost: hlo.Cost  # of one time


def refusal(error: str) -> dict[str, Any]:
    """What the compiler says where memory is too small; `wanted`, in bytes, is None where it does not say."""
    used = re.search(r"Used ([\d.]+)([KMG]) of \S+ hbm", error)
    wanted = float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[used[2]] if used else None
    return {"fits": False, "wanted": wanted, "why": used[0] if used else error.splitlines()[0]}


def of_parts(parts: list[Part], chip: chips.Chip) -> dict[str, Any]:
    """Seconds of the parts at a chip's peaks, and of the whole: in each part the slowest of three things counts."""
    told, total, bounds = [], 0.0, dict[str, float]()
    for what, times, cost in parts:
        seconds = {"compute": cost.flops / chip.flops, "HBM": cost.bytes / chip.bandwidth, "ICI": cost.sent / chip.ici}
        slowest = max(seconds, key=lambda name: seconds[name])
        total += times * seconds[slowest]
        bounds[slowest] = bounds.get(slowest, 0.0) + times * seconds[slowest]
        sizes = {"flops": cost.flops, "hbm_bytes": cost.bytes, "sent_bytes": cost.sent}
        collectives = [c._asdict() for c in cost.collectives]
        told.append({"what": what, "times": times, **sizes, "collectives": collectives, "seconds": seconds})
    bound_by = max(bounds, key=lambda name: bounds[name])
    return {"parts": told, "seconds": total, "bound_by": bound_by}


def dollars_per_million_tokens(told: dict[str, Any], price_per_chip_hour: float) -> float:
    return price_per_chip_hour * told["chips"] * told["seconds"] / 3600 / told["tokens"] * 1e6


def show(told: dict[str, Any], price_per_chip_hour: float | None) -> None:
    gib = lambda n: f"{n / 2**30:.2f} GiB"
    devices = math.prod(told["mesh"].values())
    mesh = ", ".join(f"{axis} {n}" for axis, n in told["mesh"].items())
    print(f"{mesh} ({told['chips']} chips, {devices} devices), bytes a device:")
    for kind, n in told["bytes"].items():
        print(f"  {kind:<28} {gib(n):>12}")
    if not told["fits"]:
        print(f"  DOES NOT FIT: {told['why']}", flush=True)
        return
    print(f"  {'all, of ' + gib(told['memory']):<28} {gib(sum(told['bytes'].values())):>12}   fits")
    for part in told["parts"]:
        _show_part(part, told["seconds"])
    if told["assumed"]:
        print(f"  assumed: {told['assumed']}")
    if told["unknown_loops"]:
        print(f"  {told['unknown_loops']} loops whose length depends on data are counted once")
    speed, whole = told["tokens"] / told["seconds"], "" if len(told["parts"]) == 1 else " for all of it"
    print(f"  at least {told['seconds']:.4g} s{whole}, bound by {told['bound_by']}")
    text = f"  at most {speed:,.0f} tokens/s, {speed / told['chips']:,.0f} a chip"
    if price_per_chip_hour is not None:
        text += f"; at least ${dollars_per_million_tokens(told, price_per_chip_hour):.4f} a million tokens"
    print(f"{text}; compiled in {told['compile_seconds']:.0f} s", flush=True)


def _show_part(part: dict[str, Any], whole_seconds: float) -> None:
    seconds, times = part["seconds"], part["times"]
    slowest = max(seconds.values())
    share = f"{times} times, " if times > 1 else ""
    print(f"  {part['what']}: {share}{100 * times * slowest / whole_seconds:.1f} % of the time; on a device")
    print(f"    {'FLOPs':<26} {part['flops'] / 1e12:>12,.3f} T")
    print(f"    {'HBM traffic':<26} {part['hbm_bytes'] / 1e9:>12,.3f} GB")
    for c in part["collectives"]:
        many = f"{c['count']:,.0f} x {c['kind']} over {c['devices']}"
        print(f"    {many:<26} {c['sent'] / 1e9:>12,.6f} GB sent")
    peaks = ", ".join(f"{name} {s:.4g} s" for name, s in seconds.items())
    print(f"    at the chip's peaks: {peaks}: at least {slowest:.4g} s")
