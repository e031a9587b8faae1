"""`generate` on a mesh of devices, and its flags for the cache."""

# ruff: noqa: F811  # fixtures of the other file are arguments here
import dataclasses
import runpy

import jax
import pytest
from absl import flags
from test_generate_command import CACHE, ROWS, command, folder, results_of, shown, write_lines, writer  # noqa: F401

import retention_jax as rj
from retention_jax.generation import cache_flags, conversation
from retention_jax.policies.table import POLICIES

pytestmark = pytest.mark.slow  # starts the command on meshes of 8 devices


@pytest.mark.parametrize("mesh", ["tensor:8", "tensor:-1,data:1", "context:2,tensor:4"])
def test_a_mesh_writes_the_same_text(folder, writer, capsys, mesh):
    assert jax.device_count() == 8
    tokens = conversation.prompt_tokens(writer, "two plus two?")
    command(folder, "--prompt=two plus two?", f"--mesh={mesh}", "--budget=8")
    out = rj.generate(
        writer.model, [tokens], rj.CacheConfig(budget=8, recent=4), max_new_tokens=6,
        stop_tokens=writer.tokenizer.stop_tokens,
    )  # fmt: skip
    assert capsys.readouterr().out == shown(writer, out.tokens[0]) + "\n"


def test_rows_of_a_mesh_share_a_file(folder, tmp_path, capsys):
    """Three prompts on two rows of devices: one is read twice, and written once."""
    write_lines(tmp_path / "in", ROWS[:3])
    for name, more in (("one", []), ("many", ["--mesh=data:2,tensor:4"])):
        command(folder, f"--prompts={tmp_path / 'in'}", f"--output={tmp_path / name}", "--batch_size=4", *more)
    one, many = results_of(tmp_path / "one"), results_of(tmp_path / "many")
    assert len(many) == 3 and one == many
    told = [line.partition(" tokens/s")[0].rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert told[0] == told[1] and f"{sum(row['new_tokens'] for row in one)} new tokens" in told[0]


def test_every_option_of_the_cache_is_a_flag():
    module = runpy.run_module("retention_jax.generate", run_name="command")
    values = flags.FlagValues()
    module["define_flags"](values)
    for field in dataclasses.fields(rj.CacheConfig):
        default = None if field.default is dataclasses.MISSING else field.default
        assert values[field.name].default == default, field.name
        assert values[field.name].help and field.name in cache_flags.HELP
    assert all(name in values["policy"].help for name in POLICIES)
