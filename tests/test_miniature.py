"""The miniature world: what its files promise, checked against the scenes that were drawn."""

import json
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.text import exchange_left_right
from miniature import text as miniature_text
from miniature import writing as miniature
from miniature.__main__ import main
from miniature.scene import COLORS, SHAPES, SIZES, Item, Scene, draw_scene, render, seen_pairs, unseen_pairs
from models.tokenizer import init_tokenizer
from utils import UserError, run_command

VOCAB = Path(miniature.__file__).resolve().parent.parent / "configs" / "miniature" / "vocab.txt"
COUNTS = {"num_train": 120, "num_val": 30, "num_test": 200, "num_web": 200}
DIRECTIONS = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}
STATEMENT = re.compile(
    r"(?P<side>left|right) image (contains an? (?P<color>\w+) (?P<shape>\w+)|contains a (?P<only>\w+)"
    r"|has exactly (?P<number>\d) objects?|(?P<more>has more objects than the other one))$"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature.write_miniature(tmp_path_factory.mktemp("world"), level=4, seed=3, num_videos=2, **COUNTS)


@pytest.fixture(scope="module")
def scenes(world: Path) -> dict[str, dict[str, Any]]:
    return json.loads((world / "scenes.json").read_text())


def annotation(world: Path, name: str) -> Any:
    return json.loads((world / "annotations" / name).read_text())


def pairs(scene: dict[str, Any]) -> list[tuple[str, str]]:
    return [(item["color"], item["shape"]) for item in scene["items"]]


def majority(row: dict[str, Any]) -> str:
    return Counter(row["answer"]).most_common(1)[0][0]


def every_text(world: Path) -> set[str]:
    """Return all values of the annotation files that a model reads."""
    texts: set[str] = set()
    for file in (world / "annotations").iterdir():
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        found = [json.loads(line) for line in lines]
        while found:
            value = found.pop()
            if isinstance(value, list):
                texts |= {entry for entry in value if isinstance(entry, str) and "/" not in entry}
                found += [entry for entry in value if not isinstance(entry, str)]
            elif isinstance(value, dict):
                texts |= {value[key] for key in ("caption", "question", "sentence") if isinstance(value.get(key), str)}
                found += [entry for entry in value.values() if isinstance(entry, list | dict)]
    return texts


# Images.


def test_same_arguments_give_the_same_bytes_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    again = miniature.write_miniature(tmp_path / "again", level=4, seed=3, **COUNTS)
    files = [file.relative_to(again) for file in again.rglob("*") if file.is_file()]
    assert len(files) > sum(COUNTS.values())
    assert [str(file) for file in files if (again / file).read_bytes() != (world / file).read_bytes()] == []
    other = miniature.write_miniature(tmp_path / "other", level=4, seed=4, **COUNTS)
    assert (other / "scenes.json").read_text() != (again / "scenes.json").read_text()


def test_every_image_has_the_size_asked_for_and_an_id_of_its_own(world: Path, scenes: dict, tmp_path: Path) -> None:
    assert {Image.open(world / name).size for name in scenes} == {(64, 64)}
    assert len({int(Path(name).stem) for name in scenes}) == len(scenes) == sum(COUNTS.values())
    assert Counter(Path(name).parent.name for name in scenes) == {"train": 120, "val": 30, "test": 200, "web": 200}
    small = miniature.write_miniature(tmp_path, 1, num_train=2, num_val=0, num_test=0, num_web=0, image_size=48)
    assert Image.open(small / "images/train/0000001.jpg").size == (48, 48)


@pytest.mark.parametrize(("level", "counts"), [(1, {1}), (2, {1, 2}), (3, {1, 2, 3}), (4, {1, 2, 3})])
def test_levels_set_the_number_of_objects_and_the_ground(level: int, counts: set[int]) -> None:
    rng = random.Random(level)
    drawn = [draw_scene(rng, level) for _ in range(60)]
    assert {len(scene.items) for scene in drawn} == counts
    assert len({scene.background for scene in drawn}) == (4 if level == 4 else 1)


def test_objects_do_not_overlap_and_stay_inside(scenes: dict) -> None:
    for scene in scenes.values():
        for item in scene["items"]:
            half = SIZES[item["size"]] / 2
            assert all(half - 1e-3 <= item[axis] <= 1 - half + 1e-3 for axis in "xy")
        for a, b in combinations(scene["items"], 2):
            reach = (SIZES[a["size"]] + SIZES[b["size"]]) / 2
            assert max(abs(a["x"] - b["x"]), abs(a["y"] - b["y"])) >= reach - 1e-9


@pytest.mark.parametrize("color", COLORS)
def test_an_object_shows_its_colour_at_its_place_only(color: str) -> None:
    item = Item(color, "square", "small", 0.25, 0.7)
    image = np.asarray(render(Scene((item,), "plain", (128, 128)))).astype(int)
    is_color = np.abs(image - COLORS[color]).max(axis=2) < 8
    rows, columns = np.nonzero(is_color)
    assert abs(columns.mean() / 64 - 0.25) < 0.02 and abs(rows.mean() / 64 - 0.7) < 0.02
    assert 18 <= np.ptp(rows) <= 24 and 18 <= np.ptp(columns) <= 24
    assert (image[~is_color][:, 0] == 128).mean() > 0.95


def test_shapes_differ_by_many_pixels_also_when_small() -> None:
    masks = {}
    for shape in SHAPES:
        scene = Scene((Item("red", shape, "small", 0.5, 0.5),), "plain", (128, 128))
        image = np.asarray(render(scene)).astype(int)
        masks[shape] = np.abs(image - 128).max(axis=2) > 43
    for a, b in combinations(SHAPES, 2):
        differing = (masks[a] ^ masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert differing > 0.14, (a, b)


# Pairs kept for testing.


def test_kept_pairs_cover_every_shape_and_colour_once() -> None:
    assert sorted(color for color, _ in unseen_pairs()) == sorted(COLORS)
    assert sorted(shape for _, shape in unseen_pairs()) == sorted(SHAPES)
    assert len(seen_pairs()) == 56


def test_only_test_images_show_kept_pairs(scenes: dict) -> None:
    shown = Counter(Path(name).parent.name for name, scene in scenes.items() if unseen_pairs() & set(pairs(scene)))
    assert set(shown) == {"test"} and 0.05 * 200 < shown["test"] < 0.2 * 200


def test_no_annotation_of_train_or_val_names_a_kept_pair(world: Path) -> None:
    for name in ("coco_karpathy_train", "coco_karpathy_val", "vqa_train", "vqa_val", "vg_qa", "nlvr_train", "nlvr_dev"):
        for row in annotation(world, f"{name}.json"):
            named = miniature_text.named_pairs(json.dumps(row))
            assert not unseen_pairs() & set(named), row


# Captions.


def test_every_caption_names_exactly_its_objects(world: Path, scenes: dict) -> None:
    for prefix in ("coco_karpathy", "flickr30k"):
        for row in annotation(world, f"{prefix}_test.json"):
            assert len(row["caption"]) == 5
            for caption in row["caption"]:
                assert miniature_text.caption_is_exact(caption, pairs(scenes[row["image"]])), caption
                assert caption == caption.lower() and len(caption.split()) <= 25
    train = annotation(world, "coco_karpathy_train.json")
    assert Counter(row["image_id"] for row in train) == {f"coco_karpathy_{i}": 5 for i in range(1, 121)}
    assert [(row["image"], row["caption"]) for row in train] == [
        (row["image"], row["caption"]) for row in annotation(world, "pretrain_human.json")
    ]


def test_sizes_and_relations_in_captions_are_true(world: Path, scenes: dict) -> None:
    said = 0
    for row in annotation(world, "flickr30k_test.json"):
        items = {f"{item['color']} {item['shape']}": item for item in scenes[row["image"]]["items"]}
        for caption in row["caption"]:
            sizes = re.findall(r"(small|large) (\w+ \w+)", caption)
            assert len(sizes) == len(items) and all(items[name]["size"] == size for size, name in sizes)
            found = re.match(r"an? \w+ (\w+ \w+) (left of|right of|above|below) an? \w+ (\w+ \w+)", caption)
            if found:
                a, b, said = items[found[1]], items[found[3]], said + 1
                axis, sign = DIRECTIONS[found[2]]
                assert sign * (b[axis] - a[axis]) > 0, caption
    assert said > 100


@pytest.mark.parametrize(
    ("caption", "exact"),
    [
        ("a small red circle left of a blue star", True),
        ("a blue star and a red circle on a striped background", True),
        ("a red circle", False),
        ("a red star and a blue circle", False),
        ("a red circle, a blue star and a blue star", False),
        ("a red circle, a blue star and a green ring", False),
        ("", False),
    ],
)
def test_exact_captions_name_the_right_pairs_and_no_others(caption: str, exact: bool) -> None:
    assert miniature_text.caption_is_exact(caption, [("red", "circle"), ("blue", "star")]) is exact


@pytest.mark.parametrize("level", [1, 4])
def test_retrieval_captions_tell_all_test_images_apart(level: int, tmp_path: Path) -> None:
    counts = {"num_train": 1, "num_val": 1, "num_web": 0, "num_test": 500, "image_size": 16}
    folder = miniature.write_miniature(tmp_path, level, **counts)
    rows = annotation(folder, "flickr30k_test.json")
    owners = Counter(caption for row in rows for caption in set(row["caption"]))
    assert len(rows) == 500 and max(owners.values()) == 1


def test_ground_truth_matches_its_images(world: Path) -> None:
    for split in ("val", "test"):
        truth = annotation(world, f"coco_karpathy_{split}_gt.json")
        listed: dict[int, list[str]] = {image["id"]: [] for image in truth["images"]}
        for row in truth["annotations"]:
            listed[row["image_id"]].append(row["caption"])
        rows = annotation(world, f"coco_karpathy_{split}.json")
        assert listed == {int(Path(row["image"]).stem): row["caption"] for row in rows}
        assert len({row["id"] for row in truth["annotations"]}) == len(truth["annotations"])


def test_nocaps_domains_follow_the_kept_pairs(world: Path, scenes: dict) -> None:
    for split in ("val", "test"):
        rows = {row["img_id"]: row["image"] for row in annotation(world, f"nocaps_{split}.json")}
        truth = annotation(world, f"nocaps_{split}_gt.json")
        assert {image["id"] for image in truth["images"]} == set(rows)
        for image in truth["images"]:
            unseen = bool(unseen_pairs() & set(pairs(scenes[rows[image["id"]]])))
            assert image["domain"] == ("out-domain" if unseen else "in-domain")
        assert len({image["domain"] for image in truth["images"]}) == 2


# Questions.


def answer(question: str, items: list[dict[str, Any]]) -> str | None:
    """Answer the questions that a scene decides without looking at relations."""
    if question == "how many objects are there?":
        return str(len(items))
    if found := re.match(r"what color is the (\w+)\?", question):
        (item,) = [item for item in items if item["shape"] == found[1]]
        return item["color"]
    if found := re.match(r"what shape is the (\w+) object\?", question):
        (item,) = [item for item in items if item["color"] == found[1]]
        return item["shape"]
    if found := re.match(r"is the (\w+) (\w+) large or small\?", question):
        (item,) = [item for item in items if (item["color"], item["shape"]) == found.groups()]
        return item["size"]
    if found := re.match(r"is there an? (\w+) (\w+)\?", question):
        return "yes" if found.groups() in [(item["color"], item["shape"]) for item in items] else "no"
    return None


def test_most_people_give_the_right_answer(world: Path, scenes: dict) -> None:
    checked, known = 0, set(annotation(world, "answer_list.json"))
    rows = [row for split in ("train", "val", "test") for row in annotation(world, f"vqa_{split}.json")]
    assert len({row["question_id"] for row in rows}) == len(rows)
    for row in rows:
        assert len(row["answer"]) == 10 and set(row["answer"]) <= known
        assert Counter(row["answer"]).most_common(1)[0][1] >= 7
        right = answer(row["question"], scenes[row["image"]]["items"])
        assert right is None or majority(row) == right, row
        checked += right is not None
    assert checked > 0.6 * len(rows)
    assert 0.2 < sum(len(set(row["answer"])) > 1 for row in rows) / len(rows) < 0.9


def test_visual_genome_answers_are_single_and_right(world: Path, scenes: dict) -> None:
    rows = annotation(world, "vg_qa.json")
    assert rows and {row["dataset"] for row in rows} == {"vg"}
    assert all(answer(row["question"], scenes[row["image"]]["items"]) in (row["answer"], None) for row in rows)


def test_relations_asked_about_are_answered_truly() -> None:
    rng, answers = random.Random(0), Counter()
    for _ in range(300):
        scene = draw_scene(rng, 4)
        items = {miniature_text.name(item): item for item in scene.items}
        for question in miniature_text.questions(scene, rng, 99):
            if found := re.match(r"is the (\w+ \w+) (left of|right of|above|below) the (\w+ \w+)\?", question.text):
                truth = miniature_text.relation(items[found[1]], items[found[3]]) == found[2]
                assert question.answer == ("yes" if truth else "no")
                answers[question.answer] += 1
            if found := re.match(r"what is (left of|right of|above|below) the (\w+ \w+)\?", question.text):
                assert miniature_text.relation(items[question.answer], items[found[2]]) == found[1]
    assert 0.35 < answers["yes"] / answers.total() < 0.65


def test_words_of_a_question_do_not_give_yes_or_no_away() -> None:
    rng, answers = random.Random(1), Counter()
    for _ in range(600):
        for question in miniature_text.questions(draw_scene(rng, 4), rng, 99):
            if found := re.match(r"is there (an?) (\w+)", question.text):
                answers[found[1], found[2] == "orange", question.answer] += 1
    assert {(article, orange) for article, orange, _ in answers} == {("a", False), ("an", True)}
    for article, orange in (("a", False), ("an", True)):
        yes, no = (answers[article, orange, said] for said in ("yes", "no"))
        assert 0.35 < yes / (yes + no) < 0.65


# Statements.


def test_labels_are_balanced_and_true(world: Path, scenes: dict) -> None:
    checked = 0
    for split in ("train", "dev", "test"):
        rows = annotation(world, f"nlvr_{split}.json")
        assert Counter(row["label"] for row in rows) == {"True": len(rows) / 2, "False": len(rows) / 2}
        assert all(len(set(row["images"])) == 2 for row in rows)
        for row in rows:
            images = [scenes[name]["items"] for name in row["images"]]
            if found := STATEMENT.match(row["sentence"].removeprefix("the ")):
                assert row["label"] == str(holds(found, *images)), row
                # images and words exchanged, the statement says the same
                swapped = STATEMENT.match(exchange_left_right(row["sentence"]).removeprefix("the "))
                assert row["label"] == str(holds(swapped, *images[::-1])), row
                checked += 1
    assert checked > 150


def holds(found: re.Match[str], left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    """Judge a statement about one side."""
    items, others = (left, right) if found["side"] == "left" else (right, left)
    if found["number"]:
        return len(items) == int(found["number"])
    if found["more"]:
        return len(items) > len(others)
    if found["only"]:
        return found["only"] in [item["shape"] for item in items]
    return (found["color"], found["shape"]) in [(item["color"], item["shape"]) for item in items]


def test_statements_of_an_evaluation_are_judged_for_four_different_pairs(world: Path) -> None:
    for split in ("dev", "test"):
        rows = annotation(world, f"nlvr_{split}.json")
        assert set(Counter(row["sentence"] for row in rows).values()) == {4}
        assert len({(row["sentence"], *row["images"]) for row in rows}) == len(rows)


def test_one_image_is_too_few_for_statements_but_enough_for_a_world(tmp_path: Path) -> None:
    folder = miniature.write_miniature(tmp_path, num_train=1, num_val=1, num_test=1, num_web=1)
    assert annotation(folder, "nlvr_dev.json") == []


# Web texts.


def test_web_texts_are_right_noisy_or_of_another_image(world: Path, scenes: dict) -> None:
    rows, truth = annotation(world, "pretrain_web.json"), annotation(world, "pretrain_web_truth.json")
    assert [row["image"] for row in rows] == [row["image"] for row in truth]
    for row, fact in zip(rows, truth, strict=True):
        exact = miniature_text.caption_is_exact(row["caption"], pairs(scenes[row["image"]]))
        assert fact["matches"] is exact
        assert fact["kind"] == "other" or fact["matches"] is (fact["kind"] == "right")
    kinds = Counter(fact["kind"] for fact in truth)
    assert 85 <= kinds["right"] <= 135 and 30 <= kinds["noisy"] <= 70 and 20 <= kinds["other"] <= 60


# Vocabulary.


def test_the_vocabulary_file_is_this_worlds() -> None:
    assert VOCAB.read_text().splitlines() == miniature.vocabulary()
    assert miniature.vocabulary()[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(miniature.vocabulary())) == len(miniature.vocabulary()) <= 400


def test_no_text_of_the_world_holds_an_unknown_word(world: Path) -> None:
    tokenizer = init_tokenizer(VOCAB)
    texts = sorted(every_text(world)) + ["a picture of "]
    assert len(texts) > 1000
    for text in texts:
        tokens = tokenizer.tokenize(text)
        assert "[UNK]" not in tokens, text
        # words are whole; only numbers are spelled out
        assert all(token[2:].isdigit() for token in tokens if token.startswith("##")), text


# Clips.


def test_clips_move_as_their_captions_say(world: Path) -> None:
    av = pytest.importorskip("av")
    lines = [json.loads(line) for line in (world / "annotations/msrvtt_test.jsonl").read_text().splitlines()]
    assert len({line["caption"] for line in lines}) == len(lines) == 2
    for line in lines:
        with av.open(str(world / "videos" / f"{line['clip_name']}.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        assert len(frames) == 16 and frames[0].shape == (64, 64, 3)
        found = re.findall(r"(\w+) \w+ moving (left|right|up|down)", line["caption"])
        assert found
        for color, move in found:
            if sum(color == other for other, _ in found) == 1:
                (x0, y0), (x1, y1) = (centre(frame, color) for frame in (frames[0], frames[-1]))
                moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
                assert max(moved, key=moved.get) == move and moved[move] > 3, (line, moved)


def centre(frame: np.ndarray, color: str) -> tuple[float, float]:
    """Return the mean place, in pixels, of what is nearest to a colour among all colours and greys."""
    names = list(COLORS)
    grey = frame.mean(axis=2, keepdims=True).repeat(3, axis=2)
    distance = [np.abs(frame - COLORS[name]).sum(axis=2) for name in names] + [np.abs(frame - grey).sum(axis=2)]
    rows, columns = np.nonzero(np.argmin(distance, axis=0) == names.index(color))
    return columns.mean(), rows.mean()


# Mistakes of people.


def test_bad_arguments_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(UserError, match="level is 9; expected one of 1, 2, 3, 4"):
        miniature.write_miniature(tmp_path, level=9)
    with pytest.raises(UserError, match="fewer than 5000 different test scenes"):
        miniature.write_miniature(tmp_path, level=1, num_train=0, num_val=0, num_web=0, num_test=5000)
    monkeypatch.setattr("sys.argv", ["miniature", "--output", str(tmp_path), "--level", "0"])
    assert run_command(main) == 2
    assert capsys.readouterr().err.strip() == "error: level is 0; expected one of 1, 2, 3, 4"
