"""Imports point one way: utils <- models, data, metrics <- engine <- scripts; importing changes and prints nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "utils": set(),
    "files": {"utils"},
    "download": {"utils", "files"},
    "models": {"models", "utils", "download"},
    "data": {"data", "utils", "files", "download"},
    "metrics": {"metrics", "utils"},
    "engine": {"engine", "models", "data", "metrics", "utils", "files", "download"},
}
OURS = set(ALLOWED) | {path.stem for path in ROOT.glob("*.py")} | {"demo", "benchmarks", "tests"}


DOOR = ROOT / "models" / "__init__.py"  # `from models import load` reaches up to the engine, inside the function


def files(layer):
    return [ROOT / f"{layer}.py"] if (ROOT / f"{layer}.py").exists() else sorted((ROOT / layer).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("layer", ALLOWED)
def test_imports_point_one_way(layer):
    for path in files(layer):
        wrong = {name for name in imported(path) if name in OURS} - ALLOWED[layer]
        wrong -= {"engine"} if path == DOOR else set()
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_importing_prints_nothing_and_needs_no_optional_package():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for layer in ALLOWED for p in files(layer)]
    optional = ("av", "tensorboard", "gradio", "matplotlib", "peft")
    code = f"import sys; [sys.modules.__setitem__(name, None) for name in {optional}]\n" + "".join(
        f"import {module.removesuffix('.__init__')}\n" for module in modules
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_and_functions_are_short():
    for path in [p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "tests" not in p.parts]:
        source = path.read_text()
        assert source.count("\n") <= 400, f"{path.relative_to(ROOT)} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name} is over 60 lines"
