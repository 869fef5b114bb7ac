"""Cleaning of texts before tokenization, as in the released code."""

import re
import string

PUNCTUATION = ".!\"()*#:;~"
BLANK = PUNCTUATION + string.whitespace


def pre_caption(caption: str, max_words: int = 50) -> str:
    """Lower-case, replace punctuation by spaces, collapse white space, and keep the first words.

    Commas, hyphens, apostrophes and question marks are kept.
    """
    caption = caption.lower().translate(str.maketrans(PUNCTUATION, " " * len(PUNCTUATION)))
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def pre_question(question: str, max_ques_words: int = 50) -> str:
    """Lower-case, delete punctuation, and keep the first words; white space is kept."""
    question = question.lower().translate(str.maketrans("", "", PUNCTUATION)).rstrip(" ")
    return " ".join(question.split(" ")[:max_ques_words])


def exchange_left_right(sentence: str) -> str:
    """Replace every word "left" by "right" and every word "right" by "left"."""
    return re.sub(r"\b(left|right)\b", lambda word: "right" if word[0] == "left" else "left", sentence)


def is_blank(text: str | None) -> bool:
    """Return True for None and for a text of white space and punctuation only."""
    return text is None or not text.strip(BLANK)
