"""The command line of every script."""

import argparse
import difflib
import re
from collections.abc import Sequence

from launch.config import Settings, describe
from utils import UserError


def make_parser(
    config_class: type[Settings], config: str, output: str, description: str | None, examples: Sequence[str]
) -> argparse.ArgumentParser:
    """Return the parser of a script, whose help shows examples and the keys of its configuration."""
    epilog = "examples:\n" + "".join(f"  {line}\n" for line in examples)
    epilog += "\nconfiguration keys, with their defaults:\n" + "\n".join(describe(config_class))
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=config, help=f"YAML file of settings (default: {config})")
    parser.add_argument("--output_dir", default=output, help=f"folder of results (default: {output})")
    parser.add_argument("--evaluate", action="store_true", help="evaluate only")
    parser.add_argument("--device", default="", help="cuda, xpu, mps or cpu (default: cuda if there is a GPU)")
    parser.add_argument("--seed", type=int, default=42, help="of all random numbers (default: 42)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output_dir")
    parser.add_argument("--checkpoint", default="", help="continue from this checkpoint, of any folder")
    parser.add_argument("--overwrite", action="store_true", help="begin anew in a folder that holds a run")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="change settings; may be repeated"
    )
    if "engine" in config_class.__dataclass_fields__:
        parser.add_argument("--engine", dest="set", action="append", type="engine={}".format, help="as --set engine=")
    for name in ("--world_size", "--dist_url", "--distributed"):
        parser.add_argument(name, default=None, help="accepted as in the released code; the launcher decides")
    return parser


def refuse_unknown(words: Sequence[str], parser: argparse.ArgumentParser, config: Settings) -> None:
    """Raise UserError for the first word that is no option, which says how it has to be given."""
    if not words:
        return
    word, key = words[0], words[0].lstrip("-").split("=")[0]
    options = re.findall(r"--\w+", parser.format_usage())
    if not word.startswith("-"):
        remedy = f"give a setting as --set {word}" if "=" in word else f"give a file of settings as --config {word}"
    elif key in config:
        remedy = f"give a setting as --set {key}=VALUE"
    else:
        remedy = f"did you mean {(*difflib.get_close_matches(word, options, n=1), '--help')[0]}?"
    raise UserError(f"{word} is no option; {remedy}")
