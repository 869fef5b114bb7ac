"""Read checkpoints from a path, a URL or the Hub, downloaded once per machine, without running code in them."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from download import cached
from models.hub import settings_of_folder
from models.huggingface import from_huggingface, is_huggingface
from models.med_config import read_json
from utils import UserError, barrier, on_main_process

HUB, RELEASED_HUB = "hf:", "hf-released:"  # the second for the Hub's old files, see `models.hub`
State = dict[str, torch.Tensor]
Config = dict[str, Any]


def read_source(source: str, allow_pickle: bool = False) -> State:
    """Return the state dict of a path, URL or `hf:` name, with the names of this project."""
    return read_checkpoint(source, allow_pickle)[0]


def read_checkpoint(source: str, allow_pickle: bool = False) -> tuple[State, Config]:
    """Return the state dict of a source, with the names of this project, and the settings saved with it, or {}."""
    state: State = {}
    config: Config = {}
    paths = resolve(source)
    for path in paths:
        tensors, settings = read_file(path, allow_pickle)
        state |= tensors
        config |= settings
    if not is_huggingface(state):
        return state, config
    folder, decodes = paths[0].parent, any(key.startswith("text_decoder.") for key in state)
    if (folder / "config.json").is_file():
        config = settings_of_folder(folder, decodes, source.startswith(RELEASED_HUB))
    return from_huggingface(state), config


def resolve(source: str) -> list[Path]:
    """Return the files of a source, downloaded if needed, once per machine; all processes call it."""
    if source.startswith(("http://", "https://")):
        return [_fetch_once_per_machine(lambda: cached(source, _no_checkpoint))]
    if source.startswith((HUB, RELEASED_HUB)):
        return weight_files(_fetch_once_per_machine(lambda: _hub_folder(source.partition(":")[2])))
    if not Path(source).is_file():
        raise UserError(f"pretrained weights {source} do not exist; correct the path")
    return [Path(source)]


def weight_files(folder: Path) -> list[Path]:
    """Return the weights of a folder: those that transformers would read, or its only .safetensors file."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        parts = read_json(folder / f"{name}.index.json").get("weight_map")
        if isinstance(parts, dict):
            paths = sorted({folder / Path(str(part)).name for part in parts.values()})
            if missing := [path.name for path in paths if not path.is_file()]:
                raise UserError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
            return paths
    others = sorted(folder.glob("*.safetensors"))
    if len(others) != 1:
        found = ", ".join(path.name for path in others) or "no weights"
        raise UserError(
            f"{folder} has {found}; expected model.safetensors or pytorch_model.bin, whole or with an index; "
            "give another folder, or the path of a file"
        )
    return others


def _no_checkpoint(path: Path) -> str:
    """Return why a downloaded file is no checkpoint, '' if it may be one."""
    with open(path, "rb") as file:
        start = file.read(32)
    known = start.startswith((b"PK", b"\x80")) or start[8:9] == b"{"  # the two formats of torch, and safetensors
    return "" if known else f"begins with {start[:20]!r}, so it is no checkpoint"


def _fetch_once_per_machine(get: Callable[[], Path]) -> Path:
    """Fetch a file or folder on the main process, then on processes whose disk does not have it."""
    path = on_main_process(get)
    absent = not path.exists()
    barrier()  # a process must not see what another one is still writing
    return get() if absent else path


def _hub_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt"]))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, allow_patterns=["pytorch_model*.bin"])
        return folder
    except (OSError, HfHubHTTPError, HFValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"hf:{name} is no local folder and could not be downloaded ({reason})") from None


def read_file(path: Path, allow_pickle: bool = False) -> tuple[State, Config]:
    """Read the weights of a file and its settings; other entries, such as the optimizer state, stay on disk."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = torch_load(path, allow_pickle)
    config = content.get("config") if isinstance(content, dict) else None
    config = dict(config) if isinstance(config, Mapping) else {}
    if isinstance(config.get("model"), Mapping):  # LAVIS nests settings by topic
        config |= config["model"]
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in content.items()):
        raise UserError(f"{path} holds no state dict; expected {{'model': state dict}} or a state dict alone")
    return content, config


def _read_safetensors(path: Path) -> tuple[State, Config]:
    """Read tensors, mapped from disk, and the settings in the file."""
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None
    try:
        return state, dict(json.loads(metadata.get("config", "{}")))
    except (ValueError, TypeError) as error:
        raise UserError(f"the configuration of {path} cannot be read ({error}); download it again") from None


def torch_load(path: Path, allow_pickle: bool = False) -> Any:
    """Read a file written by torch, with tensors mapped from disk."""
    refuse_compressed(path)
    try:
        try:  # mapped from disk, so that unused tensors are never read
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=True)
        except (RuntimeError, ValueError):  # the format before PyTorch 1.6
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not named:
            raise UserError(f"{path} is damaged or no checkpoint; download it again") from None
        raise UserError(
            f"{path} holds {named[1]}, not only weights, and reading that may run code; if you trust its source, "
            "accept it with allow_pickle (--set allow_pickle=true, or --allow_pickle)"
        ) from None
    except (AttributeError, ImportError) as error:
        raise UserError(f"{path} holds objects of code that is not installed ({error}); install it") from None
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, ArithmeticError, AssertionError,
            MemoryError, struct.error) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:100]
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); download it again") from None


def refuse_compressed(path: Path) -> None:
    """Refuse a compressed archive, or overlapping entries, which could fill the memory; torch does not compress."""
    try:
        if not zipfile.is_zipfile(path):  # the format before PyTorch 1.6, or damaged, which torch reports
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, LookupError, NotImplementedError, zipfile.BadZipFile, struct.error) as error:
        raise UserError(f"{path} is damaged ({error}); download it again") from None
    size, have = sum(entry.file_size for entry in entries), path.stat().st_size
    if size > have or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            f"{path} is compressed ({size} bytes in {have}), unlike any checkpoint written by torch; download it again"
        )
