"""Accuracy of visual question answering as VQA v2 defines it, on answers brought to one spelling."""

import re
from collections.abc import Iterable, Sequence

from utils import UserError

MATCHES = 3  # an answer is fully right when this many of the other people gave it
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(NUMBERS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # apostrophes (girl's) and colons (10:30) stay
COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
PERIOD = re.compile(r"\.(?!\d)")  # any but a decimal point


# Words by the endings with which they contract, and the contractions that follow no such rule.
ENDINGS = {
    "n't": "ai are ca could did does do had has have is might must ought sha should was were wo would",
    "'ve": "could i might must not should they we who would you",
    "'ll": "it somebody someone something there they what who why you",
    "'s": "he how let she somebody someone something that there what when where who why",
    "'d": "how it somebody someone something that there they where who you",
    "'re": "there they what why you",
    "n't've": "could had might must should would",
    "'d've": "he i it she somebody someone something there they we who you",
}
OTHERS = ("i'm", "ma'am", "o'clock", "y'all", "y'all'll", "y'all'd've")


def _contractions() -> dict[str, str]:
    """Return contractions by what remains of them without one of their apostrophes, or without all."""
    whole = [word + ending for ending, words in ENDINGS.items() for word in words.split()]
    table = {}
    for word in (*whole, *OTHERS):
        places = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in places}
        table[word.replace("'", "")] = word
    return table


CONTRACTIONS = _contractions()


def normalize_answer(answer: str) -> str:
    """Return an answer in the spelling in which answers are compared.

    In lower case, without articles, periods and punctuation, number words up to ten as digits, and the
    apostrophes of contractions put in (VQA, evaluation).
    """
    text = " ".join(answer.lower().split())
    # What lies beside a space, and everything around a number such as 1,000, goes without leaving a space.
    number = COMMA_IN_NUMBER.search(text)
    for mark in PUNCTUATION:
        joins = number or f"{mark} " in text or f" {mark}" in text
        text = text.replace(mark, "" if joins else " ")
    words = (DIGITS.get(word, word) for word in PERIOD.sub("", text).split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def answer_accuracy(answer: str, people: Sequence[str]) -> float:
    """Return the accuracy of one answer, in [0, 1].

    The mean over all ways to leave one person out of min(1, others who gave this answer / 3). With fewer than
    four people all the others must agree; with one person the answer must be theirs.

    Args:
        answer: what the model said.
        people: what people said, usually ten of them; at least one.
    """
    said = normalize_answer(answer)
    same = [normalize_answer(person) == said for person in people]
    if len(same) == 1:
        return float(same[0])
    needed = min(MATCHES, len(same) - 1)
    return sum(min(1.0, (sum(same) - mine) / needed) for mine in same) / len(same)


def vqa_accuracy(
    results: Iterable[dict], annotations: Iterable[dict], by: Sequence[str] = ("answer_type",)
) -> dict[str, float]:
    """Return the accuracy over all questions and by type, in percent.

    Args:
        results: {"question_id", "answer": str} rows; of rows with the same id the first counts, and those of
            questions without annotation are left aside.
        annotations: rows with "question_id" and "answer": a list of strings or one string, or as in the
            files of VQA "answers": list of {"answer": str}; with the keys of `by`, where they have any.
        by: keys of the annotations whose values are types, such as "answer_type" and "question_type".

    Returns:
        "overall" and each type ("yes/no", "number", "other"): percent.

    Raises:
        UserError: questions have no result, or an annotation has no answer.
    """
    found = {str(row["question_id"]): str(row["answer"]) for row in _first_rows(results)}
    rows = list(annotations)
    if nameless := [row for row in rows if not isinstance(row, dict) or "question_id" not in row]:
        raise UserError(f'a VQA annotation is {nameless[0]!r:.60}; expected an object with "question_id" and "answer"')
    missing = [str(row["question_id"]) for row in rows if str(row["question_id"]) not in found]
    if missing or not rows:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(rows)} annotated questions have no answer in the results "
            f"(question_id {first or 'none'}); answer every question of the annotations"
        )
    groups: dict[str, list[float]] = {"overall": []}
    for row in rows:
        value = answer_accuracy(found[str(row["question_id"])], _people(row))
        for name in ("overall", *(str(row[kind]) for kind in by if kind in row)):
            groups.setdefault(name, []).append(value)
    return {name: 100.0 * sum(values) / len(values) for name, values in groups.items()}


def _first_rows(results: Iterable[dict]) -> list[dict]:
    first: dict[str, dict] = {}
    for row in results:
        if not isinstance(row, dict) or not {"question_id", "answer"} <= row.keys():
            raise UserError(f'a VQA result is {row!r:.60}; expected an object with "question_id" and "answer"')
        first.setdefault(str(row["question_id"]), row)
    return list(first.values())


def _people(row: dict) -> list[str]:
    answers = row.get("answers", row.get("answer", []))
    answers = [answers] if isinstance(answers, str) else answers
    answers = answers if isinstance(answers, list) else [answers]
    people = [str(answer.get("answer", "") if isinstance(answer, dict) else answer) for answer in answers]
    if not people:
        raise UserError(
            f'question {row["question_id"]} is annotated without answers; give it "answer": [...]'
        )
    return people
