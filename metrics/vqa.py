"""Accuracy of visual question answering as VQA v2's official evaluation computes it."""

import re
from collections.abc import Iterable, Sequence

from utils import UserError, first_few, id_text, is_listed

MATCHES = 3  # an answer is fully right when this many of the other people gave it
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes (girl's) and colons (10:30) stay
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")  # any but a decimal point
MOST_PERIODS = 32  # the official scorer removes no more

# The contractions whose apostrophes the official scorer restores, where exactly one is missing.
CONTRACTIONS_WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Return whole contractions by what remains of them without one of their apostrophes."""
    table = {"somebody'd": "somebodyd"}  # the scorer's own exception, the wrong way round
    for word in CONTRACTIONS_WHOLE.split():
        table |= {word[:place] + word[place + 1 :]: word for place, letter in enumerate(word) if letter == "'"}
    return table


CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """Return an answer as VQA v2's evaluation compares it.

    It is in lower case, without articles, periods and punctuation, with number words up to ten as digits, and with the
    apostrophes of contractions.
    """
    stripped = _strip(answer)
    text = stripped
    # punctuation beside a space, or anywhere in an answer with a number such as 1,000, leaves no space
    number = COMMA_IN_NUMBER.search(stripped)
    for mark in PUNCTUATION:
        joins = number or f"{mark} " in stripped or f" {mark}" in stripped
        text = text.replace(mark, "" if joins else " ")
    words = (DIGITS.get(word, word) for word in PERIOD.sub("", text, count=MOST_PERIODS).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _strip(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of one answer against human answers, usually ten and at least one, in [0, 1].

    This is the mean over all ways to leave one person out of min(1, others who gave this answer / 3). As in the
    official scorer, answers are not normalized where all people agree to the letter. With fewer than four people, for
    whom VQA v2 defines nothing, answers are always normalized and all the others must agree; with one person the
    answer must be theirs.
    """
    said, given = _strip(answer), [_strip(person) for person in people]
    if len(set(given)) > 1 or len(given) <= MATCHES:
        said, given = normalize_answer(said), [normalize_answer(person) for person in given]
    same = [person == said for person in given]
    if len(same) == 1:
        return float(same[0])
    needed = min(MATCHES, len(same) - 1)
    return sum(min(1.0, (sum(same) - mine) / needed) for mine in same) / len(same)


def vqa_accuracy(
    results: Iterable[dict], annotations: Iterable[dict], by: Sequence[str] = ("answer_type",)
) -> dict[str, float]:
    """Return the accuracy over all questions, "overall", and by type, such as "yes/no", in percent.

    Args:
        results: {"question_id", "answer": str} rows; the first of several with one id counts.
        annotations: rows with "question_id" and "answer", a text or a list of texts, or VQA's "answers", a list of
            {"answer": str}; and with keys of `by`.
        by: keys of the annotations whose values are types, such as "answer_type" and "question_type".

    UserError if questions have no result, two annotations share an id, or a row has no id or an answer that is no text.
    """
    groups: dict[str, list[float]] = {"overall": []}
    for answer, row in answered(results, annotations):
        value = answer_accuracy(answer, people_of(row))
        for name in ("overall", *(str(row[kind]) for kind in by if kind in row)):
            groups.setdefault(name, []).append(value)
    return {name: percent(values) for name, values in groups.items()}


def percent(values: Sequence[float]) -> float:
    """Return the mean in percent."""
    return 100.0 * sum(values) / len(values)


def answered(results: Iterable[dict], annotations: Iterable[dict]) -> list[tuple[str, dict]]:
    """Return every annotation with the answer to it; errors as `vqa_accuracy`."""
    found, rows = _answers_by_id(results), _annotations_by_id(annotations)
    missing = [key for key in rows if key not in found]
    if missing or not rows:
        raise UserError(
            f"{len(missing)} of {len(rows)} annotated questions have no answer in the results "
            f"(question_id {first_few(missing) or 'none'}); answer every question of the annotations"
        )
    return [(found[key], row) for key, row in rows.items()]


def _answers_by_id(results: Iterable[dict]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in results:
        if not isinstance(row, dict) or not {"question_id", "answer"} <= row.keys():
            raise UserError(f'a VQA result is {row!r:.60}; expected an object with "question_id" and "answer"')
        if not isinstance(row["answer"], str):
            raise UserError(f"a VQA result has the answer {row['answer']!r:.60}; expected a text")
        found.setdefault(id_text(row["question_id"]), row["answer"])
    return found


def _annotations_by_id(annotations: Iterable[dict]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for row in annotations:
        if not isinstance(row, dict) or "question_id" not in row:
            raise UserError(f'a VQA annotation is {row!r:.60}; expected an object with "question_id" and "answer"')
        key = id_text(row["question_id"])
        if found.setdefault(key, row) != row:
            raise UserError(
                f"two VQA annotations share the question_id {key}: {found[key]!r:.60} and {row!r:.60}; give every "
                "question an id of its own"
            )
    return found


def people_of(row: dict) -> list[str]:
    """Return the human answers of an annotation; UserError if they are no texts."""
    answers = row.get("answers", row.get("answer", []))
    answers = answers if isinstance(answers, list) else [answers]
    people = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    if not people or not all(isinstance(person, str) and not is_listed(person) for person in people):
        raise UserError(
            f'question {row["question_id"]} has the answers {answers!r:.60}; expected a text, or a list of texts'
        )
    return people
