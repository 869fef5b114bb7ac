"""Units of scores: result files and logs keep each metric's own numbers, tables show them as papers print them."""

import re
from collections.abc import Mapping
from typing import Any

# Scores that the metrics give as fractions and papers print times 100.
FRACTION = re.compile(r"(?:^|_)(Bleu_[1-4]|METEOR|ROUGE_L|CIDEr|SPICE|acc|consistency)$")


def to_printed(name: str, value: float) -> float:
    """Return a score in the unit that papers print: captioning and NLVR2 times 100 (133.3 for a CIDEr of 1.333).

    A split or domain may stand before the name, as in "test_CIDEr".
    """
    return 100 * value if FRACTION.search(name) else value


def format_score(name: str, value: Any) -> str:
    """Return a score as tables show it: fractions in percent with one decimal (NLVR2: two), small numbers in full."""
    if not isinstance(value, float):  # counts, texts; NumPy's float64 is a float
        return str(value)
    if fraction := FRACTION.search(name):
        return f"{100 * value:.{2 if fraction[1] in ('acc', 'consistency') else 1}f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def put_test_first(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores with those of the test split first; otherwise in their order."""
    return dict(sorted(scores.items(), key=lambda item: not item[0].startswith("test_")))
