"""Tar shards: what is read, in which order, by whom, and again after an interruption."""

import io
import json
import os
import re
import tarfile

import pytest
import torch
from PIL import Image

from data import build_datasets, make_loader
from data.shards import count_pairs
from data.tars import expand, is_shard, read_shard
from utils import UserError

COUNTS = (5, 7, 4, 6)


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def image(number):
    """An encoded image; its grey gives its number."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (number * 5,) * 3).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def shards(tmp_path):
    """Four shards as img2dataset writes them: image, caption, and facts; and a list of the same pairs."""
    number, rows = 0, []
    for shard, count in enumerate(COUNTS):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for _ in range(count):
                key = f"{number:09d}"
                add(tar, f"{key}.png", image(number))
                if number % 2:
                    add(tar, f"{key}.txt", f"text {number}".encode())
                add(tar, f"{key}.json", json.dumps({"caption": f"text {number}", "width": 8}).encode())
                (tmp_path / f"{key}.png").write_bytes(image(number))
                rows.append({"image": f"{key}.png", "caption": f"text {number}"})
                number += 1
    (tmp_path / "list.json").write_text(json.dumps(rows))
    return tmp_path


def config(folder, files, **more):
    found = dict(train_file=files, image_root=str(folder), laion_path="", image_size=16, augment=False)
    return found | dict(batch_size=2, shuffle_buffer=1) | more


def batches(settings, num_workers=0, rank=0, world_size=1, epoch=0, consumed=0, seed=0):
    """The captions and the images' mean values of an epoch, batch by batch."""
    dataset = build_datasets("pretrain", settings)["train"]
    if hasattr(dataset, "shards"):
        dataset.rank, dataset.world_size = rank, world_size
    loader = make_loader(dataset, settings["batch_size"], True, num_workers, seed, processes=(world_size, rank))
    loader.sampler.set_position(epoch, consumed)
    return [(batch["caption"], batch["image"].mean(dim=(1, 2, 3)).tolist(), batch["bad"]) for batch in loader]


def numbers(found):
    return [int(text.split()[1]) for captions, _, _ in found for text in captions]


def test_shards_are_found_and_counted(shards):
    everything = [str(shards / f"{n:05d}.tar") for n in range(4)]
    assert expand([str(shards / "{00000..00003}.tar")]) == expand([str(shards / "*.tar")]) == everything
    assert expand(["pipe:cat a{1..2}.tar"]) == ["pipe:cat a1.tar", "pipe:cat a2.tar"]
    assert is_shard("pipe:x") and is_shard("a/{0..3}.tar") and not is_shard("a.json")
    assert count_pairs(everything) == sum(COUNTS)
    assert json.loads((shards / "00001.tar.count.json").read_text())["pairs"] == 7
    with pytest.raises(UserError, match="does not exist; correct train_file"):
        expand([str(shards / "absent.tar")])
    with pytest.raises(UserError, match="set shard_pairs"):
        count_pairs(["pipe:cat x.tar"])


