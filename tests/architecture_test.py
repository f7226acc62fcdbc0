"""The order of the layers: a file imports only from files above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "personmae_jax"

# From the ground up; of one line, from left to right. A new file gets its place here.
ORDER = """
errors config config_check reid.finetune_config config_json revision storage lock
trees patches
data.workers data.draws data.memory data.regions data.masks data.images
data.synthetic_person data.synthetic_body data.synthetic_scene
data.synthetic_occluders data.synthetic
data.safe_pickle data.listing data.records data.bad_records data.batches data.pipeline
reid.layouts reid.datasets reid.retrieval reid.reranking reid.occlusion
reid.sampling
sharding
models.posembed models.attention models.layers models.encoder models.predictor
models.personmae
losses reid.features reid.distances reid.finetune_losses reid.finetune_model
optim state train_step
metrics progress pictures profiling
data.joined_file data.zip_source data.tar_source data.lmdb_source data.sources
data.keep_list data.prepare_plan data.prepare_checks data.prepare_shard
data.prepare_summary data.prepare_pool data.prepare_check data.prepare_beam
data.prepare
workdir distributed checkpoint_files checkpoint
torch_read torch_layouts torch_recognise torch_weights torch_positions torch_import
torch_vit verification model_names model_card export
experiment
reid.evaluation_inputs reid.evaluation reid.monitor
report train_loop
reid.finetune_step reid.finetune_init reid.finetune_report reid.finetune
chips model_flops hlo_text hlo_costs preflight preflight_text
__init__
""".split()
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


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


def layers_of(path: Path) -> set[str]:
    """Our own files among the imports, as ORDER names them."""
    layers = set()
    for name in imports_of(path):
        first, *rest = name.split(".")
        if first == "personmae_jax":
            found = [".".join(rest[:n]) for n in (2, 1) if ".".join(rest[:n]) in ORDER]
            layers.add(found[0] if found else "__init__")
    return layers


def libraries_of(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_only_from_files_above_it(path):
    module = module_of(path)
    if module.endswith(".__init__"):
        assert not imports_of(path)
        return
    assert module in ORDER, f"give {module} its place in ORDER"
    below = {
        name for name in layers_of(path) if ORDER.index(name) >= ORDER.index(module)
    }
    assert not below, f"{module} must not import {below}"


def test_the_order_names_only_files_that_exist():
    assert not set(ORDER) - set(map(module_of, FILES))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_exceeds_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_nothing_imports_tensorflow_and_only_the_files_named_so_import_torch():
    for path in FILES:
        allowed = {"torch"} if module_of(path).startswith("torch_") else set()
        assert libraries_of(path) & {"torch", "tensorflow"} <= allowed, path


def test_only_torch_vit_imports_torch_as_it_loads():
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
        assert not loads_torch or module_of(path) == "torch_vit", path


def test_flax_lives_behind_one_door():
    for path in FILES:
        module = module_of(path)
        if not module.startswith("models."):
            assert "flax" not in libraries_of(path), path
            inner = {x for x in layers_of(path) if x.startswith("models.")}
            assert inner <= {"models.personmae"}, path


def test_settings_and_data_do_without_jax():
    """Wrong settings are said, and workers start, before any device is asked for."""
    jax_free = ORDER[: ORDER.index("trees")]
    for path in FILES:
        if module_of(path) in jax_free or module_of(path).startswith("data."):
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
