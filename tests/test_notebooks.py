"""The notebooks: they run from top to bottom, install what is missing, and are stored without what a run leaves."""

import importlib.util
import itertools
import json
import pathlib
import re
import runpy
import subprocess
import sys

import helpers
import pytest
import text_helpers
from absl import flags

import retention_jax as rj
from retention_jax import evaluate
from retention_jax.config import TrainConfig
from retention_jax.dilution import __main__ as dilution
from retention_jax.report import __main__ as report

pytestmark = pytest.mark.slow  # each notebook trains or generates from top to bottom

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ["a_real_model", "dilution", "quickstart", "what_is_kept", "your_checkpoint"]
# What a reader could change as well, so that a run takes seconds: fields of a notebook and their values.
SMALL = {
    "a_real_model": {"MODEL": '"model"', "GATES": '"gates"', "BOOK": '"book.txt"', "TOKENS": "96", "BUDGET": "8"},
    "dilution": {"LENGTHS": "(96,)"},
    "quickstart": {"STEPS": "2", "BUDGETS": "(16,)", "LENGTH": "96"},
    "what_is_kept": {},
    "your_checkpoint": {"BUDGET": "8", "LENGTH": "96"},
}


def cells(name, kind):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def with_fields(code, **fields):
    for name, value in fields.items():
        code, count = re.subn(rf"(?m)^{name} = [^#\n]*?(?=  #|$)", f"{name} = {value}", code)
        assert count == 1, f"{name} is set {count} times"
    return code


def test_there_are_no_others():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_if_never_run(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    assert notebook["cells"][0]["cell_type"] == "markdown"
    for before, cell in itertools.pairwise(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert set(cell) == {"cell_type", "execution_count", "id", "metadata", "outputs", "source"}
            assert cell["outputs"] == [] and cell["execution_count"] is None
            assert before["cell_type"] == "markdown", f"{cell['id']}: no words before it"


def test_first_code_installs_what_is_missing(monkeypatch):
    first = {cells(name, "code")[0] for name in NAMES}
    assert len(first) == 1
    code, commands = first.pop(), []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append((command, check)))
    exec(code, {})
    assert commands == []  # it is here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="fill in REPOSITORY"):
        exec(code, {})
    exec(with_fields(code, REPOSITORY='"https://host/a/b"', EXTRA='"[tpu]"'), {})
    wanted = "retention_jax[tpu] @ git+https://host/a/b"
    assert commands == [([sys.executable, "-m", "pip", "install", "--quiet", wanted], True)]


@pytest.mark.parametrize("name", NAMES)
def test_commands_exist(name):
    defined = {
        "retention_jax.report": report.define_flags,
        "retention_jax.evaluate": evaluate.define_flags,
        "retention_jax.dilution": dilution.define_flags,
        # An import would put the module in place of the function `rj.generate`.
        "retention_jax.generate": runpy.run_module("retention_jax.generate")["define_flags"],
    }
    for module, rest in re.findall(r"`python -m ([\w.]+)([^`]*)`", "\n".join(cells(name, "markdown"))):
        known = flags.FlagValues()
        defined[module](known)
        for flag, field in re.findall(r"--(\w+)(?:\.(\w+))?", rest):
            assert flag in known and (not field or field in TrainConfig.__dataclass_fields__)
        assert all((ROOT / config).is_file() for config in re.findall(r"--config=(\S+)", rest))


def _save_small_model(folder):
    """A model of random weights, its gates and a book, in place of those that a reader has from the hub."""
    model = helpers.tiny_model(vocab_size=320)
    (folder / "model").mkdir()
    rj.save_backbone(model, folder / "model")
    rj.save_gates(model, folder / "gates")
    text_helpers.save_tokenizer(folder / "model")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")


@pytest.mark.one_version
@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    if name == "a_real_model":
        _save_small_model(tmp_path)
    script = tmp_path / "notebook.py"
    script.write_text(with_fields("\n\n".join(cells(name, "code")), **SMALL[name]), encoding="utf-8")
    env = helpers.environment(MPLBACKEND="Agg")
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"  # so that `your_checkpoint` has a mesh to use
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "jax" in done.stdout
