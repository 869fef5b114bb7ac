"""Texts of the miniature world: captions, questions with answers, statements about two images, web texts."""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, digits
from typing import Any

from miniature.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Item, Pair, Scene, unseen_pairs

NUMBERS = ("no", "one", "two", "three")
SYNONYMS = {"red": "crimson", "green": "emerald", "blue": "navy", "yellow": "gold", "purple": "violet",
            "orange": "amber", "cyan": "turquoise", "pink": "rose", "circle": "disk", "square": "box",
            "triangle": "wedge", "star": "asterisk", "heart": "love", "cross": "plus", "diamond": "gem",
            "ring": "donut", "large": "big", "small": "little", "yes": "maybe", "no": "maybe"}  # fmt: skip
CLUTTER = ("buy now", "free shipping", "best price", "new in stock", "click here", "photo", "image for sale",
           "wallpaper download", "stock vector", "top ten")  # fmt: skip
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUM_ANSWERS = 10


# Captions.


def name(item: Item) -> str:
    """Return an object's name: "red circle"."""
    return f"{item.color} {item.shape}"


def a(item: Item, sized: bool) -> str:
    """Return an object's name with its article, and with its size if `sized`: "a large red circle"."""
    return with_article(f"{item.size} {name(item)}" if sized else name(item))


def with_article(words: str) -> str:
    """Return words after "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def relation(first: Item, second: Item) -> str:
    """Return the first object's position relative to the second, along the axis of the larger offset."""
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def third(share: float, names: Sequence[str]) -> str:
    """Return the one of three names for a place in the image, from 0 to 1."""
    return names[0] if share < 0.4 else names[2] if share > 0.6 else names[1]


def position(item: Item) -> str:
    """Return the part of the image that an object is in: "top left", "center", ..."""
    down, across = third(item.y, ("top", "", "bottom")), third(item.x, ("left", "", "right"))
    return f"{down} {across}".strip() or "center"


def captions(scene: Scene, rng: random.Random, sized: bool = False) -> list[str]:
    """Return five captions of a scene; each names every object once, and some sizes.

    `sized` names all sizes, and the position of a single object, so that captions identify their image.
    """
    items, sizes = scene.items, [sized or rng.random() < 0.5 for _ in range(4)]
    if len(items) == 1:
        item, place = items[0], f" at the {position(items[0])}"
        also = place if sized else ""
        return [
            a(item, sizes[0]) + also,
            a(item, sizes[1]) + place,
            f"one {item.size} {name(item)}{also}",
            f"{a(item, sizes[2])}{also} on a {scene.background} background",
            f"{a(item, sizes[3])} alone{also}",
        ]
    listed = [", ".join(a(item, size) for item in items[:-1]) + f" and {a(items[-1], size)}" for size in sizes]
    first, second, rest = items[0], items[1], list(items[2:])
    also = "".join(f" and {a(item, sizes[0])} {relation(item, second)} it" for item in rest)
    return [
        listed[0],
        f"{a(first, sizes[0])} {relation(first, second)} {a(second, sizes[1])}{also}",
        f"{NUMBERS[len(items)]} objects, {listed[1]}",
        f"{listed[2]} on a {scene.background} background",
        f"{a(first, sizes[2])} {relation(first, second)} {a(second, sizes[3])}{also}",
    ]


