"""CapFilt on tar shards: what comes out, for any number of processes and any interruption, and of damaged input."""

import io
import json
import tarfile
import tracemalloc

import pytest
from scripts import ROOT, lines, run_and_signal, run_here, settings

from bootstrap.merging import merge_shards
from bootstrap.shards import Shards, run_shards
from bootstrap.stages import make_texts
from bootstrap.tars import TarOutput, tar_source
from data.shards import TarPairs, count_pairs
from data.tars import read_shard
from data.transforms import test_transform as make_transform
from miniature.writing import write_miniature
from utils import UserError

MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
NUM_PAIRS, BROKEN = 24, 4


def write_tar(path, samples):
    """Write (key, ending, image, text) as img2dataset does."""
    with tarfile.open(path, "w") as tar:
        for key, ending, image, text in samples:
            facts = json.dumps({"caption": text, "url": f"https://example.org/{key}", "status": "success"}).encode()
            for name, content in ((ending, image), ("txt", text.encode()), ("json", facts)):
                header = tarfile.TarInfo(f"{key}.{name}")
                header.size, header.mtime, header.uid = len(content), 1234, 7
                tar.addfile(header, io.BytesIO(content))


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Web pairs; the fifth image is broken."""
    folder = tmp_path_factory.mktemp("world")
    write_miniature(folder, level=1, num_train=4, num_val=2, num_test=2, num_web=NUM_PAIRS)
    rows = json.loads((folder / "annotations" / "pretrain_web.json").read_text())
    (folder / rows[BROKEN]["image"]).write_bytes(b"broken")
    ending = rows[0]["image"].rpartition(".")[2]
    return [(f"{i:09d}", ending, (folder / r["image"]).read_bytes(), r["caption"]) for i, r in enumerate(rows)]


@pytest.fixture(scope="module")
def web(samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    for number, (start, end) in enumerate(((0, 9), (9, 10), (10, 18), (18, NUM_PAIRS))):
        write_tar(folder / f"{number:05d}.tar", samples[start:end])
    return folder


def arguments(output, *names, **more):
    pairs = "[" + ", ".join(f"'{name}'" for name in names) + "]"
    values = dict(pairs=pairs, captioner=MODEL, filter=MODEL, max_length=40, shard_size=5, batch_size=4, num_workers=0)
    values |= more
    return ["--config", ROOT / "configs" / "capfilt.yaml", "--output_dir", output, *settings(**values)]


def results(folder):
    shards = [p.relative_to(folder) for p in folder.glob("bootstrapped/*") if not p.name.endswith(".count.json")]
    names = ["dropped.jsonl", "unreadable.jsonl", *shards]  # counts are written by whoever reads the shards
    return {str(name): (folder / name).read_bytes() for name in names}


def read(folder):
    return [record for path in sorted((folder / "bootstrapped").glob("*.tar")) for record in read_shard(str(path))]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(web, tmp_path_factory):
    """A run never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, told = run_here("capfilt.py", *arguments(folder, web / "{00000..00003}.tar"))
    assert code == 0, told
    return folder


