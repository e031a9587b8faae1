"""Measures every hot path beside its alternatives and beside what the device can do, on whatever device jax finds.

    python launch/benchmark.py decode                                  on a CPU, a small model
    python launch/benchmark.py decode --model=qwen3_4b --batches=4 --contexts=32768 --budgets=1024
    python launch/benchmark.py decode --model=qwen3_4b --contexts=32768 --budgets=1024 --topology=v5e:2x2

decode        tokens/s from the buffer after a context was read, full cache and budgets; the share of evictions
prefill       reading prompts in chunks
attention     retention attention, `jax.nn.dot_product_attention` and a T x T bias, forward and backward
mass          retention mass of all layers and heads, beside T x T
evict         exact selection beside `jax.lax.top_k`, with the same survivors, and whole evictions
train         a training step of the gates, with --labels of its tokens to predict, and the share of retention mass
startup       seconds from the start of a process to its first token, cold and with compiled programs on disk
transformers  `transformers.generate` on the CPU, same checkpoint and prompts; needs torch and transformers

Models are shapes with random weights; of a folder, `transformers` takes the weights too. Columns "% of copy" and "% of
matmul" are the least bytes and operations that the task takes, over what a large copy and a large matrix product
reached in the same run: above 100 where a CPU's caches hold the data. Times are medians; calls that compile are not
among them, but in `startup`. With --topology nothing runs: the TPU compiler says what a program takes on one device of
that topology, and "% of roofline" compares with the least.
"""

import os
import pathlib
import sys
from typing import Any

import chips
import jax
from absl import app, flags, logging
from benchmarks import (
    beside_transformers,
    estimate,
    generation,
    operations,
    programs,
    report,
    settings,
    startup,
    training,
)

from retention_jax.runtime import command as command_line

COMMANDS = ("decode", "prefill", "attention", "mass", "evict", "train", "startup", "transformers")


def define_flags(values: flags.FlagValues) -> None:
    """Not at import, so that tests can have flags of their own."""
    text = lambda name, default, what: flags.DEFINE_string(name, default, what, flag_values=values)
    numbers = lambda name, default, what: flags.DEFINE_list(name, default, what, flag_values=values)
    number = lambda name, default, what: flags.DEFINE_integer(name, default, what, flag_values=values, lower_bound=1)
    text("model", "small", "Shape: small, a name in launch/model_shapes.py, or a folder of a Hugging Face checkpoint.")
    text("dtype", None, "Of weights and cache: bfloat16 or float32. Default: float32 for small, else bfloat16.")
    number("layers", None, "In place of the shape's layers.")
    number("width", None, "In place of its width; the MLP of a small model is three times as wide.")
    number("heads", None, "In place of its query heads.")
    number("kv_heads", None, "In place of its key/value heads.")
    number("head_size", None, "In place of its head size.")
    number("vocab", None, "In place of its vocabulary.")
    number("gate_width", 512, "Width of the gates.")
    numbers("batches", "1", "Sequences at a time.")
    numbers("contexts", "1024,4096,16384", "Tokens of a prompt or a row.")
    numbers("budgets", "64,256", "Kept entries per layer and head.")
    number("recent", 128, "Tokens between two evictions.")
    number("chunk", 1024, "Prompt tokens read at a time.")
    number("new_tokens", 256, "Tokens decoded in each timing.")
    number("repeats", 3, "Timings, of which the median counts.")
    share = "train: share of a row's tokens that are to be predicted."
    flags.DEFINE_float("labels", 1.0, share, 0.0, 1.0, flag_values=values)
    flags.DEFINE_boolean("remat", True, "train: recompute layers in the backward pass.", flag_values=values)
    text("topology", "", "TPU topology to compile for, such as v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1.")
    text("output", "", "JSON file to write.")
    text("plot", "", "PNG file to write, tokens/s against context.")


