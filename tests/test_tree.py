"""What keeps the tree readable: short files, imports downwards, configs that build, a README that names real files."""

import ast
import graphlib
import importlib.util
import pathlib
import re
import unittest.mock

import jax
import pytest
from flax import nnx

from retention_jax import config as config_lib
from retention_jax.config import conversion
from retention_jax.models.decoder import Decoder

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(p for folder in ("retention_jax", "configs", "launch", "tests") for p in (ROOT / folder).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
# Lower floors first: a module imports only from its own room or from rooms on lower floors.
FLOORS = (
    ("runtime",),
    ("parallel", "text"),
    ("kernels",),
    ("policies",),
    ("config",),
    ("cache", "vision"),
    ("models",),
    ("data", "generation", "training"),
    ("corpus",),
    ("tasks",),
    ("evaluation", "serving"),
    ("dilution", "report"),
    ("evaluate", "generate", "serve", "train"),
)


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_files_are_short_enough_to_read():
    assert {p.name: n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400} == {}


def imports(path: pathlib.Path) -> set[str]:
    """Modules of the package that a file imports, as `room.module` or `room`; relative imports are resolved."""
    package = ["retention_jax", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            of_module = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("retention_jax.") in MODULES else base for name in of_module.values()}
    return {name.removeprefix("retention_jax.") for name in found} & MODULES.keys()


PACKAGE = ROOT / "retention_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
GRAPH = {name: imports(path) - {name} for name, path in MODULES.items()}


def test_imports_point_downwards():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    room = lambda name: name.split(".")[0]
    upwards = [
        f"{name} imports {used}"
        for name, all_used in GRAPH.items()
        for used in all_used
        if room(used) != room(name) and floor[room(used)] >= floor[room(name)]
    ]
    assert upwards == []


def test_no_module_imports_a_command():
    """A command holds flags and one call; what others need of it is in a room."""
    commands = {name for name, path in MODULES.items() if 'if __name__ == "__main__":' in path.read_text()}
    assert {"train", "evaluate", "generate", "dilution.__main__", "report.trace"} <= commands
    assert [f"{name} imports {used}" for name, used in GRAPH.items() if used & commands] == []


def test_no_module_imports_itself_by_way_of_others():
    """Within a room too. A room's own `__init__` may gather what its modules define, and they do not import it."""
    order = graphlib.TopologicalSorter(GRAPH)
    order.prepare()  # raises CycleError, naming the circle


def test_the_tree_test_sees_relative_imports():
    """Else a cycle could hide behind a dot."""
    path = PACKAGE / "cache" / "made_up.py"
    text = "from . import buffer\nfrom ..config import run"
    with unittest.mock.patch.object(pathlib.Path, "read_text", lambda _: text):
        assert imports(path) == {"cache.buffer", "config.run"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configs_build_and_say_what_they_are_for(path):
    module = load(path)
    for model in getattr(module, "MODELS", ()):  # --config=FILE:MODEL
        conversion.from_config_dict(config_lib.TrainConfig, module.get_config(model))
    config = conversion.from_config_dict(config_lib.TrainConfig, module.get_config())
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