def test_shards_and_lists_give_the_same_batches_in_the_same_order(shards):
    from_shards = batches(config(shards, [str(shards / "*.tar")]))
    assert numbers(from_shards) == list(range(22))
    dataset = build_datasets("pretrain", config(shards, [str(shards / "list.json")]))["train"]
    for n, (captions, means, bad) in enumerate(from_shards):
        rows = [dataset.at(0, 2 * n + i) for i in range(2)]
        assert captions == [row["caption"] for row in rows] and bad == ["", ""]
        assert means == pytest.approx([row["image"].mean().item() for row in rows])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_readers_share_no_pair_and_take_equal_steps(shards, num_workers, world_size):
    settings = config(shards, [str(shards / "*.tar")], shuffle_buffer=3)
    shares = [numbers(batches(settings, num_workers, rank, world_size, epoch=1)) for rank in range(world_size)]
    assert {len(share) for share in shares} == {22 // world_size // 2 * 2}
    assert world_size == 1 or not set(shares[0]) & set(shares[1])
    assert numbers(batches(settings, num_workers, epoch=2)) != numbers(batches(settings, num_workers, epoch=1))
    assert numbers(batches(settings, num_workers, seed=1)) != numbers(batches(settings, num_workers, seed=0))


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("consumed", [2, 6, 14])
def test_a_run_goes_on_in_the_middle_of_a_shard(shards, num_workers, consumed):
    settings = config(shards, [str(shards / "*.tar")], shuffle_buffer=3, augment=True)
    whole = batches(settings, num_workers, epoch=3)
    rest = batches(settings, num_workers, epoch=3, consumed=consumed)
    assert rest == whole[consumed // 2 :]


def test_pipes(shards):
    names = [f"pipe:cat {shards}/{{00000..00003}}.tar"]
    found = batches(config(shards, names, shard_pairs=22))
    assert numbers(found) == list(range(22))


def test_what_cannot_be_read_is_named_and_replaced(shards):
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for number, content in enumerate((image(1), b"no image", image(3))):
            add(tar, f"{number}.png", content)
            add(tar, f"{number}.txt", f"text {number}".encode())
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: 512 * 13 + 30])
    names = [*(str(shards / f"0000{n}.tar") for n in (0, 1)), "pipe:false"]
    found = batches(config(shards, names, shard_pairs=12))
    assert numbers(found)[:4] == [0, 0, 2, 5]  # the pair before stands in for the unreadable one
    told = " ".join(text for _, _, bad in found for text in bad)
    assert "00000.tar: 1: cannot identify image" in told and "00001.tar cannot be read to its end" in told
    assert "pipe:false cannot be read to its end" in told


def test_mistakes(shards):
    with pytest.raises(UserError, match="4 shards for 5 readers"):
        batches(config(shards, [str(shards / "*.tar")]), world_size=5)
    with pytest.raises(UserError, match="both shards and lists"):
        build_datasets("pretrain", config(shards, [str(shards / "*.tar"), "list.json"]))
    with pytest.raises(UserError, match="no pair can be read from 1 shards; pipe:true cannot be read to its end"):
        batches(config(shards, ["pipe:true"], shard_pairs=4))


def lie(shard, place, size):
    """Give a file of a shard, by the place of its header, another size, in a header that is whole."""
    data = bytearray(shard.read_bytes())
    header = tarfile.TarInfo.frombuf(data[place : place + 512], "utf-8", "strict")
    header.size = size
    data[place : place + 512] = header.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(data)


@pytest.mark.parametrize(("size", "said"), [(0, "lies about its size"), (10**6, "unexpected end"), (1 << 40, "bytes")])
def test_a_file_that_lies_about_its_size_is_an_error(shards, size, said):
    with tarfile.open(shards / "00000.tar") as tar:
        place = [member.offset for member in tar if member.name.endswith(".png")][2]
    lie(shards / "00000.tar", place, size)
    with pytest.raises(tarfile.TarError, match=said):
        list(read_shard(str(shards / "00000.tar")))
    found = batches(config(shards, [str(shards / "*.tar")], shard_pairs=12))
    assert numbers(found)[:4] == [0, 1, 5, 6]
    (problem,) = {text for _, _, bad in found for text in bad} - {""}
    assert "00000.tar cannot be read to its end" in problem and said in problem


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.SOLARIS_XHDTYPE])
def test_an_endless_header_is_not_read(tmp_path, kind):
    header = tarfile.TarInfo("a")
    header.size, header.type = 1 << 40, kind
    (tmp_path / "a").write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(tarfile.ReadError, match="a header says it has 1099511627776 bytes"):
        list(read_shard(f"pipe:cat {tmp_path}/a /dev/zero"))


