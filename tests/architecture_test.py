"""The layers: a folder imports only from what stands below it in LAYERS."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "personmae_jax"

# From the ground up: files of the package's root, then its folders.
LAYERS = """
errors foreign_files config_values config_run config config_check config_finetune
config_unsupervised config_json sharding pixels optim
synthetic data models engine prepare pytorch reid
pretrain finetune unsupervised preflight
__init__
""".split()
# What two of them need goes down: to engine/ if it is about running, to reid/ if it is
# about people, to models/ or pixels.py if it is about tensors.
TRAININGS = "pretrain finetune unsupervised".split()
JAX_FREE_FILES = """
errors foreign_files config_values config_run config config_check config_finetune
config_unsupervised config_json
""".split()
JAX_FREE_FOLDERS = "data synthetic prepare".split()
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """`data.masks` of personmae_jax/data/masks.py."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path) for path in FILES}


def layer_of(module: str) -> str:
    """The folder of a module, or the module itself if it lies at the root."""
    return module.split(".")[0]


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules_of(path: Path) -> set[str]:
    """Our own modules among the imports."""
    modules = set()
    for name in imports_of(path):
        first, *rest = name.split(".")
        if first == "personmae_jax":
            names = (".".join(rest[:n]) for n in (2, 1))
            modules.add(next((n for n in names if n in MODULES), "__init__"))
    return modules


def libraries_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_its_own_folder_and_from_layers_below(path):
    module = module_of(path)
    if module.endswith(".__init__"):
        assert not imports_of(path)
        return
    layer = layer_of(module)
    assert layer in LAYERS, f"give {layer} its place in LAYERS"
    below = LAYERS[: LAYERS.index(layer)]
    others = {name for name in modules_of(path) if layer_of(name) != layer}
    above = {name for name in others if layer_of(name) not in below}
    assert not above, f"{module} must not import {above}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_trainings_import_nothing_of_each_other(path):
    layer = layer_of(module_of(path))
    if layer in TRAININGS:
        others = {layer_of(name) for name in modules_of(path)} & {*TRAININGS}
        assert others <= {layer}


def test_there_is_one_host_loop():
    guard = 'transfer_guard("disallow")'
    loops = [p for p in FILES if guard in p.read_text(encoding="utf-8")]
    assert [module_of(path) for path in loops] == ["engine.loop"]


def test_signal_handlers_are_installed_in_one_place():
    places = [*FILES, *(ROOT / "launch").glob("*.py")]
    found = [p.stem for p in places if "signal.signal(" in p.read_text("utf-8")]
    assert sorted(found) == ["signals", "workers"]  # workers only ignore them


def test_imports_inside_a_folder_have_no_cycle():
    graph = {
        module_of(path): {
            name
            for name in modules_of(path)
            if layer_of(name) == layer_of(module_of(path))
        }
        for path in FILES
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_the_layers_are_those_that_exist():
    assert set(LAYERS) == {layer_of(module) for module in MODULES}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_exceeds_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_the_root_and_every_folder_can_be_taken_in_at_a_glance():
    assert len(list(PACKAGE.glob("*.py"))) <= 13
    for folder in PACKAGE.iterdir():
        assert len(list(folder.glob("*.py"))) <= 20, folder


def test_nothing_imports_tensorflow_and_only_pytorch_imports_torch():
    for path in FILES:
        allowed = {"torch"} if layer_of(module_of(path)) == "pytorch" else set()
        assert libraries_of(path) & {"torch", "tensorflow"} <= allowed, path


def test_only_the_vit_of_pytorch_imports_torch_as_it_loads():
    """Torch takes seconds to import, and most users of the package have none."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outside = ast.unparse(
            [
                node
                for node in tree.body
                if isinstance(node, ast.Import | ast.ImportFrom)
            ]
        )
        loads_torch = re.search(r"^(import|from) torch\b", outside, re.MULTILINE)
        assert not loads_torch or module_of(path) == "pytorch.vit", path


def test_flax_lives_behind_one_door():
    for path in FILES:
        module = module_of(path)
        if not module.startswith("models."):
            assert "flax" not in libraries_of(path), path
            inner = {x for x in modules_of(path) if x.startswith("models.")}
            assert inner <= {"models.personmae", "models.batch_norm"}, path


def test_settings_and_data_do_without_jax():
    """Wrong settings are said, and workers start, before any device is asked for."""
    for path in FILES:
        module = module_of(path)
        if module in JAX_FREE_FILES or layer_of(module) in JAX_FREE_FOLDERS:
            assert not libraries_of(path) & {"jax", "flax", "optax", "orbax"}, path


def test_only_sharding_names_an_axis():
    for path in FILES:
        if module_of(path) != "sharding":
            assert not {n for n in imports_of(path) if n.endswith("PartitionSpec")}, (
                path
            )


@pytest.mark.parametrize("folder", ["launch", "configs"])
def test_nothing_in_the_package_imports_what_stands_on_it(folder):
    for path in FILES:
        assert folder not in libraries_of(path), path
