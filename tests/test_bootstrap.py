"""The bootstrapping experiment: its stages, what they choose, and how it goes on after a kill."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from scripts import environment

from demo.bootstrap import QUICK, Plan, Stage, all_stages, done_file, keep_plan, run_stages, write_pairs
from demo.bootstrap_table import SETS, order_lines, spread, write_tables
from processes import run_script, start
from utils import UserError

COMMAND = [sys.executable, "-m", "demo.bootstrap", "--quick", "--jobs", "2"]


def test_every_stage_needs_only_what_comes_before(tmp_path):
    seen = set()
    for stage in all_stages(tmp_path, Plan()):
        assert seen.issuperset(stage.needs), stage.name
        seen.add(stage.name)
    assert len(seen) == 1 + 3 * (1 + 6 * 3 + 2 + 3)


def test_a_set_takes_what_its_name_says():
    taken = {
        name: [(source, kept) for source in ("web", "synthetic") for kept in (True, False) if pairs.takes(source, kept)]
        for name, pairs in SETS.items()
    }
    assert taken["none"] == [("web", True), ("web", False)]
    assert taken["filter"] == [("web", True)]
    assert taken["captioner"] == [("web", True), ("web", False), ("synthetic", True), ("synthetic", False)]
    assert taken["both"] == taken["beam"] == taken["best"] == [("web", True), ("synthetic", True)]


def test_pairs_are_repeated_evenly_or_left_out(tmp_path):
    pairs = [{"image": str(i), "caption": "a ring"} for i in range(10)]
    write_pairs(tmp_path / "more.jsonl", pairs, 25, seed=0)
    write_pairs(tmp_path / "fewer.jsonl", pairs, 4, seed=0)
    more = [json.loads(line)["image"] for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    fewer = [json.loads(line)["image"] for line in (tmp_path / "fewer.jsonl").read_text().splitlines()]
    assert sorted(more.count(str(i)) for i in range(10)) == [2] * 5 + [3] * 5
    assert len(set(fewer)) == 4


def test_stages_wait_for_what_they_need_and_finished_ones_stay_finished(tmp_path):
    ran = []

    def note(name):
        return lambda: ran.append(name)

    stages = [Stage("b", ("a",), note("b")), Stage("a", (), note("a")), Stage("c", ("b",), note("c"))]
    asyncio.run(run_stages(tmp_path, stages, 3))
    assert ran == ["a", "b", "c"]
    done_file(tmp_path, stages[0]).unlink()
    asyncio.run(run_stages(tmp_path, stages, 1))
    assert ran == ["a", "b", "c", "b"]


def test_a_stage_that_fails_says_why_and_is_not_done(tmp_path):
    stage = Stage("bad", command=["-c", "raise SystemExit('no such colour')"])
    with pytest.raises(UserError, match=r"stage bad ended with 1: no such colour; see .*bad\.log"):
        asyncio.run(run_stages(tmp_path, [stage, Stage("next", ("bad",))], 2))
    assert not done_file(tmp_path, stage).exists() and not done_file(tmp_path, Stage("next")).exists()


def test_a_stage_that_fails_ends_those_that_run(tmp_path):
    slow = Stage("slow", command=["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"])
    began = time.monotonic()
    with pytest.raises(UserError, match="stage bad ended"):
        bad = Stage("bad", command=["-c", "import time; time.sleep(1); raise SystemExit(1)"])
        asyncio.run(run_stages(tmp_path, [slow, bad], 2))
    assert time.monotonic() - began < 30 and not done_file(tmp_path, slow).exists()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int((tmp_path / "logs" / "slow.log").read_text()), 0)
            time.sleep(0.1)


def test_a_folder_of_another_plan_is_refused(tmp_path):
    keep_plan(tmp_path, QUICK)
    keep_plan(tmp_path, QUICK)
    with pytest.raises(UserError, match="stages of another plan"):
        keep_plan(tmp_path, Plan())


def test_a_finished_run_goes_on_with_more_seeds(tmp_path):
    keep_plan(tmp_path, QUICK)
    keep_plan(tmp_path, replace(QUICK, seeds=3))
    assert json.loads((tmp_path / "plan.json").read_text())["seeds"] == 3


def test_the_order_is_reported_with_the_number_of_seeds():
    rows = {"none": [1.0, 2.0], "filter": [3.0, 1.0], "captioner": [4.0, 4.0], "both": [5.0, 5.0]}
    columns = ("CIDEr", "exact captions (%)", "text R@1", "image R@1")
    line = order_lines({name: dict.fromkeys(columns, row) for name, row in rows.items()})[0]
    assert "the paper's order; of 2 seeds none < filter in 1, filter < captioner in 2, captioner < both in 2" in line
    rows["filter"] = [1.0, 2.0]
    line = order_lines({name: dict.fromkeys(columns, row) for name, row in rows.items()})[0]
    assert "none <= filter <= captioner <= both" in line
    assert spread([90.0, 92.0]) == "91.0 ± 1.4"


def test_the_quick_experiment_killed_goes_on_to_its_tables(tmp_path, monkeypatch):
    """From the first stage to the tables: by the command, which is killed, then by copies of a preloaded process."""
    command = [*COMMAND, "--output", str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    done = tmp_path / "done" / "seed0.start.json"
    limit = time.monotonic() + 120
    while not done.is_file() and time.monotonic() < limit:
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = done.read_text()

    async def run_copy(arguments, name, log):
        folder = tmp_path / "output" / name
        folder.mkdir(parents=True, exist_ok=True)
        process = start(run_script, arguments, 1, folder, environment())
        await asyncio.to_thread(process.join)
        assert process.exitcode == 0, (name, (folder / "stderr").read_text())

    monkeypatch.setattr("demo.bootstrap.run_python", run_copy)
    same = ("filter", "captioner")  # whose stages differ from those of "both" in the pairs alone
    monkeypatch.setattr("demo.bootstrap.SETS", {name: pairs for name, pairs in SETS.items() if name not in same})
    asyncio.run(run_stages(tmp_path, all_stages(tmp_path, QUICK), 2))
    for name in same:
        shutil.copytree(tmp_path / "seed0" / "both", tmp_path / "seed0" / name)
    table = write_tables(tmp_path, QUICK.seeds)
    assert done.read_text() == first  # not done again
    values = json.loads((tmp_path / "bootstrap.json").read_text())
    assert set(values["models"]) == set(SETS) and set(values["tools"]) == {"nucleus", "beam", "best"}
    assert "| captioner and filter |" in table and (tmp_path / "bootstrap.png").stat().st_size > 5000
