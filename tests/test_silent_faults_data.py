"""Data that used to give wrong numbers without a word: each kind is read right, or refused before the work begins."""

import json
import os

import pytest
from PIL import Image

from data.coco_flickr import CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.ids import image_id
from data.pretrain import PairDataset, index_folder
from data.publishers import convert
from data.transforms import test_transform as square
from data.vqa import VQATest, VQATrain, read_answers
from models.tokenizer import init_tokenizer, tokenize
from utils import UserError, id_text

SQUARE = square(8)


@pytest.fixture
def root(tmp_path):
    for name in ("a.jpg", "b.jpg", "007.jpg", "COCO_val2014_000000000007.jpg", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def captions(*rows):
    """Rows of (image, image_id), or (image,)."""
    keys = ("image", "image_id")
    return [{"caption": f"text {n}", **dict(zip(keys, row, strict=False))} for n, row in enumerate(rows)]


# A1. Identifiers.

KINDS = {"captioning": CaptionTrain, "retrieval": RetrievalTrain, "evaluation": CaptionEval}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows, said",
    [
        ([("a.jpg", None), ("b.jpg", None)], r"entry 0 .*'image_id' is None; expected a whole number or a text"),
        ([("a.jpg", 5), ("b.jpg", 5)], r"entries 0 and 1 .*the id 5 belongs to two images, a\.jpg and b\.jpg"),
        ([("a.jpg", 1), ("a.jpg", 1), ("b.jpg", "1")], "entries 0 and 2 .*the id 1 belongs to two images"),
        ([("a.jpg", 1), ("b.jpg", 1.0)], "entries 0 and 1 .*the id 1 belongs to two images"),
        ([("a.jpg", 0), ("b.jpg", 1), ("a.jpg", 2)], r"entries 0 and 2 .*the ids 0 and 2 belong to one image, a\.jpg"),
        ([("a.jpg", 0.5), ("b.jpg", 1)], "entry 0 .*'image_id' is 0.5"),
        ([("a.jpg", True), ("b.jpg", 1)], "entry 0 .*'image_id' is True"),
        ([("a.jpg", float("nan")), ("b.jpg", 1)], "entry 0 .*'image_id' is nan"),
        ([("a.jpg", [1]), ("b.jpg", 1)], r"entry 0 .*'image_id' is \[1\]"),
        ([("a.jpg", ""), ("b.jpg", 1)], "entry 0 .*'image_id' is ''"),
    ],
)
def test_a1_image_ids_that_collide_are_refused_with_both_rows(root, kind, rows, said):
    with pytest.raises(UserError, match=said):
        KINDS[kind](write(root, captions(*rows)), root, SQUARE)


def test_a1_ids_are_equal_as_number_and_as_text(root):
    rows = captions(("a.jpg", 1), ("b.jpg", "2"), ("a.jpg", "1"), ("a.jpg", 1.0))
    pairs = RetrievalTrain(write(root, rows), root, SQUARE)
    assert [pairs[i]["idx"] for i in range(4)] == [0, 1, 0, 0]
    assert [id_text(value) for value in (1, 1.0, "1", -0.0, 10**30, "01")] == ["1", "1", "1", "0", "1" + "0" * 30, "01"]


def test_a1_an_image_without_id_is_its_own_and_may_be_spelled_in_two_ways(root):
    rows = captions(("a.jpg",), ("b.jpg",), ("./a.jpg",), ("sub//a.jpg",), ("sub/a.jpg",))
    pairs = RetrievalTrain(write(root, rows), root, SQUARE)
    assert [pairs[i]["idx"] for i in range(5)] == [0, 1, 0, 2, 2]
    collection = RetrievalEval(write(root, rows), root, SQUARE)
    assert collection.text == [f"text {n}" for n in (0, 2, 1, 3, 4)]
    assert collection.img2txt == {0: [0, 1], 1: [2], 2: [3, 4]}
    assert len(CaptionEval(write(root, [{**row, "image_id": i} for row, i in zip(rows, "abacc")]), root, SQUARE)) == 3


@pytest.mark.parametrize(
    "image, expected",
    [
        ("007.jpg", "007"),
        ("7.jpg", 7),
        ("0.jpg", 0),
        ("x/COCO_val2014_000000000007.jpg", 7),
        ("000000000007.jpg", 7),
        ("0000000007.jpg", "0000000007"),
        ("\u0661.jpg", "\u0661"),
    ],
)
def test_a1_only_coco_numbers_lose_their_zeros(image, expected):
    assert image_id({"image": image}) == expected


