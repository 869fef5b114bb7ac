"""Data that used to give wrong numbers without a word: each kind is read right, or refused before the work begins."""

import json

import pytest
from PIL import Image

from data.coco_flickr import CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.ids import image_id
from data.transforms import test_transform as square
from data.vqa import VQATest, VQATrain, read_answers
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
