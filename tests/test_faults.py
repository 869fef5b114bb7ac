"""A short campaign of kills: torchrun's own restarts, which keep the store of the start before."""

import json
import subprocess
import sys

from scripts import ROOT, environment


def test_restarted_runs_end_as_if_untouched(tmp_path):
    words = ["-m", "tests.faults", "--kills", "3", "--scripts", "capfilt.py", "train_nlvr.py", "--how", "by torchrun"]
    words += ["--output", str(tmp_path / "out"), "--page", str(tmp_path / "page.md")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kills = [json.loads(line) for line in (tmp_path / "out" / "kills.jsonl").read_text().splitlines()]
    assert len(kills) == 3 and not any(kill["lost"] for kill in kills)
    assert "Lost: **nothing**" in (tmp_path / "page.md").read_text()