def test_a1_question_ids_numbered_anew_for_each_image_are_refused(root):
    asked = [(image, n) for image in ("a.jpg", "b.jpg") for n in (0, 1)]
    rows = [{"image": image, "question": f"what {n}?", "question_id": n} for image, n in asked]
    roots = {"vqa": root, "vg": root}
    with pytest.raises(UserError, match=r"entries 0 and 2 .*the id 0 belongs to two questions, what 0\? \(a\.jpg\)"):
        VQATest(write(root, rows), roots, SQUARE)
    rows[2]["question_id"], rows[3]["question_id"] = 2, "3"
    assert len(VQATest(write(root, [*rows, rows[0]]), roots, SQUARE)) == 5  # a row may be listed twice
    with pytest.raises(UserError, match="entry 1 .*'question_id' is None"):
        VQATest(write(root, [rows[0], {**rows[1], "question_id": None}]), roots, SQUARE)


# A2. Captions and answers that are none.


@pytest.mark.parametrize("kind", [CaptionTrain, RetrievalTrain, RetrievalEval])
def test_a2_empty_captions_are_left_out_and_counted(root, kind, capsys):
    rows = [
        {"image": "a.jpg", "caption": ["one", None, "", " \n", "?!."[2:]]},
        {"image": "b.jpg", "caption": None},
        {"image": "b.jpg", "caption": []},
        {"image": "007.jpg", "caption": "two"},
    ]
    dataset = kind(write(root, rows), root, SQUARE)
    assert len(dataset) == 2
    assert "6 empty captions are left out, and 2 entries without any other" in capsys.readouterr().err
    with pytest.raises(UserError, match="every caption is empty"):
        kind(write(root, rows[1:3]), root, SQUARE)


@pytest.mark.parametrize("kind", [CaptionTrain, RetrievalTrain, RetrievalEval])
@pytest.mark.parametrize("caption", [3, False, float("nan"), {"raw": "x"}, [["x"]], ["x", 1]])
def test_a2_captions_that_are_no_texts_are_refused(root, kind, caption):
    rows = [{"image": "a.jpg", "caption": "x"}, {"image": "b.jpg", "caption": caption}]
    with pytest.raises(UserError, match="entry 1 .*'caption' is .*; expected a text, or a list of texts"):
        kind(write(root, rows), root, SQUARE)


def test_a2_answers_that_are_none(root, capsys):
    roots = {"vqa": root, "vg": root}
    row = {"image": "a.jpg", "question": "what?", "question_id": 1}
    for value in (None, [], 3, [None], [3], {"answer": "x"}, ["x", None]):
        with pytest.raises(UserError, match="entry 0 .*'answer' is .*; expected a text"):
            VQATest(write(root, [{**row, "answer": value}]), roots, SQUARE)
        with pytest.raises(UserError, match="entry 0 .*'answer' is .*; expected a text"):
            VQATrain([write(root, [{**row, "answer": value}])], roots, SQUARE)
    rows = [{**row, "answer": ["", "dog", "dog", " "]}, {**row, "question_id": 2, "answer": [" "]}]
    train = VQATrain([write(root, rows)], roots, SQUARE)
    assert (len(train), train[0]["answers"], train[0]["weights"]) == (1, ["dog"], [1.0])
    assert "1 questions with empty answers only are left out" in capsys.readouterr().err
    VQATest(write(root, [{**row, "answer": "dog"}, {**row, "question_id": 2}]), roots, SQUARE)
    assert "1 of 2 questions have no answer to score" in capsys.readouterr().err
    assert read_answers(write(root, ["yes", "", "no", "yes"])) == ["yes", "no"]
    assert "2 empty or repeated answers are left out" in capsys.readouterr().err


