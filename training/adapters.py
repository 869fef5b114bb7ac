"""Training a part of a model: frozen parts, and low-rank adapters (LoRA, by the package peft) beside frozen weights.

A run with adapters writes plain checkpoints, with the adapters added to the weights, and `adapters.pth`: the adapters
and the parts trained whole. Together with the weights of the start they give the same model.
"""

import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.config import TrainConfig
from launch.run import Run
from models.momentum import MomentumModel
from models.weights import State, torch_load
from training import parallel
from utils import UserError, on_main_process

FILE = "adapters.pth"
SETTINGS = ("freeze", "adapter_rank", "adapter_alpha", "adapter_targets", "adapter_also")
NAME = "default"  # peft's name for the only adapter of a layer
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # the two factors of an adapter: to its rank, and back


def freeze_and_adapt(model: nn.Module, config: TrainConfig, run: Run) -> TrainConfig:
    """Freeze parts of a model and add adapters as the config says; the model stays the same object.

    Return the config, with the settings of `adapter_weights` if that is given. UserError for an unknown part, nothing
    left to train, no peft, or a training that this does not go with.
    """
    saved = read_adapters(config.adapter_weights) if config.adapter_weights else {}
    if saved:
        rank = saved["config"]["adapter_rank"]
        if config.adapter_rank not in (0, rank):
            raise UserError(
                f"adapter_rank is {config.adapter_rank} and {config.adapter_weights} has rank {rank}; "
                "leave adapter_rank out, or begin without adapter_weights"
            )
        config = replace(config, **{key: saved["config"][key] for key in SETTINGS})
    if not config.freeze and not config.adapter_rank:
        return config
    freeze_parts(model, config.freeze)
    if config.adapter_rank:
        add_adapters(model, config)
    if saved:
        load_adapters(model, saved, config.adapter_weights)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trained:
        raise UserError("freeze leaves nothing to train; take a part off that list, or set adapter_rank")
    total = sum(p.numel() for p in model.parameters())
    run.note(f"{trained / 1e6:.3g} of {total / 1e6:.3g} million parameters are trained")
    return config


def freeze_parts(model: nn.Module, names: list[str]) -> None:
    """Freeze top-level parts; UserError if the model has no part of a name."""
    parts = {name: part for name, part in model.named_children() if [*part.parameters()] and not name.endswith("_m")}
    for name in names:
        if name not in parts:
            raise UserError(f"freeze: this model has no part {name!r}; it has {', '.join(parts)}")
        parts[name].requires_grad_(False)


def add_adapters(model: nn.Module, config: TrainConfig) -> None:
    """Add adapters to a model's linear layers, and freeze all but them and the parts of `adapter_also`."""
    if isinstance(model, MomentumModel):
        raise UserError(
            "adapters do not go with retrieval and pretraining, whose momentum models follow whole weights; "
            "set adapter_rank: 0, and freeze parts to train less"
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("adapter_rank needs the package peft; pip install peft, or set adapter_rank: 0") from None
    names = adapted_layers(model, config)
    lora = LoraConfig(r=config.adapter_rank, lora_alpha=config.adapter_alpha, target_modules=names)
    inject_adapter_in_model(lora, model, NAME)
    for wanted in config.adapter_also:
        plain = {name: p for name, p in model.named_parameters() if ".lora_" not in name and ".base_layer." not in name}
        found = [p for name, p in plain.items() if f".{wanted}." in f".{name}."]
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"adapter_also: nothing to train is called {wanted!r}; name one of {parts} or a piece")
        for parameter in found:
            parameter.requires_grad_(True)


def adapted_layers(model: nn.Module, config: TrainConfig) -> list[str]:
    """Return the names of the linear layers that get adapters: those of `adapter_targets` outside frozen parts."""
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found = []
    for wanted in config.adapter_targets:
        names = [name for name in layers if f".{name}".endswith(f".{wanted}")]
        if not names:
            example = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in layers))
            raise UserError(f"adapter_targets: no linear layer is called {wanted!r}; there are {example}")
        if shared := [name for name in names if owners[id(layers[name].weight)] > 1]:
            raise UserError(f"adapter_targets: {shared[0]} shares its weights with another part; leave {wanted!r} out")
        found += [name for name in names if name.split(".")[0] not in config.freeze]
    if not found:
        raise UserError("all layers of adapter_targets are in parts that freeze names; take a part off that list")
    return list(dict.fromkeys(found))


# Checkpoints.


