"""Ids, ground truth and tar shards of any content give what a plain calculation gives, or an error in one line."""

import json
import os
import posixpath
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_properties import TEXT, VALUE, examples
from test_shards import add

from data.coco_flickr import CaptionEval, RetrievalTrain
from data.shards import count_pairs
from data.tars import IMAGES, read_shard
from data.transforms import test_transform as square
from data.vqa import VQATest
from metrics.ground_truth import read_ground_truth
from utils import UserError

NAMES = ("a.jpg", "./a.jpg", "b.jpg", "7.jpg", "007.jpg", "7.png", "sub/7.jpg", "000000000007.jpg",
         "COCO_val2014_000000000007.jpg", "COCO_val2014_000000000008.jpg")  # fmt: skip
IDS = st.sampled_from([1, 1.0, "1", "01", "001", 2, "2", -0.0, 0, "0", 10**30, str(10**30), 1e30, "x", "X"])
NO_IDS = st.sampled_from([None, True, False, 0.5, float("nan"), float("inf"), "", [1], {"id": 1}])
ANY_ID = st.integers(0, 9).flatmap(lambda n: NO_IDS if n == 4 else IDS)


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            Path(folder, name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(Path(folder, name))
        yield Path(folder)


def normal(value):
    """The text of an id, None if it is none; by the value's JSON."""
    if isinstance(value, str):
        return value or None
    if isinstance(value, bool | list | dict) or value is None or value != value or value in (float("inf"), 0.5):
        return None
    return str(int(value))


def one_to_one(pairs):
    """Return True if equal firsts have equal seconds, and the other way round."""
    pairs = set(pairs)
    return len(pairs) == len({first for first, _ in pairs}) == len({second for _, second in pairs})


def outcome(function):
    """What a function returns, or the line of its UserError."""
    try:
        return function()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def dataset(kind, rows, *args):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        file.write_text(json.dumps(rows))
        return outcome(lambda: kind(str(file), *args, square(8)))


@examples(120)
@given(rows=st.lists(st.tuples(st.sampled_from(NAMES[:3]), ANY_ID), min_size=1, max_size=5))
def test_ids_belong_to_one_image_each(root, rows):
    listed = [{"image": name, "image_id": number, "caption": "x"} for name, number in rows]
    keys = [(posixpath.normpath(name), normal(number)) for name, number in rows]
    right = None not in [key for _, key in keys] and one_to_one(keys)
    for kind in (CaptionEval, RetrievalTrain):
        found = dataset(kind, listed, root)
        assert isinstance(found, kind) if right else isinstance(found, str) and "entr" in found, found
    if right:
        assert len(dataset(CaptionEval, listed, root)) == len({name for name, _ in keys})
        numbers = [row["number"] for row in found.annotation]
        assert one_to_one(zip(numbers, (name for name, _ in keys), strict=True))


@examples(100)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4))
def test_ids_of_file_names_are_those_of_one_file_or_refused(root, names):
    found = dataset(CaptionEval, [{"image": name} for name in names], root)
    files = {posixpath.normpath(name) for name in names}
    if isinstance(found, CaptionEval):
        assert len(set(map(str, found.ids))) == len(found.ids) == len(files)
    else:
        stems = Counter(Path(name).stem.removeprefix("COCO_val2014_").removeprefix("00000000000") for name in files)
        assert "belongs to two images" in found and max(stems.values()) > 1


@examples(100)
@given(rows=st.lists(st.tuples(st.sampled_from(["a.jpg", "b.jpg"]), st.sampled_from("xy"), ANY_ID), min_size=1,
                     max_size=4))  # fmt: skip
def test_question_ids_belong_to_one_question_each(root, rows):
    listed = [{"image": image, "question": text, "question_id": number} for image, text, number in rows]
    owners = {}
    for image, text, number in rows:
        owners.setdefault(normal(number), set()).add((image, text))
    right = None not in owners and all(len(found) == 1 for found in owners.values())
    found = dataset(lambda file, roots, transform: VQATest(file, roots, transform), listed, {"vqa": root, "vg": root})
    assert isinstance(found, VQATest) == right, found


CAPTION = st.sampled_from(["a dog", " ", "", None, ["a cat", None, " "], [], ["x"], "\u2028", "[x]"]) | TEXT
NO_CAPTION = st.sampled_from([3, True, float("nan"), {"raw": "x"}, [["x"]], ["x", 3], "['a', 'b']", ['["a"]']])


# values, and whether they are captions
ANY_CAPTION = st.integers(0, 9).flatmap(lambda n: st.tuples(NO_CAPTION if n == 4 else CAPTION, st.just(n != 4)))


