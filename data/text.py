"""Texts as the released code cleans them before the tokenizer sees them."""

import re

PUNCTUATION = ".!\"()*#:;~"


def pre_caption(caption: str, max_words: int = 50) -> str:
    """Lower-case, turn punctuation into spaces, join runs of white space, and keep the first words.

    Commas, hyphens, apostrophes and question marks stay.
    """
    caption = caption.lower().translate(str.maketrans(PUNCTUATION, " " * len(PUNCTUATION)))
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def pre_question(question: str, max_ques_words: int = 50) -> str:
    """Lower-case, delete punctuation, and keep the first words; spaces stay as they are."""
    question = question.lower().translate(str.maketrans("", "", PUNCTUATION)).rstrip(" ")
    return " ".join(question.split(" ")[:max_ques_words])


def exchange_left_right(sentence: str) -> str:
    """Write "right" for every word "left" and "left" for every word "right"."""
    return re.sub(r"\b(left|right)\b", lambda word: "right" if word[0] == "left" else "left", sentence)
