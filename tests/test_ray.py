"""CapFilt on Ray: a simulated cluster whose workers, machines and driver are killed gives what torchrun gives.

    python -m tests.test_ray --kills 50          # the campaign, and the time beside torchrun's; minutes
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scripts import ROOT, command, environment, family, run_here, settings  # noqa: E402

from miniature.writing import write_miniature  # noqa: E402

ray = pytest.importorskip("ray", reason="needs ray")
MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
WORKER = "ray::Worker"  # how Ray calls our actors' processes
NODES = 4
STORE = 100 << 20  # bytes of a machine's object store
LIMIT = 300  # seconds that a run may take


def make_world(folder, pairs):
    """Write web pairs, the image of the fifth broken."""
    write_miniature(folder, level=1, num_train=4, num_val=2, num_test=2, num_web=pairs)
    rows = json.loads((folder / "annotations" / "pretrain_web.json").read_text())
    (folder / rows[4]["image"]).write_bytes(b"broken")
    return folder


def arguments(world, output, **more):
    values = dict(pairs=f"[{world / 'annotations' / 'pretrain_web.json'}]", image_root=world, captioner=MODEL,
                  filter=MODEL, max_length=40, shard_size=9, batch_size=4, num_workers=0) | more  # fmt: skip
    return ["--config", ROOT / "configs" / "capfilt.yaml", "--output_dir", output, *settings(**values)]


def results(folder):
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in ("bootstrapped", "dropped", "unreadable")}


@contextlib.contextmanager
def simulated():
    """A cluster of four machines with a core each, and the head without any."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE})
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1, object_store_memory=STORE)
        yield cluster
    finally:
        cluster.shutdown()


def start(world, output, address, **more):
    words = command("capfilt.py", *arguments(world, output, ray_address=address, **more), "--engine", "ray")
    return subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def workers(cluster):
    """The processes of our actors on a cluster."""
    found = []
    for node in cluster.worker_nodes:
        for pid in family(node.all_processes["raylet"][0].process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(WORKER.encode()):
                    found.append(int(pid))
    return found


def kill(cluster, process, whom, rng):
    """Kill a worker, a machine, which another replaces, or the driver; return whether there was one."""
    if whom == "worker":
        pids = workers(cluster)
        if pids:
            os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)
    if whom == "machine":
        cluster.remove_node(rng.choice(sorted(cluster.worker_nodes, key=id)), allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        return True
    os.kill(process.pid, signal.SIGKILL)
    return True


def campaign(world, cluster, folder, kills, whole, rng, pause, **more):
    """Run again and again under kills; return how many of each kind there were. Every run ends as an untouched one."""
    done, number = dict.fromkeys(("worker", "machine", "driver"), 0), 0
    while sum(done.values()) < kills:
        output, process = folder / str(number), None
        number += 1
        while True:
            if process is None or process.poll() is not None:
                assert process is None or process.returncode in (0, -signal.SIGKILL), process.communicate()[0][-3000:]
                if process is not None and process.returncode == 0:
                    break
                process = start(world, output, cluster.address, **more)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(*pause))
                continue
            whom = min(done, key=lambda kind: (done[kind], rng.random()))
            begun = any((output / "shards").glob("*/*.jsonl"))  # before that, little can be lost
            if sum(done.values()) < kills and begun:
                done[whom] += kill(cluster, process, whom, rng)
        process.stdout.close()
        assert results(output) == whole
        assert not list(output.rglob("*.part*"))
        shutil.rmtree(output)
    return done | {"runs": number}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), 60)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run never interrupted, without Ray."""
    folder = tmp_path_factory.mktemp("whole")
    code, told = run_here("capfilt.py", *arguments(world, folder))
    assert code == 0, told
    return results(folder)


def test_kills_on_four_machines_lose_nothing(world, whole, tmp_path):
    with simulated() as cluster:
        campaign(world, cluster, tmp_path, 3, whole, random.Random(0), (1, 3))


def test_tars_and_duplicates_on_a_cluster_that_ray_starts(world, tmp_path):
    from test_capfilt_shards import results as of_tars
    from test_capfilt_shards import write_tar

    rows = json.loads((world / "annotations" / "pretrain_web.json").read_text())
    for number in range(3):
        part = [(f"{i}", "png", (world / rows[i]["image"]).read_bytes(), f"text {i}") for i in range(number, 12, 3)]
        write_tar(tmp_path / f"{number}.tar", part)
    found = []
    for engine in ("torchrun", "ray"):
        words = arguments(world, tmp_path / engine, pairs=f"['{tmp_path}/*.tar']", engine=engine, workers=2)
        for stage in ("dedup", "both"):
            done = subprocess.run(command("capfilt.py", *words, *settings(stage=stage)), cwd=ROOT, env=environment(),
                                  capture_output=True, text=True, timeout=LIMIT)  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        found.append(of_tars(tmp_path / engine) | {"": (tmp_path / engine / "duplicates.jsonl").read_bytes()})
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ray_address": "127.0.0.1:9"}, "no Ray cluster at ray_address '127.0.0.1:9'"),
        ({"image_root": "nowhere"}, "correct image_root"),
        ({"captioner": "{folder}/cut.safetensors"}, "cut.safetensors"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, change, said):
    (tmp_path / "cut.safetensors").write_bytes(Path(MODEL).read_bytes()[:5000])
    change = {key: value.format(folder=tmp_path) for key, value in change.items()}
    words = command("capfilt.py", *arguments(world, tmp_path / "out", workers=1, **change), "--engine", "ray")
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and said in last, done.stderr[-3000:]


def timed(words, output):
    """Seconds of a command, and those a shard: from the first to the last file of each stage, without the start."""
    began = time.monotonic()
    subprocess.run(words, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=LIMIT)
    whole, steady = time.monotonic() - began, 0.0
    for stage in ("captions", "texts"):
        times = [path.stat().st_mtime for path in (output / "shards" / stage).glob("*.jsonl")]
        steady += (max(times) - min(times)) / (len(times) - 1)
    return whole, steady


def race(world, folder, rounds):
    """Print the times of torchrun and of Ray's workers on two cores, in turn; return the results, which are equal."""
    seconds, results_of = {"torchrun": [], "ray": []}, {}
    for number in range(rounds):
        for engine in list(seconds)[:: 1 if number % 2 else -1]:
            output = folder / f"{engine}{number}"
            words = arguments(world, output, **({"workers": 2} if engine == "ray" else {}))
            words = command("capfilt.py", *words, processes=1 if engine == "ray" else 2)
            seconds[engine].append(timed([*words, "--engine", engine], output))
            assert results_of.setdefault("", results(output)) == results(output)
    for engine, taken in seconds.items():
        print(f"{engine}: s in all, ms a shard:", *(f"{whole:.1f}, {1e3 * shard:.0f};" for whole, shard in taken))
    ratios = [ours[1] / theirs[1] for ours, theirs in zip(seconds["ray"], seconds["torchrun"], strict=True)]
    middle = statistics.median(ratios)
    print(f"Ray / torchrun, a shard: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    return results_of[""]


def main():
    """Print the times of torchrun and Ray on two cores, and the campaign's counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3, help="of the race between torchrun and Ray")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = make_world(folder / "world", args.pairs)
        whole = race(world, folder, args.rounds)
        began = time.monotonic()
        with simulated() as cluster:
            done = campaign(world, cluster, folder / "kills", args.kills, whole, random.Random(0), (2, 8))
        print(f"kills {done}, {time.monotonic() - began:.0f} s; nothing lost, the same bytes")


if __name__ == "__main__":
    main()
