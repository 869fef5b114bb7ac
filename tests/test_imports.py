"""Imports point one way, between rooms and between files; importing changes and prints nothing."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"utils", "files", "download"}
ALLOWED = {
    "utils": set(),
    "files": {"utils"},
    "download": {"utils", "files"},
    "models": BASE | {"models"},
    "data": BASE | {"data"},
    "metrics": BASE | {"metrics"},
    "miniature": BASE | {"miniature", "data"},
    "launch": BASE | {"launch"},
    "inference": BASE | {"inference", "models", "data"},
    "report": BASE | {"report", "metrics", "data"},
    "training": BASE | {"training", "models", "data", "metrics", "launch", "report"},
    "bootstrap": BASE | {"bootstrap", "models", "data", "launch", "inference", "report"},
    "released": BASE | {"released", "models", "data", "metrics", "launch", "training", "inference"},
    "transform": {"released"},
}
DOORS = {  # modules of the released package that look names up in released/, or consist of them
    "utils.py", "data/__init__.py", "data/utils.py", "models/blip.py", "models/blip_nlvr.py", "models/blip_pretrain.py",
    "models/blip_retrieval.py", "models/blip_vqa.py", "models/med.py", "models/nlvr_encoder.py", "models/vit.py",
    "data/coco_karpathy_dataset.py", "data/flickr30k_dataset.py", "data/nlvr_dataset.py", "data/nocaps_dataset.py",
    "data/pretrain_dataset.py", "data/video_dataset.py", "data/vqa_dataset.py",
}  # fmt: skip
ROOMS = set(ALLOWED) | {"demo", "benchmarks"}
OURS = ROOMS | {path.stem for path in ROOT.glob("*.py")} | {"tests"}


def files(room):
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))


def imported(path):
    """Yield the dotted names of modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def all_files():
    """Return the project's Python files; environments, whose names begin with a dot, are not searched."""
    tops = [top for top in ROOT.iterdir() if not top.name.startswith(".") and top.name != "output"]
    return [path for top in tops for path in ([top] if top.suffix == ".py" else top.rglob("*.py"))]


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    for path in files(room):
        allowed = ALLOWED[room] | ({"released"} if str(path.relative_to(ROOT)) in DOORS else set())
        wrong = {name.split(".")[0] for name in imported(path)} & OURS - allowed
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def imported_files(path, by_module):
    """Yield our files that a file imports; of a package's attribute, the package's `__init__`."""
    for name in imported(path):
        if name in by_module and by_module[name] != path:
            yield by_module[name]


def test_no_files_import_each_other_in_a_circle():
    """Over all rooms, imports inside functions included."""
    paths = all_files()
    by_module = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    graph = {path: set(imported_files(path, by_module)) for path in paths}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(str(path.relative_to(ROOT)) for path in error.args[1]))


@pytest.fixture(scope="module")
def imported_all():
    """What a process prints that imports inference, tells which modules of training that took, and imports the rest."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for room in ALLOWED for p in files(room)]
    optional = ("av", "tensorboard", "gradio", "matplotlib", "peft")
    code = f"import sys; [sys.modules.__setitem__(name, None) for name in {optional}]\n"
    code += "import inference.predictor, inference.search, inference.explain, inference.ranking\n"
    code += "print([name for name in sys.modules if name.split('.')[0] == 'training'])\n"
    code += "".join(f"import {module.removesuffix('.__init__')}\n" for module in modules)
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_inference_imports_nothing_of_training(imported_all):
    """Nor does anything that it imports."""
    assert imported_all.stdout.startswith("[]\n"), imported_all.stdout + imported_all.stderr


def test_importing_prints_nothing_and_needs_no_optional_package(imported_all):
    assert (imported_all.returncode, imported_all.stdout.partition("\n")[2], imported_all.stderr) == (0, "", "")


def test_files_and_functions_are_short():
    for path in [p for p in all_files() if "tests" not in p.parts]:
        source = path.read_text()
        assert source.count("\n") <= 400, f"{path.relative_to(ROOT)} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is over 60 lines"