@examples(120)
@given(rows=st.lists(st.tuples(ANY_ID, ANY_CAPTION), min_size=1, max_size=5), images=st.lists(IDS, max_size=3))
def test_ground_truth_is_what_its_rows_say_or_refused(rows, images):
    content = {"annotations": [{"image_id": number, "caption": caption} for number, (caption, _) in rows]}
    content["images"] = [{"id": number, "domain": "near"} for number in images]
    expected, empty = {}, 0
    wrong = any(normal(number) is None or not right for number, (_, right) in rows)
    for number, (caption, _) in [] if wrong else rows:
        for text in caption if isinstance(caption, list) and caption else [caption or ""]:
            if text and text.strip():
                expected.setdefault(normal(number), []).append(text)
            else:
                empty += 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "truth.json")
        file.write_text(json.dumps(content))
        found = outcome(lambda: read_ground_truth(file))
    if wrong or not expected:
        assert isinstance(found, str) and ("annotation " in found or "every caption is empty" in found), found
    else:
        assert (found.references, found.num_empty) == (expected, empty)
        ids = {normal(number) for number, _ in rows} | set(map(normal, images))
        assert found.num_without == len(ids - expected.keys())


@examples(80)
@given(content=VALUE | st.fixed_dictionaries({"annotations": st.lists(VALUE, max_size=3), "images": VALUE}))
def test_ground_truth_of_anything(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "truth.json")
        file.write_text(json.dumps(content))
        found = outcome(lambda: read_ground_truth(file))
    assert isinstance(found, str) or all(map(all, found.references.values()))


# Shards: a sample is an image, a text or a json of one name, and other files, in any order.

PARTS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.sampled_from([*IMAGES[:4], "JPG", "Png"]),
        "txt": st.sampled_from([b"text {}", b"", b" ", b"\xff\xfe", "\ufefftext {}".encode()]),
        "json": st.sampled_from([b'{"caption": "fact {}"}', b'{"caption": 3}', b"[", b"{}"]),
        "other": st.sampled_from(["foo", "seg.png", "npy", "cls", ""]),
    },
)
JUNK = st.sampled_from(["._{}.jpg", ".DS_Store", "__MACOSX/{}.txt", "__MACOSX/sub/._{}.jpg", ".hidden"])


@st.composite
def shards(draw, count=4):
    """Files (name, content) of a shard, sample by sample, and the captions to be read."""
    files, captions = [], []
    for number in range(draw(st.integers(0, count))):
        parts, own = draw(PARTS), []
        key = draw(st.sampled_from([f"{number:05d}", f"folder/{number}", f"a.b/{number}"]))
        if "image" in parts:
            own.append((f"{key}.{parts['image']}", f"image {number}".encode()))
        for name in ("txt", "json"):
            if name in parts:
                own.append((f"{key}.{name}", parts[name].replace(b"{}", str(number).encode())))
        if "other" in parts:
            own.append((f"{key}.{parts['other']}".rstrip("."), b"other"))
        files += draw(st.permutations(own))
        text = parts.get("txt", b"").decode("utf-8-sig", "replace").replace("{}", str(number))
        readable = "\ufffd" not in text
        if not text and b"fact" in parts.get("json", b""):
            text = f"fact {number}"
        if "image" in parts and readable and text.strip():
            captions.append((f"image {number}", text))
    for place in draw(st.lists(st.integers(0, len(files)), max_size=3)):
        files.insert(place, (draw(JUNK).format(place), b"\0\5junk"))
    return files, captions


def make(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            add(tar, name, content)
    return str(path)


@examples(120)
@given(made=shards())
def test_shards_give_their_samples_and_count_the_others(made):
    files, captions = made
    with tempfile.TemporaryDirectory() as folder:
        shard, dropped = make(Path(folder, "0.tar"), files), Counter()
        found = [(record.image.decode(), record.caption) for record in read_shard(shard, dropped)]
    assert found == captions
    samples = {name.partition("/.")[0] for name, _ in files}  # at least as many names as samples
    assert dropped.total() <= len(samples) and (dropped or len(captions) == len({n for n, _ in captions}))


@examples(80)
@given(made=shards(), order=st.randoms(use_true_random=False))
def test_files_in_any_order_never_join_two_samples(made, order):
    files, captions = made
    order.shuffle(files)
    with tempfile.TemporaryDirectory() as folder:
        found = list(read_shard(make(Path(folder, "0.tar"), files)))
    pairs = dict(captions)
    for record in found:
        number = record.image.decode().removeprefix("image ")
        assert record.caption in (f"text {number}", f"fact {number}")
    assert len(found) <= len(files) and pairs.keys() <= {content.decode("utf-8", "replace") for _, content in files}


@examples(40)
@given(versions=st.lists(st.tuples(shards(), st.integers(1, 10**9)), min_size=2, max_size=4))
def test_a_rewritten_shard_is_counted_again_whatever_its_time(versions):
    with tempfile.TemporaryDirectory() as folder:
        path, before = Path(folder, "0.tar"), set()
        for (files, captions), seconds in versions:
            shard = make(path, files)
            os.utime(path, (seconds, seconds))
            version = path.stat().st_size, seconds
            if version not in before:  # a shard of the same size and time is taken for the same
                assert count_pairs([shard]) == len(captions)
            before = {version}