def make_settings(values: flags.FlagValues) -> settings.Settings:
    """The settings of the flags.

    Raises:
      ValueError: on an unknown model or lists that are not whole numbers above 0, all listed.
    """
    problems, lists = [], {}
    for name in ("batches", "contexts", "budgets"):
        given = values[name].value or []
        if not given or not all(item.isdecimal() and int(item) for item in given):
            problems.append(f"--{name} must be whole numbers above 0, got {','.join(given)!r}")
        else:
            lists[name] = tuple(map(int, given))
    folder = pathlib.Path(values.model).expanduser()
    if values.model not in settings.SHAPES and not (folder / "config.json").is_file():
        known = ", ".join(settings.SHAPES)
        problems.append(f"--model must be one of {known}, or a folder with a config.json, got {values.model!r}")
    if values.dtype not in (None, "float32", "bfloat16"):
        problems.append(f"--dtype must be float32 or bfloat16, got {values.dtype!r}")
    if values.new_tokens < 2:
        problems.append("--new_tokens must be at least 2: the first comes out of the prompt")
    changes = [f for f in ("layers", "width", "heads", "kv_heads", "head_size", "vocab") if values[f].present]
    if values.model not in settings.SHAPES and changes:
        problems.append(f"a folder's shape stays as it is: leave out --{', --'.join(changes)}")
    if problems:
        raise ValueError("; ".join(problems))
    small = values.model == "small"
    return settings.Settings(
        model=settings.model_config(
            values.model if values.model in settings.SHAPES else str(folder),
            values.dtype or ("float32" if small else "bfloat16"),
            num_layers=values.layers,
            width=values.width,
            num_heads=values.heads,
            num_kv_heads=values.kv_heads,
            head_size=values.head_size,
            vocab_size=values.vocab,
            mlp_width=3 * values.width if small and values.width else None,
        ),
        gate=settings.random_gate(values.gate_width),
        recent=values.recent,
        chunk=values.chunk,
        new_tokens=values.new_tokens,
        repeats=values.repeats,
        labels=values.labels,
        remat=values.remat,
        checkpoint="" if values.model in settings.SHAPES else str(folder),
        **lists,
    )


def measured(command: str, given: settings.Settings, ceilings: Any) -> Any:
    """Rows of one command on this device."""
    match command:
        case "decode":
            return generation.decode(given, ceilings)
        case "prefill":
            return generation.prefill(given, ceilings)
        case "attention":
            return programs.measure(operations.attention_cases(given), ceilings, given.repeats)
        case "mass":
            return programs.measure(operations.mass_cases(given), ceilings, given.repeats)
        case "evict":
            return operations.evict(given, ceilings)
        case "train":
            return training.steps(given, ceilings)
        case "startup":
            return startup.first_token(given)
    return beside_transformers.compare(given, ceilings)


def estimated(command: str, given: settings.Settings, topology: str) -> Any:
    """Rows of one command by the compiler of a TPU that is not there."""
    match command:
        case "decode":
            cases = generation.decode_cases
        case "prefill":
            cases = generation.prefill_cases
        case "attention":
            cases = operations.attention_cases
        case "mass":
            cases = operations.mass_cases
        case "evict":
            cases = operations.evict_cases
        case "train":
            cases = training.train_cases
        case _:
            raise ValueError(f"{command} runs on this machine only: leave --topology out")
    chip = chips.of_topology(topology)
    return estimate.estimate(cases, given, topology, estimate.Peaks(chip.flops, chip.bandwidth, chip.memory))


def main(argv: list[str], values: flags.FlagValues = flags.FLAGS) -> None:
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise app.UsageError(f"say what to measure, one of {', '.join(COMMANDS)}; got {argv[1:]}")
    if not values["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    command, topology = argv[1], values.topology
    if topology:
        # The compiler of the libtpu wheel, with no TPU looked for: libtpu reads these when it is loaded.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ.setdefault("RETENTION_JAX_KERNELS", "tpu")
        jax.config.update("jax_platforms", "cpu")
        # jax cannot read back a program for a device that is not there.
        jax.config.update("jax_enable_compilation_cache", False)
    for name in ("output", "plot"):  # before the work, so that a bad path costs no time
        if (path := values[name].value) and not pathlib.Path(str(path)).expanduser().parent.is_dir():
            raise ValueError(f"--{name} must be a file in a folder that is there, got {path!r}")
    given, content = make_settings(values), dict[str, Any](about=report.about(sys.argv[1:]))
    if topology:
        content["about"]["device"] = f"estimate for one device of {topology}"
        rows = estimated(command, given, topology)
    else:
        ceilings = programs.measure_ceilings(given.model.dtype, given.repeats)
        content["ceilings"] = ceilings._asdict()
        print(f"copy {ceilings.bandwidth / 1e9:.1f} GB/s, matmul {ceilings.flops / 1e12:.3f} TFLOP/s")
        rows = measured(command, given, ceilings)
    device = content["about"]["device"]
    print(f"{command} of {values.model}, {given.model.dtype}, {device}, kernels: {content['about']['kernels']}")
    content[command] = report.table(command, rows, estimated=bool(topology))
    if values.output:
        report.write_json(pathlib.Path(values.output).expanduser(), content)
    if values.plot:
        report.plot(pathlib.Path(values.plot).expanduser(), content[command], f"{command}, {values.model}, {device}")


if __name__ == "__main__":
    command_line.run(main, define_flags)