def adapted_states(model: nn.Module) -> tuple[State, State]:
    """Return an adapted model's state under a plain model's names, without adapters, and what it trains.

    The latter are X.lora_A.weight, X.lora_B.weight and whole parts. All processes call this.
    """
    state = parallel.full_state(model)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    base = {key.replace(".base_layer.", "."): value for key, value in state.items() if ".lora_" not in key}
    return base, {key.replace(f".{NAME}.", "."): value for key, value in state.items() if key in trained}


def merged_state(model: nn.Module, config: TrainConfig) -> State:
    """Return a model's whole weights under its plain names, adapters added; all processes call it."""
    if not config.adapter_rank:
        return parallel.full_state(model)
    return add_to_weights(*adapted_states(model), config)


def add_to_weights(state: State, tensors: State, config: Any) -> State:
    """Return a plain model's state dict with adapters added, and with the parts that were trained whole."""
    factors, whole = split_tensors(tensors)
    scale = config["adapter_alpha"] / config["adapter_rank"]
    return state | whole | {name: state[name] + scale * (up @ down) for name, (down, up) in factors.items()}


def split_tensors(tensors: State) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], State]:
    """Return the two factors of each adapter, by the name of its weight, and the weights of parts trained whole."""
    names = [name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    factors = {f"{name}.weight": (tensors[name + DOWN], tensors[name + UP]) for name in names}
    return factors, {name: value for name, value in tensors.items() if not name.endswith((DOWN, UP))}


def adapter_file(model: nn.Module, config: TrainConfig) -> dict[str, Any]:
    """Return the content of adapters.pth: tensors, settings, and the fingerprint of the weights they belong to."""
    base, tensors = adapted_states(model)
    settings = {key: config[key] for key in (*SETTINGS, "pretrained")}
    return {"adapters": tensors, "config": settings, "base": fingerprint(base, tensors)}


def fingerprint(state: State, tensors: State) -> int:
    """Return a checksum of the frozen weights beside adapters."""
    total = 0
    for name in sorted(split_tensors(tensors)[0]):
        total = zlib.crc32(state[name].detach().float().cpu().contiguous().numpy(), total)
    return total


def read_adapters(path: str) -> dict[str, Any]:
    """Read adapters.pth; UserError if there is no such file, or another kind of file."""
    if not Path(path).is_file():
        raise UserError(f"adapter_weights {path} does not exist; correct the path")
    content = torch_load(Path(path))
    if not _is_adapter_file(content):
        raise UserError(f"adapter_weights {path} holds no adapters; give the {FILE} of a run, or set pretrained")
    return content


def _is_adapter_file(content: Any) -> bool:
    try:
        factors, whole = split_tensors(content["adapters"])
        rank = content["config"]["adapter_rank"]
        has_settings = {*SETTINGS, "pretrained"} <= content["config"].keys()
        ranks_fit = all(down.shape[0] == up.shape[1] == rank for down, up in factors.values())
        return ranks_fit and all(map(torch.is_tensor, whole.values())) and "base" in content and has_settings
    except (LookupError, TypeError, AttributeError):
        return False


def load_adapters(model: nn.Module, saved: dict[str, Any], path: str) -> None:
    """Load the adapters of a file into an adapted model; UserError if they are of another architecture or weights."""
    base, own = adapted_states(model)
    _refuse_other_models(base, saved, path)
    if own.keys() != saved["adapters"].keys():
        raise UserError(f"{path} does not adapt all of this model; set vit and med_config as it was trained")
    for name, value in own.items():
        value.copy_(saved["adapters"][name])


def apply_adapters(model: nn.Module, path: str) -> None:
    """Add the adapters of a file to a plain model's weights; errors as `load_adapters`. Needs no peft."""
    saved, state = read_adapters(path), model.state_dict()
    _refuse_other_models(state, saved, path)
    model.load_state_dict(add_to_weights(state, saved["adapters"], saved["config"]))


def _refuse_other_models(state: State, saved: dict[str, Any], path: str) -> None:
    factors, whole = split_tensors(saved["adapters"])
    shapes = {name: (up.shape[0], down.shape[1]) for name, (down, up) in factors.items()}
    shapes |= {name: value.shape for name, value in whole.items()}
    for name, shape in shapes.items():
        if name not in state or state[name].shape != shape:
            raise UserError(f"{path} is of another architecture ({name}); set vit and med_config as it was trained")
    if on_main_process(lambda: fingerprint(state, saved["adapters"])) != saved["base"]:
        start = saved["config"]["pretrained"] or "'' (random weights)"
        raise UserError(f"{path} was trained beside other weights than these; they were pretrained={start}")
