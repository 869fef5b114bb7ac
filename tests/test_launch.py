"""The start and end of a script: collectives in one module, memory, deterministic algorithms."""

import ast
import os
import sys
from pathlib import Path

import pytest
import torch

import utils
from launch.config import CapFiltConfig, CaptionConfig
from launch.run import explain_error, launch
from launch.watchdog import Watchdog

ROOT = Path(__file__).parent.parent
COLLECTIVES = {"all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier",
               "reduce", "gather", "scatter", "all_gather_into_tensor", "reduce_scatter", "send", "recv"}  # fmt: skip


def test_17_1_collectives_are_called_in_utils_alone():
    """`dist.<collective>` nowhere else; released/ sets up the group of code written for the released package."""
    found = set()
    rooms = [path for path in ROOT.glob("[!.]*/**/*.py") if not {"tests", "released"} & {*path.parts}]
    for path in [*rooms, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                owner = ast.unparse(node.value)
                if owner.endswith("dist") or owner.endswith("distributed"):
                    found.add(path.name)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
                assert not COLLECTIVES & {alias.name for alias in node.names}, path
    assert found == {"utils.py"}


def run_main(monkeypatch, capsys, tmp_path, main, config_class=CaptionConfig, *words):
    """Launch `main` with a config of a task; return the exit code and what went to stderr."""
    path = "configs/miniature/capfilt.yaml" if config_class is CapFiltConfig else "configs/miniature/caption.yaml"
    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", str(tmp_path / "out"), *words])
    code = launch(main, config_class, path, "", "")
    return code, capsys.readouterr().err


def allocate(config, run):
    run.watchdog.enter("a step", 7)
    torch.empty(2**58)


def test_17_18_out_of_memory_is_one_line(monkeypatch, capsys, tmp_path):
    code, told = run_main(monkeypatch, capsys, tmp_path, allocate, CaptionConfig, "--set", "batch_size=12")
    assert code == 2 and told.count("\n") == 1, told
    assert "error: out of memory: rank 0 in a step at step 7" in told and "tried to allocate" in told
    assert "lower batch_size: 12, image_size: " in told and "vit_grad_ckpt: true" in told
    code, told = run_main(monkeypatch, capsys, tmp_path, allocate, CapFiltConfig)
    assert code == 2 and "lower batch_size: " in told and "vit_grad_ckpt" not in told


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        MemoryError(),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
)
def test_17_18_every_kind_of_memory(error):
    told = explain_error(error, Watchdog(), CaptionConfig(), Path("out"))
    assert told.startswith("out of memory: rank 0 in starting at step 0: ") and "num_workers: 4" in told
    assert (str(error).strip() or "MemoryError") in told


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("CUDA error: device-side assert triggered"), ValueError("NCCL"), KeyError("gloo")):
        assert explain_error(error, Watchdog(), CaptionConfig(), Path("out")) == ""


def test_17_15_deterministic(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def look(config, run):
        cudnn = torch.backends.cudnn
        seen.append((torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark))
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    before = torch.backends.cudnn.deterministic
    try:
        assert run_main(monkeypatch, capsys, tmp_path, look)[0] == 0
        run_main(monkeypatch, capsys, tmp_path, look, CaptionConfig, "--set", "deterministic=true")
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = before
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert seen == [(False, False, False), None, (True, True, False), ":4096:8"]


def test_17_1_collectives_take_tensors_of_any_device(monkeypatch):
    """Under NCCL a tensor of the CPU goes to the rank's GPU first; "meta" stands for it here."""
    sent = []
    monkeypatch.setattr(utils.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(utils.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(utils.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(utils.dist, "all_reduce", lambda tensor, *_: sent.append(tensor))
    monkeypatch.setattr(utils.dist, "broadcast", lambda tensor, **_: sent.append(tensor))
    monkeypatch.setattr(utils.dist, "all_gather", lambda parts, tensor: sent.extend([*parts, tensor]))
    for function in (utils.all_reduce, utils.all_reduce_mean, utils.all_gather):
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on the way back
            function(torch.tensor([1.5]))
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        utils.broadcast_([torch.tensor([1.5])])
    assert len(sent) == 6 and all(tensor.device.type == "meta" for tensor in sent)
