"""Settings read from YAML and `--set a.b=c`, and checked; errors name the file and the line."""

import difflib
import operator
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml import tokens as marks
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from files import write_whole
from launch.config import Settings
from utils import UserError, short_repr

Config = TypeVar("Config", bound=Settings)
CODE_FOLDER = Path(__file__).resolve().parent.parent
MAX_NUMBER = 1e15
COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
# What ruamel raises for odd texts: its own errors, and others for malformed numbers and self-references.
BAD_YAML = (YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)
STARTS = (marks.BlockSequenceStartToken, marks.BlockMappingStartToken, marks.FlowSequenceStartToken,
          marks.FlowMappingStartToken)  # fmt: skip
ENDS = (marks.BlockEndToken, marks.FlowSequenceEndToken, marks.FlowMappingEndToken)
MOST_NESTING, MOST_ALIASES = 8, 20  # with more, a short text can take hours and all memory
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list",
         dict: "a mapping"}  # fmt: skip


def load_config(config_class: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `key=value` overrides; UserError, with file and line, for any mistake in them.

    A released path such as configs/vqa.yaml is also looked for beside the code. Values are in YAML; "vit.depth=4"
    changes one entry of a mapping.
    """
    path = _find(Path(path))
    values, places = read_settings(path)
    for override in overrides:
        _override(values, places, override)
    return _build(config_class, values, places)


def _find(path: Path) -> Path:
    for candidate in (path, CODE_FOLDER / path):
        if candidate.is_file():
            return candidate
    choices = ", ".join(sorted(p.name for p in (CODE_FOLDER / "configs").glob("*.yaml")))
    raise UserError(f"config {path} does not exist; correct --config, for instance to one of configs/: {choices}")


def _override(values: dict[str, Any], places: dict[str, str], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set got {short_repr(override, 60)}; expected key=value, for instance --set batch_size=8")
    if has_lone_surrogates(text):  # bytes of another encoding, which YAML's reader refuses without saying so
        raise UserError(f"--set {short_repr(override, 60)}: {key} is not UTF-8 text; write it in UTF-8")
    try:
        value = plain(parse(text)) if text else ""
    except BAD_YAML:
        raise UserError(f"--set {short_repr(override, 60)}: the value is not YAML; put it in quotes") from None
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            problem = f"{parent} is {describe_value(values)}, not a mapping; set {parent} as a whole"
            raise UserError(f"--set {short_repr(override, 60)}: {problem}")
    values[last] = value
    places[key.split(".")[0]] = f"--set {override}"[:80]


def _build(config_class: type[Config], values: dict[str, Any], places: dict[str, str]) -> Config:
    hints = typing.get_type_hints(config_class)
    for key, value in values.items():
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"this task has {', '.join(sorted(hints))}"
            raise UserError(f"{places[key]}: unknown key {short_repr(key, 60)}; {meant}")
        values[key] = _convert(value, hints[key], f"{places[key]}: {key}")
        if has_lone_surrogates(str(value)):  # config.yaml could not be written
            raise UserError(f"{places[key]}: {key} is not UTF-8 text; write it in UTF-8")
    config = config_class(**values)
    check_ranges(config, places)
    return config


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Return a value as the type of its field, or raise UserError."""
    allowed = typing.get_args(hint) or (hint,)
    if value is None and str in allowed:
        return ""
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if list in allowed and isinstance(value, list | str):
        return _texts([value] if isinstance(value, str) else value, place)
    if type(value) in allowed:
        return value
    wanted = " or ".join(WORDS[kind] for kind in allowed)
    raise UserError(f"{place} is {describe_value(value)}; expected {wanted}")


def _texts(items: list[Any], place: str) -> list[str]:
    """Return the items of a list as texts; numbers, such as names of classes, are texts too."""
    for item in items:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise UserError(f"{place} holds {describe_value(item)}; expected texts")
    return list(map(str, items))


def check_ranges(config: Any, places: Mapping[str, str]) -> None:
    """Raise UserError for a value out of range, not finite, or none of its choices; `places` says where it was set."""
    for item in fields(config):
        value, allowed, place = config[item.name], item.metadata["allowed"], places.get(item.name, "default")
        if isinstance(allowed, tuple) and value not in allowed:
            raise UserError(f"{place}: {item.name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
        if allowed and isinstance(allowed, str) and not in_range(value, allowed):
            raise UserError(f"{place}: {item.name} is {value}; expected a number {allowed}")
    if config.get("min_length", 0) > config.get("max_length", MAX_NUMBER):
        place = places.get("min_length") or places.get("max_length")
        raise UserError(
            f"{place}: min_length is {config.min_length} and max_length {config.max_length}; raise max_length"
        )


def in_range(value: float, text: str) -> bool:
    """Return True if a finite number is in a range such as "> 0 and <= 1"."""
    parts = (part.split() for part in text.split(" and "))
    return abs(value) < MAX_NUMBER and all(COMPARISONS[sign](value, float(bound)) for sign, bound in parts)


def save_config(config: Settings, path: Path) -> None:
    """Write a configuration as YAML; the file starts the same run again."""
    with write_whole(path) as file:
        YAML().dump(asdict(config), file)


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a file, and the file and line of each; UserError if it is no YAML mapping in UTF-8."""
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
        first_words = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not YAML that can be read ({first_words}); correct it") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {describe_value(values)}; expected lines of 'key: value'")
    lines = tree.lc.data or {}  # without keys merged in from elsewhere
    return values, {str(key): f"{path}, line {lines[key][0] + 1}" if key in lines else str(path) for key in tree}


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
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), value)


def has_lone_surrogates(text: str) -> bool:
    """Return True if UTF-8 cannot encode a text, such as an argument in another encoding."""
    return text.encode("utf-8", "ignore").decode() != text


def describe_value(value: Any) -> str:
    """Return a value's type in words, and the value if it is short."""
    value = plain(value)
    name = WORDS.get(type(value), "nothing" if value is None else type(value).__name__)
    return f"{name} ({short_repr(value, 60)})" if isinstance(value, str | int | float) else name