def test_a_command_that_fails_is_told_from_a_damaged_archive(shards):
    """It may fail before, in the middle of, or after the archive, or be cut off by a reader that has had enough."""
    tar = shards / "00003.tar"
    for command in ("false", f"head -c 3000 {tar}; exit 1", f"cat {tar}; exit 1"):
        with pytest.raises(OSError, match="the command ended with 1"):
            list(read_shard(f"pipe:{command}"))
    (shards / "bad.tar").write_bytes(tar.read_bytes()[:512] + b"x" * 10**6)
    for command in (f"head -c 3000 {tar}", f"cat {shards}/bad.tar", f"cat {shards}/bad.tar /dev/zero"):
        with pytest.raises(tarfile.TarError):
            list(read_shard(f"pipe:{command}"))
    assert next(read_shard(f"pipe:cat {tar} /dev/zero")).caption == "text 16"


def test_facts_that_are_none_leave_a_sample_without_caption(tmp_path):
    facts = (b"{", b"[1]", b"\xff", b"[" * 10**5, json.dumps({"caption": 3}).encode(), b'{"caption": "good"}')
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, text in enumerate(facts):
            add(tar, f"{number}.jpg", b"x")
            add(tar, f"{number}.json", text)
    assert [(r.key, r.caption) for r in read_shard(str(tmp_path / "a.tar"))] == [("5", "good")]


def test_samples_without_image_or_text_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a/1.txt", b"alone"), ("a/2.jpg", image(2)), ("a/3.jpg", b"x"), ("a/3.txt", b"three")):
            add(tar, name, content)
        add(tar, "b/3.jpg", b"y")
        add(tar, "b/3.seg.txt", b"no caption")
    assert [(r.name, r.image, r.caption) for r in read_shard(str(tmp_path / "a.tar"))] == [
        (f"{tmp_path}/a.tar: a/3", b"x", "three")
    ]
    assert torch.utils.data.get_worker_info() is None


# A4. Shards that were read wrong without a word.


def make(path, *files, mode="w"):
    """Write a shard of (name, content) files."""
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            add(tar, name, content)
    return str(path)


def pairs(count, ending="png"):
    return [file for n in range(count) for file in ((f"{n}.{ending}", image(n)), (f"{n}.txt", f"text {n}".encode()))]


def set_time(path, seconds):
    os.utime(path, (seconds, seconds))


def test_a4_a_count_belongs_to_the_shard_it_was_made_for(tmp_path):
    shard, stats = make(tmp_path / "0.tar", *pairs(6)), tmp_path / "0_stats.json"
    set_time(shard, 1000)
    stats.write_text(json.dumps({"count": 9, "successes": 100}))
    assert count_pairs([shard]) == 100  # img2dataset's, written after the shard
    make(shard, *pairs(14))
    set_time(shard, 500)  # rewritten, with an older time than the statistics
    assert count_pairs([shard]) == 14
    stats.unlink()
    make(shard, *pairs(3))
    assert count_pairs([shard]) == 3
    make(shard)
    assert count_pairs([shard]) == 0
    make(shard, *pairs(2))
    assert count_pairs([shard]) == 2  # a repaired shard is counted again


NO_COUNTS = ["{", "[]", '{"successes": -1}', '{"successes": true}', '{"successes": "9"}', "[" * 10**5]


@pytest.mark.parametrize("content", NO_COUNTS)
def test_a4_statistics_that_are_none_are_not_believed(tmp_path, content):
    shard = make(tmp_path / "0.tar", *pairs(2))
    (tmp_path / "0_stats.json").write_text(content)
    assert count_pairs([shard]) == 2


def test_a4_statistics_older_than_their_shard_are_not_believed(tmp_path):
    shard = make(tmp_path / "0.tar", *pairs(2))
    (tmp_path / "0_stats.json").write_text('{"successes": 6}')
    set_time(tmp_path / "0_stats.json", 1000)
    assert count_pairs([shard]) == 2


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "gif", "bmp", "tif", "tiff", "avif", "ppm", "jp2", "jfif"])
def test_a4_every_ending_of_an_image_is_read(tmp_path, ending):
    shard = make(tmp_path / "0.tar", *pairs(3, ending))
    assert [record.caption for record in read_shard(shard)] == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("hidden", ["._{}", ".DS_Store", "__MACOSX/{}"])