def test_a6_answers_as_the_publishers_write_them(root):
    answers = [{"answer": text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(["dog", "cat"])]
    row = {"image": "a.jpg", "question": "what?", "question_id": 1, "answers": answers}
    roots = {"vqa": root, "vg": root}
    assert VQATrain([write(root, [row])], roots, SQUARE)[0]["answers"] == ["dog", "cat"]
    assert VQATest(write(root, [row]), roots, SQUARE).annotation[0]["answer"] == ["dog", "cat"]
    with pytest.raises(UserError, match=r"'answer' is \[None\]"):
        VQATrain([write(root, [{**row, "answers": [{"text": "dog"}]}])], roots, SQUARE)


# A8. Pairs for pretraining, and long texts.


def test_a8_several_captions_empty_ones_and_a_byte_order_mark(root, capsys):
    rows = [{"image": "a.jpg", "caption": ["one", None, " "]}, {"image": "b.jpg", "caption": ["two", "three"]},
            {"image": "b.jpg", "caption": None}, {"image": "b.jpg", "caption": []}]  # fmt: skip
    for name, text in (("a.json", json.dumps(rows)), ("a.jsonl", "\n".join(map(json.dumps, rows)))):
        (root / name).write_text(text, encoding="utf-8-sig")
        pairs = PairDataset([root / name], str(root), SQUARE)
        assert [pairs[i]["caption"] for i in range(len(pairs))] == ["one", "two", "three"]
        assert "4 empty captions are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match="entry 0: .*expected texts"):
        PairDataset([write(root, [{"image": "a.jpg", "caption": ["x", 3]}])], str(root), SQUARE)


def test_an_index_belongs_to_its_list_even_if_size_and_time_are_equal(root):
    found = []
    for text in ("one", "two"):
        path = write(root, [{"image": "a.jpg", "caption": text}])
        os.utime(path, (0, 0))  # as on a mount that keeps no times
        found.append((PairDataset([path], str(root), SQUARE)[0]["caption"], index_folder(root / "rows.json").name))
    assert [caption for caption, _ in found] == ["one", "two"] and found[0][1] != found[1][1]


@pytest.mark.parametrize("first", ["cls", "enc", "dec"])
def test_a8_texts_longer_than_the_position_table_are_cut(first):
    batch = tokenize(init_tokenizer(), ["yes", "x" * 90 + "ab " * 900], first)
    assert batch.input_ids.shape == (2, 512)


# E. Publishers' files.

COCO = {
    "images": [{"id": 7, "file_name": "a.jpg", "coco_url": "http://x.org/val2014/a.jpg"}],
    "annotations": [{"image_id": 7, "id": n, "caption": text} for n, text in enumerate(["One.", "two "])],
}
KARPATHY = {"dataset": "coco", "images": [
    {"filepath": "val2014", "filename": f"{split}.jpg", "split": split, "cocoid": n, "sentences": [{"raw": split}]}
    for n, split in enumerate(["train", "restval", "val", "test"])]}  # fmt: skip
ASKED = {"data_subtype": "val2014", "questions": [{"image_id": 7, "question": "what?", "question_id": 70}]}
ANSWERED = {"annotations": [{"question_id": 70, "image_id": 7, "answer_type": "other", "question_type": "what",
                             "answers": [{"answer": "dog", "answer_id": n} for n in range(10)]}]}  # fmt: skip
STATEMENT = {"identifier": "train-1-0-2", "sentence": "x", "label": "True", "directory": 26}


def test_e_publishers_files_are_converted():
    assert convert([COCO])[1][""] == [{"image": "val2014/a.jpg", "image_id": 7, "caption": ["One.", "two"]}]
    tables = convert([KARPATHY])[1]
    assert [row["image"] for row in tables["coco_karpathy_train"]] == ["val2014/train.jpg", "val2014/restval.jpg"]
    assert tables["coco_karpathy_val_gt"]["annotations"] == [{"id": 0, "image_id": 2, "caption": "val"}]
    for contents in ([ASKED, ANSWERED], [ANSWERED, ASKED]):
        (row,) = convert(contents)[1][""]
        assert row["image"] == "val2014/COCO_val2014_000000000007.jpg" and row["answer"] == ["dog"] * 10
    assert convert([ASKED], prefix="images/{:05d}.png")[1][""][0]["image"] == "images/00007.png"
    with pytest.raises(UserError, match="the images' prefix is '{x}'; expected a folder, or of VQA v2 names such as"):
        convert([ASKED], prefix="{x}")
    assert "answer" not in convert([ASKED])[1][""][0]
    (row,) = convert([[STATEMENT]])[1][""]
    assert row["images"] == [f"images/train/26/train-1-0-img{side}.png" for side in (0, 1)]
    tokens = "1.jpg#0\tA dog .\n1.jpg#1\tOne dog .\n2.jpg#0\tA cat ."
    rows = convert([tokens], prefix="")[1][""]
    assert rows == [{"image": "1.jpg", "caption": ["A dog .", "One dog ."]}, {"image": "2.jpg", "caption": ["A cat ."]}]
    with pytest.raises(UserError, match="cannot convert VQA v2's annotation file; expected one of"):
        convert([ANSWERED])
    with pytest.raises(UserError, match="not as published"):
        convert([{**COCO, "annotations": [{"caption": "x"}]}])


@pytest.mark.parametrize("content", [COCO, KARPATHY, ASKED, ANSWERED, [STATEMENT]])
def test_e_publishers_files_are_named_with_their_remedy(root, content):
    with pytest.raises(UserError, match=r"rows\.json is .*; convert it with python -m data\.convert"):
        CaptionTrain(write(root, content), root, SQUARE)
