"""Scores of A-OKVQA and GQA, which differ from VQA v2's."""

from collections.abc import Iterable, Sequence

from utils import UserError

MATCHES = 3  # an answer is fully right if so many people gave it
Row = dict


def direct_accuracy(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return A-OKVQA's accuracy of direct answers: the mean of min(1, people who gave the answer / 3), in percent.

    Args:
        results: {"question_id", "answer"} rows.
        annotations: rows with "question_id" and "answer", a list of texts.
    """
    pairs = _pairs(results, annotations, "answer")
    return {"overall": _percent([min(1.0, people.count(answer) / MATCHES) for answer, people in pairs])}


def choice_accuracy(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return A-OKVQA's accuracy of multiple choice: the share of right choices, in percent.

    Args:
        results: {"question_id", "answer"} rows, the answer being one of the choices.
        annotations: rows with "question_id", "choices" and "correct_choice_idx".
    """
    rows = [{**row, "right": row["choices"][row["correct_choice_idx"]]} for row in annotations]
    return {"choice": _percent([answer == right for answer, right in _pairs(results, rows, "right")])}


def exact_match(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return GQA's accuracy: the share of answers equal to the one annotated, in percent.

    Args:
        results: {"question_id", "answer"} rows.
        annotations: rows with "question_id" and "answer", a text or a list of one.
    """
    pairs = _pairs(results, annotations, "answer")
    return {"overall": _percent([answer in ([right] if isinstance(right, str) else right) for answer, right in pairs])}


def _percent(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values)


def _pairs(results: Iterable[Row], annotations: Iterable[Row], key: str) -> list[tuple[str, object]]:
    found = {str(row["question_id"]): row["answer"] for row in results}
    rows = list(annotations)
    missing = [str(row["question_id"]) for row in rows if str(row["question_id"]) not in found]
    if missing or not rows:
        raise UserError(
            f"{len(missing)} of {len(rows)} annotated questions have no answer in the results "
            f"(question_id {', '.join(missing[:3]) or 'none'}); answer every question of the annotations"
        )
    return [(found[str(row["question_id"])], row[key]) for row in rows]
