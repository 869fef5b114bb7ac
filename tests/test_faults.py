"""A short campaign of kills: torchrun's own restarts, which keep the store of the start before."""

import json
import os

import torch
import torch.distributed as dist
from faults import differences
from scripts import environment, run

from launch.run import join_process_group
from processes import run_agent, start


def test_restarted_runs_end_as_if_untouched(tmp_path):
    words = ["--kills", "3", "--scripts", "capfilt.py", "train_nlvr.py", "--how", "by torchrun"]
    run("tests/faults.py", *words, "--output", tmp_path / "out", "--page", tmp_path / "page.md")
    kills = [json.loads(line) for line in (tmp_path / "out" / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == 3 and not any(kill["lost"] for kill in kills)
    assert "Lost: **nothing**" in (tmp_path / "page.md").read_text()


def test_the_smallest_loss_is_seen(tmp_path):
    for name in ("whole", "same", "other"):
        (tmp_path / name).mkdir()
        content = {"model": {"a": torch.ones(3)}, "progress": {"step": 4}, "best": [1.0]}
        if name == "other":
            content["model"]["a"][2] += 1e-7
        torch.save(content, tmp_path / name / "checkpoint_last.pth")
        (tmp_path / name / "log.txt").write_text("row\n")
    assert differences(tmp_path / "same", tmp_path / "whole") == []
    (tmp_path / "other" / "checkpoint_best.pth.part").touch()
    (tmp_path / "other" / "log.txt").unlink()
    told = ["checkpoint_last.pth differs", "log.txt is missing", "checkpoint_best.pth.part was left behind"]
    assert differences(tmp_path / "other", tmp_path / "whole") == told


def work_of_two_starts(folder):
    """In the first start both processes end; in the second each writes what it finds in the store."""
    store = join_process_group(torch.device("cpu"), 1.0)
    number = store.add("counter", 1)
    dist.barrier()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    (folder / str(dist.get_rank())).write_text(str(number))


def test_processes_that_torchrun_restarts_find_an_empty_store(tmp_path):
    options = ["--nproc_per_node=2", "--max_restarts=1", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    agent = start(run_agent, options, environment(), work_of_two_starts, tmp_path)
    agent.join(120)
    assert agent.exitcode == 0
    assert {(tmp_path / rank).read_text() for rank in "01"} == {"1", "2"}