def test_a4_hidden_files_of_other_systems_split_nothing(tmp_path, hidden):
    files = [file for name, content in pairs(3) for file in ((hidden.format(name), b"\0\5"), (name, content))]
    assert len(list(read_shard(make(tmp_path / "0.tar", *files)))) == 3


def test_a4_samples_left_out_are_counted_by_reason(tmp_path, capsys):
    wrong = [("a.foo", b""), ("a.txt", b"x"), ("b.txt", b"x"), ("c.jpg", b"x"), ("d.jpg", b"x"), ("d.txt", b" ")]
    shard = make(tmp_path / "0.tar", *pairs(2), *wrong)
    said = "2 without text, 1 without image (with .foo), 1 without image"
    assert count_pairs([shard]) == 2 and f"left out: {said}" in capsys.readouterr().err
    batches(config(tmp_path, [shard]))
    assert f"left out of shard {shard}: {said}" in capsys.readouterr().err


def test_a4_shards_without_a_pair_say_what_they_hold(tmp_path):
    shard = make(tmp_path / "0.tar", ("a.foo", b""), ("b.foo", b""), ("a.txt", b"x"), ("README", b""))
    said = r"no pair in 1 shards; .*0\.tar holds 2 \.foo, 1 \.txt, 1 no ending; expected an image"
    with pytest.raises(UserError, match=said):
        build_datasets("pretrain", config(tmp_path, [shard]))
    with pytest.raises(UserError, match=r"no pair in 1 shards; .*1\.tar holds no file; expected"):
        build_datasets("pretrain", config(tmp_path, [make(tmp_path / "1.tar")]))


@pytest.mark.parametrize("num_workers", [0, 2, 5])
def test_a4_an_empty_shard_is_skipped(shards, num_workers):
    make(shards / "00004.tar")
    found = numbers(batches(config(shards, [str(shards / "*.tar")]), num_workers))
    assert len(found) >= 20 and set(found) <= set(range(22))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz"])
def test_a4_compressed_shards(tmp_path, name):
    mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[name.rpartition(".")[2]]
    shard = make(tmp_path / name, *pairs(4), mode=mode)
    assert is_shard(shard) and numbers(batches(config(tmp_path, [shard]))) == [0, 1, 2, 3]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(tarfile.TarError):
        list(read_shard(shard))


def test_a4_folders_lists_and_repetitions(shards, capsys):
    everything = [str(shards / f"{n:05d}.tar") for n in range(4)]
    make(shards / "._00000.tar")
    assert is_shard(str(shards)) and expand([str(shards)]) == everything
    assert expand([f"{shards}/{{00000,00002}}.tar"]) == everything[::2]
    assert expand(["::".join(everything[:2])]) == everything[:2]
    assert expand([f"{shards}/{{00003..00000}}.tar"]) == everything[::-1]
    assert capsys.readouterr().err == ""
    assert expand([str(shards / "0*.tar"), everything[1]]) == everything
    assert "names 1 shards twice" in capsys.readouterr().err
    (shards / "empty").mkdir()
    with pytest.raises(UserError, match="holds no shard"):
        expand([str(shards / "empty")])


@pytest.mark.parametrize(
    "name, pipe",
    [
        ("https://x.org/{0..1}.tar", "pipe:curl -sfL https://x.org/0.tar"),
        ("s3://b/0.tar", "pipe:aws s3 cp s3://b/0.tar -"),
        ("gs://b/0.tar", "pipe:gsutil cat gs://b/0.tar"),
        ("0.tar.zst", "pipe:zstd -dc 0.tar.zst"),
    ],
)
def test_a4_what_cannot_be_read_comes_with_its_pipe(name, pipe, monkeypatch):
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda _: (_ for _ in ()).throw(ImportError("Install s3fs")))
    assert is_shard(name)
    with pytest.raises(UserError, match=re.escape(f"with '{pipe}'")):
        expand([name])