def test_every_kept_text_is_a_pair_with_the_image_as_it_was(samples, whole):
    kept, dropped, (bad,) = read(whole), rows_of(whole / "dropped.jsonl"), rows_of(whole / "unreadable.jsonl")
    images = {key: image for key, _, image, _ in samples}
    assert bad["image"] == samples[BROKEN][0] and "00000.tar: 000000004: an image cannot be read" in bad["error"]
    for source in ("web", "synthetic"):
        found = [r.facts["key"] for r in kept if r.facts["source"] == source]
        found += [row["image"] for row in dropped if row["source"] == source]
        assert sorted(found) == sorted(set(images) - {bad["image"]})
    for record in kept:
        facts = record.facts
        assert record.image == images[facts["key"]] and record.caption == facts["caption"]
        assert facts["url"] == f"https://example.org/{facts['key']}" and 0.5 <= facts["probability"] <= 1
    assert kept and dropped and len({record.key for record in kept}) == len(kept)
    with tarfile.open(whole / "bootstrapped" / "00000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
    assert (whole / "report.html").is_file() and not (whole / "bootstrapped.jsonl").exists()


def test_pretraining_reads_the_set(whole):
    names = [str(whole / "bootstrapped" / "*.tar")]
    pairs = TarPairs(names, make_transform(64), 2, 0, 1)
    assert [pairs.at(0, i)["caption"] for i in range(len(pairs))] == [record.caption for record in read(whole)]
    for path in (whole / "bootstrapped").glob("*.tar"):
        assert count_pairs([str(path)]) == sum(1 for _ in read_shard(str(path)))


def test_other_shards_batches_and_a_pipe_give_the_same_texts(samples, whole, tmp_path):
    """Random numbers depend on the seed and the key only."""
    write_tar(tmp_path / "all.tar", samples)
    words = arguments(tmp_path / "out", f"pipe:cat {tmp_path}/all.tar", batch_size=7, shard_size=10)
    assert run_here("capfilt.py", *words)[0] == 0
    one, other = read(whole), read(tmp_path / "out")
    assert [(r.key, r.caption, r.image) for r in one] == [(r.key, r.caption, r.image) for r in other]
    for a, b in zip(one, other, strict=True):
        assert a.facts["probability"] == pytest.approx(b.facts["probability"], abs=2e-4)


def test_two_processes_killed_and_continued_by_one(web, whole, tmp_path):
    for attempt in range(5):  # on a busy machine the kill may come after the last shard
        folder = tmp_path / str(attempt)
        words, texts = arguments(folder, web / "*.tar"), folder / "shards" / "texts"
        run_and_signal("capfilt.py", *words, when=lambda texts=texts: any(texts.glob("*.jsonl")), processes=2)
        if not (folder / "dropped.jsonl").exists():
            break
    tmp_path = folder
    assert not (tmp_path / "dropped.jsonl").exists()
    captions = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards" / "captions").glob("*.jsonl")}
    assert len(captions) == 4
    assert run_here("capfilt.py", *words)[0] == 0
    assert results(tmp_path) == results(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in captions.items())  # not done again


def test_captions_alone_and_mistakes(web, whole, tmp_path):
    assert run_here("capfilt.py", *arguments(tmp_path, web / "00001.tar", stage="caption"))[0] == 0
    assert [r.facts["source"] for r in read(tmp_path)] == ["web", "synthetic"]
    assert lines(tmp_path / "dropped.jsonl") == 0
    for names, said in (
        ([web / "5.tar"], "does not exist; correct pairs"),
        ([web / "00001.tar", "a.json"], "pairs names both shards and lists"),
    ):
        code, told = run_here("capfilt.py", *arguments(tmp_path / "x", *names))
        assert code == 2 and said in told


# With a stub in place of the models.


def judge(samples, written):
    return [
        {"image": s.name, "caption": text, "source": "web", "probability": 0.9, "kept": True}
        for s in samples
        for text in s.texts
    ]


def bootstrap(tars, folder, size=5):
    """The filtering stage and what follows."""
    shards = Shards([list(map(str, tars))], 1, folder / "shards", tars=True)
    shards.folder.mkdir(parents=True, exist_ok=True)
    output = TarOutput(folder / "bootstrapped")
    output.delete_unfinished(shards)
    run_shards(shards, make_texts(tar_source(shards, size), None, judge, output), "tar files")
    return merge_shards(shards, folder)


def test_killed_between_the_archive_and_its_rows(web, tmp_path):
    tars = sorted(web.glob("*.tar"))
    bootstrap(tars, tmp_path)
    before = results(tmp_path)
    (tmp_path / "shards" / "0000002.jsonl").unlink()
    (tmp_path / "bootstrapped" / "00002.tar.part77").write_bytes(b"half")
    for stale in ("00004.tar", "00004_stats.json"):  # of a run with more input
        (tmp_path / "bootstrapped" / stale).write_bytes(b"{}")
    bootstrap(tars, tmp_path)
    assert results(tmp_path) == before and len(before) == 2 + 2 * len(tars)


def test_damage_is_counted_and_a_failing_command_ends_the_run(web, samples, tmp_path):
    whole = (web / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "none.tar").write_bytes(b"x" * 2000)
    tally = bootstrap([tmp_path / "none.tar", tmp_path / "cut.tar", web / "00001.tar"], tmp_path / "out")
    rows = rows_of(tmp_path / "out" / "unreadable.jsonl")
    assert tally.unreadable == 2 and all("cannot be read to its end" in row["error"] for row in rows)
    found = [record.facts["key"] for record in read(tmp_path / "out")]
    assert found[-1] == samples[9][0] and 2 <= len(found) < 9
    tar, size = web / "00000.tar", len(whole) // 2
    command = f"pipe:head -c {size} {tar}; test -e {tmp_path}/repaired || exit 3; tail -c +{size + 1} {tar}"
    with pytest.raises(UserError, match="ended with 3.*; repair it and start again: finished shards are kept"):
        bootstrap([web / "00001.tar", command], tmp_path / "piped")
    assert not list((tmp_path / "piped" / "bootstrapped").glob("*.part*"))
    (tmp_path / "repaired").touch()
    assert bootstrap([web / "00001.tar", command], tmp_path / "piped").kept["web"] == 1 + 9


def test_a_key_that_comes_twice(samples, tmp_path):
    write_tar(tmp_path / "a.tar", [samples[0], samples[1], samples[0]])
    bootstrap([tmp_path / "a.tar"], tmp_path)
    assert [r.key for r in read(tmp_path)] == ["000000000-0", "000000001-0", "000000000#2-0"]


def test_memory_does_not_grow_with_an_archive(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i:05d}", "jpg", bytes(50_000), "a text") for i in range(800)])
    tracemalloc.start()
    try:
        tally = bootstrap([tmp_path / "a.tar"], tmp_path, size=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tally.kept["web"] == 800 and peak < 25e6  # of 40 MB; 16 MB count distinct texts
