"""Dialogues about the miniature world, in the format of VisDial v1.0."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from miniature.scene import COLORS, SHAPES, SIZES, Scene
from miniature.text import ANSWERS, GROUPS, ORDERED, absent_pair, options, third, with_article

NUM_OPTIONS = 10
Round = tuple[str, str, tuple[str, ...]]  # question, right answer, answers to such a question


def dialogue(scene: Scene, rng: random.Random) -> tuple[str, list[Round]]:
    """Return a caption and a dialogue of six rounds.

    "it" is the object of the caption, and from the fourth round on the object asked for there, if it is there.
    """
    shapes = Counter(item.shape for item in scene.items)
    alone = [item for item in scene.items if shapes[item.shape] == 1]
    it = rng.choice(alone or scene.items)  # without a shape of its own, all objects have one shape and other colours
    caption = with_article(it.shape if alone else f"{it.color} object")
    asked = ("what color is it?", it.color, tuple(COLORS)) if alone else ("what shape is it?", it.shape, SHAPES)
    height = ("is it top, center or bottom?", third(it.y, ORDERED[1]), ORDERED[1])
    rounds = [("how many objects are there?", str(len(scene.items)), ORDERED[0]), asked, height]
    others = [item for item in scene.items if item != it]
    present = bool(others) and rng.random() < 0.7
    other = rng.choice(others) if present else None
    pair = other.pair if other else absent_pair(scene, rng)
    rounds.append((f"is there {with_article(' '.join(pair))}?", "yes" if other else "no", GROUPS[0]))
    it = other or it
    rounds.append(("is it large or small?", it.size, tuple(SIZES)))
    rounds.append(("is it left, center or right?", third(it.x, ORDERED[2]), ORDERED[2]))
    return f"{caption} on a {scene.background} background", rounds


def dialogues(
    scenes: Sequence[Scene], images: Sequence[str], ids: Sequence[int], split: str, rng: random.Random
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a file of dialogues, and dense annotations of a round of each.

    Every round has ten options, with all answers to such a question among them; neighbours of the right number or
    place are half right.
    """
    rows, dense, asked = [], [], {}
    for scene, image, image_id in zip(scenes, images, ids, strict=True):
        caption, rounds = dialogue(scene, rng)
        turns, chosen = [], rng.randrange(len(rounds))
        for number, (question, answer, group) in enumerate(rounds):
            listed = options(answer, group, NUM_OPTIONS, rng)
            turns.append({
                "question": asked.setdefault(question, len(asked)),
                "answer": ANSWERS.index(answer),
                "answer_options": [ANSWERS.index(text) for text in listed],
                "gt_index": listed.index(answer),
            })  # fmt: skip
            if number == chosen:
                relevance = [relevant(text, answer, group) for text in listed]
                dense.append({"image_id": image_id, "round_id": number + 1, "gt_relevance": relevance})
        rows.append({"image_id": image_id, "image": image, "caption": caption, "dialog": turns})
    data = {"questions": list(asked), "answers": ANSWERS, "dialogs": rows}
    return {"version": "1.0", "split": split, "data": data}, dense


def relevant(text: str, answer: str, group: Sequence[str]) -> float:
    """Return the relevance of an option."""
    near = group in ORDERED and text in group and abs(group.index(text) - group.index(answer)) == 1
    return 1.0 if text == answer else 0.5 if near else 0.0
