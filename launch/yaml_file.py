"""YAML files of settings, read with the line of every key, and descriptions of values for error messages."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml import tokens as marks
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from utils import UserError

# What ruamel raises for odd texts: its own errors, and others for malformed numbers and self-references.
BAD_YAML = (YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)
STARTS = (marks.BlockSequenceStartToken, marks.BlockMappingStartToken, marks.FlowSequenceStartToken,
          marks.FlowMappingStartToken)  # fmt: skip
ENDS = (marks.BlockEndToken, marks.FlowSequenceEndToken, marks.FlowMappingEndToken)
MOST_NESTING, MOST_ALIASES = 8, 20  # with more, a short text can take hours and all memory
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a file, and the file and line of each.

    Raises:
        UserError: the file is not YAML in UTF-8, or holds no mapping.
    """
    try:
        tree = parse(path.read_text(encoding="utf-8"))
        values = plain(tree)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        problem = " ".join(str(error.problem).split()).split(" To suppress")[0]
        raise UserError(f"{path}, line {line}: not YAML ({problem}); correct that line") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file; expected YAML in UTF-8") from None
    except BAD_YAML as error:
        raise UserError(f"{path} is not YAML that can be read ({_first_words(error)}); correct it") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {describe_value(values)}; expected lines of 'key: value'")
    return values, {str(key): f"{path}{_line_of(tree, key)}" for key in tree}


def _line_of(tree: Any, key: Any) -> str:
    try:
        return f", line {tree.lc.key(key)[0] + 1}"
    except (KeyError, TypeError):  # of a key merged in from elsewhere
        return ""


def _first_words(error: BaseException) -> str:
    return " ".join(str(error).split())[:100]


def parse(text: str) -> Any:
    """Parse YAML with limited nesting and aliases; raises one of BAD_YAML."""
    depth = aliases = 0
    for token in YAML(typ="rt").scan(text):
        depth += isinstance(token, STARTS) - isinstance(token, ENDS)
        aliases += isinstance(token, marks.AliasToken)
        if depth > MOST_NESTING or aliases > MOST_ALIASES:
            raise YAMLError(f"more than {MOST_NESTING} levels, or more than {MOST_ALIASES} aliases")
    return YAML(typ="rt").load(text)


def plain(value: Any) -> Any:
    """Convert ruamel's types to Python's own."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def abbreviate(value: Any) -> str:
    """Return a value's text, at most 60 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_value(value: Any) -> str:
    """Return a value's type in words, and the value if it is short."""
    value = plain(value)
    name = WORDS.get(type(value), "nothing" if value is None else type(value).__name__)
    return f"{name} ({abbreviate(value)})" if isinstance(value, str | int | float) else name