def named_pairs(caption: str) -> list[Pair]:
    """Return the (colour, shape) pairs that a caption names, in order."""
    return re.findall(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b", caption)


def caption_is_exact(caption: str, pairs: Sequence[Sequence[str]]) -> bool:
    """Return True if a caption names exactly the given pairs, each as often as it occurs."""
    return Counter(named_pairs(caption)) == Counter(map(tuple, pairs))


# Questions.


@dataclass(frozen=True)
class Question:
    """A question with its right answer and a plausible wrong one."""

    text: str
    answer: str
    mistake: str
    kind: str  # "yes/no", "number" or "other", as in VQA v2


def questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Return `count` different questions about a scene."""
    asked = {question.text: question for question in _all_questions(scene, rng)}
    return rng.sample(list(asked.values()), min(count, len(asked)))


def _all_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    items, number = scene.items, len(scene.items)
    shapes, colors = Counter(item.shape for item in items), Counter(item.color for item in items)
    yield Question("how many objects are there?", str(number), str(number % 3 + 1), "number")
    for item in items:
        if shapes[item.shape] == 1:
            yield Question(f"what color is the {item.shape}?", item.color, SYNONYMS[item.color], "other")
        if colors[item.color] == 1:
            yield Question(f"what shape is the {item.color} object?", item.shape, SYNONYMS[item.shape], "other")
        other = "small" if item.size == "large" else "large"
        mistake = rng.choice((other, SYNONYMS[item.size]))
        yield Question(f"is the {name(item)} large or small?", item.size, mistake, "other")
    present = rng.choice(items)
    yield _yes_no(f"is there {a(present, False)}?", True)
    yield _yes_no(f"is there {with_article(' '.join(absent_pair(scene, rng)))}?", False)
    if number > 1:
        first, second = rng.sample(items, 2)
        said = rng.choice((relation(first, second), RELATIONS[relation(first, second)]))
        truth = said == relation(first, second)
        yield _yes_no(f"is the {name(first)} {said} the {name(second)}?", truth)
    if number == 2:
        first, second = rng.sample(items, 2)
        said = relation(first, second)
        yield Question(f"what is {said} the {name(second)}?", name(first), first.shape, "other")


def _yes_no(text: str, truth: bool) -> Question:
    return Question(text, "yes" if truth else "no", "no" if truth else "yes", "yes/no")


def absent_pair(scene: Scene, rng: random.Random) -> Pair:
    """Return a pair that the scene does not contain, with a colour or shape that it does contain if possible.

    Unseen pairs are used only for scenes that contain one; otherwise a model would learn that their names mean "no".
    """
    shown = set(scene.pairs)
    excluded = shown if shown & unseen_pairs() else shown | unseen_pairs()
    item, other = rng.choice(scene.items), rng.choice(scene.items)
    choices = [(item.color, other.shape), (item.color, rng.choice(SHAPES)), (rng.choice(list(COLORS)), item.shape)]
    for pair in rng.sample(choices, 3):
        if pair not in excluded:
            return pair
    return rng.choice([(c, s) for c in COLORS for s in SHAPES if (c, s) not in excluded])


def ten_answers(question: Question, rng: random.Random) -> list[str]:
    """Return ten answers to a question, most of them right."""
    wrong = rng.choice((0, 0, 0, 1, 1, 2, 3))
    answers = [question.answer] * (NUM_ANSWERS - wrong) + [question.mistake] * wrong
    return rng.sample(answers, NUM_ANSWERS)


def answer_list() -> list[str]:
    """Return all answers to questions about the miniature world."""
    pairs = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    return ["yes", "no", "1", "2", "3", *COLORS, *SHAPES, *SIZES, *dict.fromkeys(SYNONYMS.values()), *pairs]


ORDERED = (("1", "2", "3"), ("top", "center", "bottom"), ("left", "center", "right"))
GROUPS = (("yes", "no"), tuple(COLORS), SHAPES, tuple(SIZES), *ORDERED)  # answers to one kind of question
ANSWERS = tuple(dict.fromkeys(answer for group in GROUPS for answer in group))


def options(answer: str, group: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return `count` options with the right answer among them, as many as possible of its group."""
    likely, others = ([word for word in words if word != answer] for words in (group, set(ANSWERS) - set(group)))
    wrong = rng.sample(likely, len(likely)) + rng.sample(sorted(others), count)
    return rng.sample([answer, *wrong[: count - 1]], count)


# Statements about two images.


@dataclass(frozen=True)
class Statement:
    """A sentence, its truth value for (left, right) scenes, and a filter of the scenes it is about."""

    text: str
    holds: Callable[[Scene, Scene], bool]
    about: Callable[[Scene], bool]


def statement(rng: random.Random, pairs: Sequence[Pair]) -> Statement:
    """Return a random statement about objects of the given pairs."""
    color, shape = rng.choice(pairs)
    side, number = rng.choice(("left", "right")), rng.choice((1, 2, 3))
    opposite = "right" if side == "left" else "left"
    thing, objects = with_article(f"{color} {shape}"), "1 object" if number == 1 else f"{number} objects"

    def has(scene: Scene) -> bool:
        return (color, shape) in scene.pairs

    def has_shape(scene: Scene) -> bool:
        return any(item.shape == shape for item in scene.items)

    def has_color(scene: Scene) -> bool:
        return any(item.color == color for item in scene.items)

    def near(scene: Scene) -> bool:
        return has_shape(scene) or has_color(scene)

    # Each row: a text, its truth value for the scene x of `side` and the other scene y, the scenes that it is about.
    text, is_true, about = rng.choice(
        [
            (f"the {side} image contains {thing}", lambda x, _: has(x), near),
            (f"the {side} image contains a {shape}", lambda x, _: has_shape(x), has_shape),
            (f"one of the images contains {thing}", lambda x, y: has(x) or has(y), near),
            (f"the {side} image contains something {color} and the {opposite} image contains a {shape}",
             lambda x, y: has_color(x) and has_shape(y), near),
            (f"both images contain a {shape}", lambda x, y: has_shape(x) and has_shape(y), has_shape),
            (f"both images contain something {color}", lambda x, y: has_color(x) and has_color(y), has_color),
            (f"neither image contains a {shape}", lambda x, y: not (has_shape(x) or has_shape(y)), has_shape),
            (f"the {side} image has exactly {objects}", lambda x, _: len(x.items) == number, bool),
            (f"the {side} image has more objects than the other one", lambda x, y: len(x.items) > len(y.items), bool),
            ("both images have the same number of objects", lambda x, y: len(x.items) == len(y.items), bool),
        ]
    )  # fmt: skip
    return Statement(text, is_true if side == "left" else lambda left, right: is_true(right, left), about)


def judged_pairs(
    made: Statement, scenes: Sequence[Scene], rng: random.Random, each: int = 2
) -> list[tuple[int, int, bool]]:
    """Return `each` true and `each` false (left, right, truth) scene numbers for a statement, or an empty list."""
    near = [i for i in rng.sample(range(len(scenes)), min(200, len(scenes))) if made.about(scenes[i])]
    found: dict[bool, list[tuple[int, int, bool]]] = {True: [], False: []}
    for _ in range(60):
        pools = [near if near and rng.random() < 0.7 else range(len(scenes)) for _ in range(2)]
        left, right = (rng.choice(pool) for pool in pools)
        truth = made.holds(scenes[left], scenes[right])
        if left != right and len(found[truth]) < each and (left, right, truth) not in found[truth]:
            found[truth].append((left, right, truth))
    if min(map(len, found.values())) < each:
        return []
    return rng.sample(found[True] + found[False], 2 * each)


# Web texts.


def web_text(scene: Scene, other: Scene, rng: random.Random) -> dict[str, Any]:
    """Return a web text of an image: {"caption", "kind", "matches"}.

    "right" (55%), "noisy" (25%: a wrong colour or shape, or nothing but clutter), "other" (20%: of another image).
    """
    draw = rng.random()
    kind = "right" if draw < 0.55 else "noisy" if draw < 0.80 else "other"
    text = rng.choice(captions(other if kind == "other" else scene, rng))
    text = spoil(text, rng) if kind == "noisy" else text
    return {"caption": text, "kind": kind, "matches": caption_is_exact(text, scene.pairs)}


def spoil(caption: str, rng: random.Random) -> str:
    """Return a caption with a wrong colour or shape, or clutter instead of it."""
    if rng.random() < 0.25:
        return f"{rng.choice(CLUTTER)} {rng.choice(CLUTTER)} {rng.randint(10, 99)}"
    pair = rng.choice(named_pairs(caption))
    right, words = (pair[0], COLORS) if rng.random() < 0.5 else (pair[1], SHAPES)
    wrong = " ".join(pair).replace(right, rng.choice([word for word in words if word != right]))
    clutter = f" {rng.choice(CLUTTER)}" if rng.random() < 0.3 else ""
    return caption.replace(" ".join(pair), wrong, 1) + clutter


def words() -> list[str]:
    """Return every word of the miniature world, in a fixed order."""
    text = """a an the of picture photo image images and or on at in it is there one two three no objects object alone
    other background what color shape how many large small big little contains contain both neither something has
    have exactly more than number same left right above below top bottom center moving to up down shows with this
    that are not yes maybe , ? . ' -"""
    known = [*text.split(), *COLORS, *SHAPES, *SIZES, *BACKGROUNDS, *SYNONYMS.values(), *" ".join(CLUTTER).split()]
    known += ["black", "gray", "teal", "brown", "rectangle", "does", "not", "of", "present"]  # for easy-vqa
    letters = [*ascii_lowercase, *digits]
    return list(dict.fromkeys(known + letters + [f"##{letter}" for letter in letters]))
