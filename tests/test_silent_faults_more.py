"""Further kinds of wrong numbers without a word, found by ourselves: each is computed right, or refused."""

import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_shards import add, pairs

import train_classification
import train_nlvr
from data.classification import class_names, read_folder
from data.coco_flickr import CaptionTrain, RetrievalEval
from data.convert import write_tables
from data.pretrain import open_lists
from data.shards import count_pairs
from data.tars import read_shard
from data.transforms import test_transform as square
from data.vqa import VQATest, VQATrain
from formula import build, img
from inference.ranking import two_stage_scores
from metrics.caption import caption_scores
from metrics.classification import accuracy
from metrics.knowledge import choice_accuracy, direct_accuracy, exact_match
from utils import UserError

SQUARE = square(8)
QUESTION = {"image": "a.jpg", "question": "what?", "question_id": 1}


@pytest.fixture
def root(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def write(folder, content, name="rows.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


# A list of pairs that a broken download ends between two entries read as a whole one.


@pytest.mark.parametrize("end", ["", ",", ",\n "])
def test_a_list_of_pairs_cut_between_entries_is_refused(tmp_path, end):
    rows = [{"image": f"{n}.jpg", "caption": "x"} for n in range(9)]
    cut = json.dumps(rows)[: json.dumps(rows).index(', {"image": "5.jpg"')] + end
    with pytest.raises(UserError, match=r"rows\.json ends after entry 4 without a closing bracket; get it again"):
        open_lists([write(tmp_path, cut)])
    assert len(open_lists([write(tmp_path, "\n".join(map(json.dumps, rows)), "rows.jsonl")])[0]) == 9
    assert len(open_lists([write(tmp_path, json.dumps(rows) + " \n", "whole.json")])[0]) == 9


# Samples of shards that were lost, or whose text was not the one meant.


def make(folder, *files):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in files:
            add(tar, name, content)
    return str(folder / "0.tar")


def test_samples_of_one_name_after_each_other_are_samples_of_their_own(tmp_path):
    """As after a concatenation of archives that hold a sample each: the last one alone was read."""
    files = [(name.replace(name.partition(".")[0], "sample"), content) for name, content in pairs(4)]
    shard = make(tmp_path, *files)
    assert [record.caption for record in read_shard(shard)] == [f"text {n}" for n in range(4)]
    assert count_pairs([shard]) == 4


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_texts_of_shards_in_another_encoding_are_left_out_and_counted(tmp_path, encoding, capsys):
    wrong = [("a.jpg", b"x"), ("a.txt", "caf\u00e9".encode(encoding))]
    shard = make(tmp_path, *pairs(2), *wrong)
    assert [record.caption for record in read_shard(shard)] == ["text 0", "text 1"]
    assert count_pairs([shard]) == 2 and "left out: 1 with a text that is not UTF-8" in capsys.readouterr().err


# Lists that a table, such as pandas writes, holds as texts became words of captions and answers.

LISTED = ["['a dog', 'two dogs']", '["a dog", "two dogs"]', " ['a dog'] "]


@pytest.mark.parametrize("text", LISTED)
def test_lists_written_as_texts_are_refused(root, text):
    said = "entry 0 .*: 'caption' is .*; expected a text, or a list of texts"
    for kind in (CaptionTrain, RetrievalEval):
        with pytest.raises(UserError, match=said):
            kind(write(root, [{"image": "a.jpg", "caption": text}]), root, SQUARE)
    for key in ("answer", "direct_answers"):
        rows = [QUESTION | {key: text}]
        for kind, files in ((VQATrain, [write(root, rows)]), (VQATest, write(root, rows))):
            with pytest.raises(UserError, match="entry 0 .*: 'answer' is .*; expected a text, or a list of texts"):
                kind(files, {"vqa": root, "vg": root}, SQUARE)
    truth = write(root, {"annotations": [{"image_id": 1, "caption": text}]}, "truth.json")
    with pytest.raises(UserError, match="annotation 0 .* has the caption .*; expected a text, or a list of texts"):
        caption_scores([{"image_id": 1, "caption": "a dog"}], truth, java=False)


def test_brackets_in_a_caption_are_read(root):
    rows = [{"image": "a.jpg", "caption": text} for text in ("[a dog]", "a ['dog']", "[]", "['tis] a dog")]
    assert len(CaptionTrain(write(root, rows), root, SQUARE)) == 4


# A-OKVQA's scores.


def test_direct_answers_leave_out_the_questions_that_the_official_score_leaves_out():
    truth = [{"question_id": n, "answer": ["dog"] * 10, "difficult_direct_answer": n > 1} for n in range(4)]
    rows = [{"question_id": n, "answer": "dog" if n < 2 else "cat"} for n in range(4)]
    assert direct_accuracy(rows, truth) == {"overall": 100.0}
    assert direct_accuracy(rows, [{**row, "difficult_direct_answer": False} for row in truth]) == {"overall": 50.0}
    with pytest.raises(UserError, match="difficult_direct_answer"):
        direct_accuracy(rows, truth[2:])


def test_a_single_answer_is_compared_as_a_whole():
    """It was searched letter by letter."""
    rows = [{"question_id": 1, "answer": "a"}]
    assert direct_accuracy(rows, [{"question_id": 1, "answer": "banana"}]) == {"overall": 0.0}
    assert exact_match(rows, [{"question_id": 1, "answer": "banana"}]) == {"overall": 0.0}


@pytest.mark.parametrize("score", [direct_accuracy, exact_match])
def test_ids_of_all_scores_of_answers_are_equal_as_number_and_as_text(score):
    truth = [{"question_id": key, "answer": ["dog"] * 3} for key in (1, "2", 3.0)]
    assert score([{"question_id": key, "answer": "dog"} for key in ("1", 2.0, 3)], truth) == {"overall": 100.0}
    with pytest.raises(UserError, match="two VQA annotations share the question_id 1"):
        score([{"question_id": 1, "answer": "dog"}], [truth[0], {"question_id": "1", "answer": ["cat"]}])


@pytest.mark.parametrize("change", [{"correct_choice_idx": -1}, {"correct_choice_idx": 2}, {"correct_choice_idx": "1"},
                                    {"correct_choice_idx": True}, {"choices": "dog"}, {"choices": []},
                                    {"choices": ["dog", 1]}])  # fmt: skip
def test_choices_that_are_none_are_refused(root, change):
    row = QUESTION | {"choices": ["cat", "dog"], "correct_choice_idx": 1}
    roots = {"vqa": root, "vg": root}
    assert len(VQATest(write(root, [row, row | {"correct_choice_idx": None}]), roots, SQUARE)) == 2
    with pytest.raises(UserError, match=f"entry 0 .*: '{next(iter(change))}' is "):
        VQATest(write(root, [row | change]), roots, SQUARE)
    assert choice_accuracy([{"question_id": 1, "answer": "dog"}], [row]) == {"choice": 100.0}


# Classes of a model that has diverged, and folders that are no class.


@pytest.mark.parametrize("diverged", [False, True])
def test_scores_that_are_not_numbers_have_no_best_class(tmp_path, diverged):
    """A model that has diverged chose the first class each time: half of NLVR2 is then right."""
    scores = torch.tensor([[0.1, 0.9], [float("nan") if diverged else 0.2, 0.3]])
    labels = torch.tensor([1, 0])
    images = dict.fromkeys(("image", "image0", "image1"), torch.zeros(2, 3, 4, 4))
    batch = {**images, "sentence": ["a", "b"], "text": ["", ""], "label": labels}
    run = SimpleNamespace(device=torch.device("cpu"), result=lambda split: tmp_path / f"{split}.json")
    config = SimpleNamespace(zero_shot=False, classes=["x", "y"])

    def model(*_, **__):
        return scores

    calls = [
        lambda: accuracy(scores, labels),
        lambda: train_nlvr.evaluate(model, [batch], "test", run)["acc"],
        lambda: train_classification.evaluate(model, [batch], "test", config, run)["acc"],
    ]
    for call in calls:
        if diverged:
            with pytest.raises(UserError, match="not numbers"):
                call()
        else:
            assert call() == 0.5


def test_a_folder_that_is_no_class_and_images_of_any_ending(tmp_path):
    for name in ("cat/a.jpg", "cat/b.tif", "cat/c.jp2", "dog/a.webp", "dog/notes.txt", ".cache/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert class_names(tmp_path) == ["cat", "dog"]
    assert [label for _, _, label in read_folder(tmp_path, ["cat", "dog"])] == [0, 0, 0, 1]
    with pytest.raises(UserError, match="holds 1 folders that are no class, such as dog; add them to classes"):
        read_folder(tmp_path, ["cat"])


# Publishers' files.


def test_two_question_files_for_one_annotation_file_are_refused(tmp_path):
    asked = {"questions": [{"question_id": 1, "image_id": 1, "question": "what?"}]}
    given = {"annotations": [{"question_id": 1, "answers": [{"answer": "dog"}]}]}
    paths = [write(tmp_path, asked, "a.json"), write(tmp_path, asked, "b.json"), write(tmp_path, given, "c.json")]
    with pytest.raises(UserError, match="cannot convert"):
        write_tables(paths, tmp_path / "out")
    assert len(write_tables(paths[1:], tmp_path / "out")) == 1


# Clips that cannot be read took places among the k_test candidates.


def test_what_is_left_out_takes_no_place_among_the_candidates():
    model = build("retrieval")
    images, texts = img("left out", 5), [f"a {color} ring" for color in ("red", "green", "blue", "pink", "cyan")]
    kept = [0, 1, 3, 4]

    def encode(batch):
        states = model.visual_encoder(batch["image"])
        return states, model.image_feat(states)

    def scores(which, left_out=lambda: ([], [])):
        batches = [{"image": images[which]}]
        return two_stage_scores(model, encode, batches, [texts[i] for i in which], 2, 4, left_out=left_out)

    whole, without = scores(list(range(5)), lambda: ([2], [2])), scores(kept)
    for found, expected in ((whole.i2t, without.i2t), (whole.t2i, without.t2i)):
        np.testing.assert_allclose(found[np.ix_(kept, kept)], expected, rtol=1e-4, atol=1e-4)
        assert ((expected > -100).sum(axis=1) == 2).all()
