"""Scores of A-OKVQA and GQA, which differ from VQA v2's.

Results are {"question_id", "answer"} rows; ids, and what is refused, are as in `metrics.vqa.vqa_accuracy`.
"""

from collections.abc import Iterable

from metrics.vqa import MATCHES, answered, people_of, percent
from utils import UserError

Row = dict


def direct_accuracy(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return A-OKVQA's accuracy of direct answers: the mean of min(1, people who gave the answer / 3), in percent.

    Annotations have "question_id" and "answer", a list of texts. Those with a true "difficult_direct_answer" are left
    out, as in the official score; UserError if there is no other.
    """
    pairs = [pair for pair in answered(results, annotations) if pair[1].get("difficult_direct_answer") is not True]
    if not pairs:
        raise UserError("every annotation has difficult_direct_answer, which is not scored; set inference: choices")
    return {"overall": percent([min(1.0, people_of(row).count(answer) / MATCHES) for answer, row in pairs])}


def choice_accuracy(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return A-OKVQA's accuracy of multiple choice: the share of right choices, in percent.

    Annotations have "question_id", "choices" and "correct_choice_idx".
    """
    pairs = answered(results, annotations)
    return {"choice": percent([answer == row["choices"][row["correct_choice_idx"]] for answer, row in pairs])}


def exact_match(results: Iterable[Row], annotations: Iterable[Row]) -> dict[str, float]:
    """Return GQA's accuracy: the share of answers equal to the one annotated, in percent.

    Annotations have "question_id" and "answer", a text or a list of one.
    """
    return {"overall": percent([answer in people_of(row) for answer, row in answered(results, annotations)])}
