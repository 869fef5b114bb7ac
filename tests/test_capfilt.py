"""CapFilt by its command line: kills, numbers of processes, stages, bad images, and many pairs."""

import json
import os
import resource
import shutil
from collections import Counter, deque
from pathlib import Path

import pytest
from PIL import Image
from scripts import ROOT, lines, run, run_and_signal, run_here, settings

from bootstrap.merging import Distinct, merge_shards
from bootstrap.ray_engine import _give_back
from bootstrap.shards import Shards, run_shards
from data.pretrain import PairDataset, image_of_url
from data.transforms import test_transform as make_transform
from miniature.writing import write_miniature
from utils import UserError

SLOW = pytest.mark.skipif("BLIP_SLOW" not in os.environ, reason="takes a minute and a half; set BLIP_SLOW=1")
MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    """60 web pairs; the image of the fifth is broken."""
    folder = tmp_path_factory.mktemp("world")
    write_miniature(folder, level=1, num_train=4, num_val=2, num_test=2, num_web=60)
    rows = json.loads((folder / "annotations" / "pretrain_web.json").read_text())
    (folder / rows[4]["image"]).write_bytes(b"broken")
    return folder, rows


def arguments(web, output, **more):
    values = dict(pairs=f"[{web[0] / 'annotations' / 'pretrain_web.json'}]", image_root=web[0], captioner=MODEL,
                  filter=MODEL, max_length=40, shard_size=9, batch_size=4) | more  # fmt: skip
    return ["--config", ROOT / "configs" / "capfilt.yaml", "--output_dir", output, *settings(num_workers=0, **values)]


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def results(folder):
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in ("bootstrapped", "dropped", "unreadable")}


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    """A run never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, told = run_here("capfilt.py", *arguments(web, folder))
    assert code == 0, told
    return folder


def test_every_text_is_kept_or_dropped_once(web, whole):
    kept, dropped = read(whole / "bootstrapped.jsonl"), read(whole / "dropped.jsonl")
    (bad,) = read(whole / "unreadable.jsonl")
    assert bad["image"] == web[1][4]["image"] and "cannot be read" in bad["error"]
    images = [row["image"] for row in web[1] if row["image"] != bad["image"]]
    for source in ("web", "synthetic"):
        found = [row["image"] for row in kept + dropped if row["source"] == source]
        assert sorted(found) == sorted(images)
    assert all(row["probability"] >= 0.5 for row in kept) and all(row["probability"] <= 0.5 for row in dropped)
    assert kept and dropped and (whole / "report.html").is_file() and (whole / "histograms.png").is_file()


def test_pretraining_reads_the_set(web, whole):
    pairs = PairDataset([whole / "bootstrapped.jsonl"], str(web[0]), make_transform(64))
    rows = read(whole / "bootstrapped.jsonl")
    assert len(pairs) == len(rows) and [pairs[i]["caption"] for i in range(len(rows))] == [r["caption"] for r in rows]


def test_the_filter_tells_right_from_wrong(web, whole):
    truth = {row["image"]: row["matches"] for row in
             json.loads((web[0] / "annotations" / "pretrain_web_truth.json").read_text())}  # fmt: skip
    kept = {row["image"] for row in read(whole / "bootstrapped.jsonl") if row["source"] == "web"}
    judged = [image for image in truth if image != web[1][4]["image"]]
    assert sum((image in kept) == truth[image] for image in judged) > 0.7 * len(judged)


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes(web, whole, tmp_path, processes):
    run("capfilt.py", *arguments(web, tmp_path), processes=processes)
    assert results(tmp_path) == results(whole)


@pytest.mark.parametrize("stage", ["captions", "texts"])
def test_killed_and_continued(web, whole, tmp_path, stage):
    words = arguments(web, tmp_path)
    folder = tmp_path / "shards" / stage
    run_and_signal("capfilt.py", *words, when=lambda: len(list(folder.glob("*.jsonl"))) >= 2, processes=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards" / "captions").glob("*.jsonl")}
    assert len(before) >= 2 and not (tmp_path / "bootstrapped.jsonl").exists()
    assert run_here("capfilt.py", *words)[0] == 0
    assert results(tmp_path) == results(whole)
    folder = tmp_path / "shards" / "captions"
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())  # not done again


def test_any_batch_size(web, whole, tmp_path):
    assert run_here("capfilt.py", *arguments(web, tmp_path, batch_size=7))[0] == 0
    key = ("image", "caption", "source")
    for name in ("bootstrapped", "dropped"):
        one, other = read(whole / f"{name}.jsonl"), read(tmp_path / f"{name}.jsonl")
        assert [[row[k] for k in key] for row in one] == [[row[k] for k in key] for row in other]
        for a, b in zip(one, other, strict=True):
            assert a["probability"] == pytest.approx(b["probability"], abs=2e-4)


def test_stages_alone_add_up_to_both(web, whole, tmp_path):
    assert run_here("capfilt.py", *arguments(web, tmp_path, stage="caption"))[0] == 0
    unfiltered = read(tmp_path / "bootstrapped.jsonl")
    assert len(unfiltered) == 2 * 59 and lines(tmp_path / "dropped.jsonl") == 0
    code, told = run_here("capfilt.py", *arguments(web, tmp_path, stage="filter"))
    assert code == 2 and "holds shards of other settings (judged)" in told
    words = (*arguments(web, tmp_path, stage="filter"), "--overwrite")  # drops the unjudged texts, not the captions
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "shards" / "captions").glob("*.jsonl"))
    assert run_here("capfilt.py", *words)[0] == 0
    assert results(tmp_path) == results(whole)
    assert before == sorted(path.stat().st_mtime_ns for path in (tmp_path / "shards" / "captions").glob("*.jsonl"))
    next((tmp_path / "shards" / "captions").glob("*.jsonl")).unlink()
    code, told = run_here("capfilt.py", *arguments(web, tmp_path, stage="filter"))
    assert code == 2 and "1 of 7 shards have no captions yet" in told


def test_filter_alone_judges_web_texts(web, tmp_path):
    assert run_here("capfilt.py", *arguments(web, tmp_path, stage="filter", captioner=""))[0] == 0
    rows = read(tmp_path / "bootstrapped.jsonl") + read(tmp_path / "dropped.jsonl")
    assert len(rows) == 59 and {row["source"] for row in rows} == {"web"}


def test_beams_and_several_captions(web, tmp_path):
    assert run_here("capfilt.py", *arguments(web, tmp_path, sample=False, num_captions=2, stage="caption"))[0] == 0
    synthetic = [row for row in read(tmp_path / "bootstrapped.jsonl") if row["source"] == "synthetic"]
    assert len(synthetic) == 2 * 59


def test_the_filter_keeps_the_best_of_several(web, tmp_path):
    found = {}
    for name, more in (("all", {"num_captions": 3}), ("best", {"best_of": 3})):
        assert run_here("capfilt.py", *arguments(web, tmp_path / name, top_p=0.99, threshold=0, **more))[0] == 0
        found[name] = {}
        for row in read(tmp_path / name / "bootstrapped.jsonl"):
            if row["source"] == "synthetic":
                found[name].setdefault(row["image"], {})[row["caption"]] = row["probability"]
    assert max(map(len, found["all"].values())) > 1 and set(found["all"]) == set(found["best"])
    for image, own in found["best"].items():
        assert own.items() <= found["all"][image].items()
        assert set(own.values()) == {max(found["all"][image].values())}
    everything = lines(tmp_path / "best" / "bootstrapped.jsonl") + lines(tmp_path / "best" / "dropped.jsonl")
    assert everything == lines(tmp_path / "all" / "bootstrapped.jsonl")
    code, told = run_here("capfilt.py", *arguments(web, tmp_path / "best", top_p=0.99, threshold=0))
    assert code == 2 and "shards of other settings (best_of)" in told


def test_lists_of_urls(web, tmp_path):
    """Images downloaded to where their URL says; in JSON lines."""
    rows = []
    for number, row in enumerate(web[1][:4]):
        url = f"https://example.org/{number}.jpg"
        path = tmp_path / "images" / image_of_url(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open(web[0] / row["image"]).save(path)
        rows.append(json.dumps({"url": url, "caption": row["caption"]}))
    (tmp_path / "web.jsonl").write_text("\n".join(rows))
    words = arguments(web, tmp_path / "out", pairs=f"[{tmp_path / 'web.jsonl'}]", image_root=tmp_path / "images")
    assert run_here("capfilt.py", *words)[0] == 0
    assert lines(tmp_path / "out" / "unreadable.jsonl") == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "both?"}, "expected one of 'both', 'caption', 'filter'"),
        ({"pairs": "[]"}, "pairs names no list"),
        ({"filter": ""}, "filter names no checkpoint"),
        ({"pairs": "[absent.json]"}, "absent.json does not exist"),
        ({"captioner": "absent.pth"}, "absent.pth do"),
        ({"image_root": "nowhere"}, "correct image_root"),
    ],
)
def test_mistakes_end_in_one_line(web, tmp_path, change, said):
    code, told = run_here("capfilt.py", *arguments(web, tmp_path, **change))
    assert code == 2 and said in told.splitlines()[-1] and told.splitlines()[-1].startswith("error: ")


def test_settings_cut_by_a_full_disk_are_written_again(web, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "shards" / "texts" / "settings.json").write_text("")
    code, told = run_here("capfilt.py", *arguments(web, tmp_path / "copy"))
    assert code == 2 and "holds shards of other settings" in told
    assert run_here("capfilt.py", *arguments(web, tmp_path / "copy"), "--overwrite")[0] == 0
    assert results(tmp_path / "copy") == results(whole)


def test_distinct_texts_are_counted_in_little_memory():
    counter = Distinct()
    for number in range(300_000):
        counter.add(f"text {number % 100_000}")
    assert counter.count() == pytest.approx(100_000, rel=0.01)


@pytest.mark.parametrize("pairs", [60_000, pytest.param(1_000_000, marks=SLOW)])
def test_many_pairs_in_flat_memory(tmp_path, pairs):
    """Stub models; pairs that are made when they are asked for."""

    class Made:
        def __len__(self):
            return pairs

        def __getitem__(self, index):
            return [(f"{i:07d}.jpg", f"an image of thing {i}") for i in range(*index.indices(pairs))]

    shards = Shards([Made()], 5_000, tmp_path / "shards")
    shards.folder.mkdir()

    def work(shard):
        return [
            {"image": image, "caption": text, "source": source, "probability": 0.25 + 0.5 * kept, "kept": bool(kept)}
            for i, (image, text) in enumerate(shards.pairs(shard))
            for source, kept in (("web", i % 2), ("synthetic", i % 2))
        ]

    run_shards(shards, work, "pairs")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = merge_shards(shards, tmp_path)
    assert sum(tally.kept.values()) == sum(tally.dropped.values()) == pairs
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    with open(tmp_path / "bootstrapped.jsonl", encoding="utf-8") as file:
        assert sum(1 for _ in file) == pairs


@pytest.mark.parametrize(("shard", "said"), [(None, "41 workers in a row"), (3, "shard 3 has ended 20 workers")])
def test_workers_of_ray_that_are_lost_again_and_again_end_the_run(shard, said):
    waiting, losses = deque(), Counter()
    with pytest.raises(UserError, match=said):
        for _ in range(1000):
            _give_back(shard, waiting, losses, "ActorDiedError", 2)
            assert list(waiting) == ([] if shard is None else [shard])
            waiting.clear()
