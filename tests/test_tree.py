"""What keeps the tree readable: short files, imports downwards, configs that build, a README that names real files."""

import ast
import importlib.util
import pathlib
import re

import jax
import pytest
from flax import nnx

from retention_jax import config as config_lib
from retention_jax import config_io
from retention_jax.models.decoder import Decoder

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("retention_jax", "configs", "launch", "tests") for p in (ROOT / folder).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Lower layers first: a module imports only from its own layer or from those before it.
LAYERS = (
    (
        "model_config",
        "eval_config",
        "config",
        "config_io",
        "files",
        "program_cache",
        "sharding",
        "checksum",
        "distributed",
        "tokenizer",
        "templates",
        "worker_process",
        "chat",
    ),
    ("kernels", "policies", "sampling"),
    ("selection",),
    ("cache",),
    ("models", "data", "tasks"),
    ("decoding", "losses", "checkpoint"),
    ("scoring",),
    ("metrics", "text_generation", "evaluation", "plots"),
    ("evaluate",),
    ("train", "prompt_files", "dilution", "dilution_plots", "report"),
    ("generate",),
)


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_short_enough_to_read():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400} == {}


def test_imports_point_downwards():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    upwards = []
    for path in (ROOT / "retention_jax").rglob("*.py"):
        own = path.relative_to(ROOT / "retention_jax").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("retention_jax"):
                parts = node.module.split(".") if node.module else []
                used = parts[1:2] or [alias.name for alias in node.names]
                upwards += [f"{path.name} imports {name}" for name in used if level[name] > level[own]]
    assert upwards == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_build_and_say_what_they_are_for(path):
    module = load(path)
    for model in getattr(module, "MODELS", ()):  # --config=FILE:MODEL
        config_io.from_config_dict(config_lib.TrainConfig, module.get_config(model))
    config = config_io.from_config_dict(config_lib.TrainConfig, module.get_config())
    for needed in (f"--config=configs/{path.name}", "Hardware and time:", "Expected"):
        assert needed in (module.__doc__ or "")
    if (model := config.model) is not None:
        shapes = nnx.eval_shape(lambda: Decoder(model, config.gate, rngs=nnx.Rngs(0)))
        assert sum(a.size for a in jax.tree.leaves(shapes)) > 0


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:configs|launch|tests|retention_jax|notebooks)/[\w./]+\.(?:py|png|json)", text)
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_in_the_readme_uses_real_flags():
    """Modules and config fields in the README's commands exist."""
    text = (ROOT / "README.md").read_text()
    for module in re.findall(r"python -m (retention_jax\.\w+)", text):
        assert importlib.util.find_spec(module)
    fields = config_lib.TrainConfig.__dataclass_fields__
    for field in re.findall(r"--config\.(\w+)", text):
        assert field in fields
