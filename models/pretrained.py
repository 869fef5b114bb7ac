"""Every load of weights: what was loaded, resized, left fresh or left over is told; what a task needs must be there."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.vit import interpolate_pos_embed
from models.weights import State, read_source
from utils import UserError, is_main_process, on_main_process

MOMENTUM = r"(_m\.|queue|^temp$)"
# What a task may lack in a file and start fresh. Everything else of its model must be there.
MAY_BE_FRESH = {
    "caption": r"$^",
    "features": r"$^",
    "itm": r"$^",
    "retrieval": MOMENTUM,
    "vqa": r"^text_decoder\..*crossattention\.self\.(key|value)",  # only if it read states of another width
    "nlvr": r"(merge_layer|^cls_head)",
    "pretrain": MOMENTUM,
}
KINDS = (  # how to recognise a checkpoint: its name, prefixes it has, prefixes it lacks
    ("pretraining", ("itm_head", "text_decoder"), ()),
    ("NLVR2", ("cls_head",), ()),
    ("retrieval", ("itm_head",), ("text_decoder",)),
    ("VQA", ("text_encoder", "text_decoder"), ("itm_head",)),
    ("captioning", ("text_decoder",), ("text_encoder",)),
    ("features", ("text_encoder",), ("text_decoder", "itm_head")),
)
MEANING = {
    ("caption", "pretraining"): "a pretraining checkpoint: a start for fine-tuning, but its captions imitate web texts",
    ("vqa", "pretraining"): "a pretraining checkpoint: a start for fine-tuning, but it has not learned to answer",
    ("caption", "VQA"): "a VQA checkpoint: its decoder answers questions, so captions are gibberish until fine-tuned",
}
DEIT_URL = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"
VIT_IN21K = "vit_large_patch16_224.augreg_in21k"
BERT = "hf:google-bert/bert-base-uncased"


@dataclass
class LoadReport:
    """What became of a checkpoint's entries and a model's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return a few lines for people."""
        found = [f"weights from {self.source}: {len(self.loaded)} entries loaded"]
        for title, keys in (("resized", self.resized), ("fresh", self.fresh), ("left over", self.left_over)):
            if keys:
                found.append(f"  {title}: {grouped(keys)}")
        return found + [f"  note: {note}" for note in self.notes]


def grouped(keys: Iterable[str]) -> str:
    """Count keys by their first part: "text_encoder (197), temp"."""
    counts: dict[str, int] = {}
    for key in keys:
        counts[key.split(".")[0]] = counts.get(key.split(".")[0], 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def load_pretrained(model: nn.Module, source: str, task: str, allow_pickle: bool = False) -> nn.Module:
    """Load weights into a model for a task, and tell on the main process what happened.

    Args:
        model: any of the BLIP models.
        source: a path, a URL, `hf:owner/name` (or `hf:` and a local folder), or '' for none.
        task: "caption", "features", "itm", "retrieval", "vqa", "nlvr" or "pretrain".
        allow_pickle: accept a file that may run code when it is read.

    Returns:
        The model.

    Raises:
        UserError: no such file, damaged, refused, of another architecture, or lacking what the task needs.
    """
    if source:
        report = load_state(model, read_source(source, allow_pickle), source, task)
        if is_main_process():
            print("\n".join(report.lines()), flush=True)
    return model


def load_checkpoint(model: nn.Module, url_or_filename: str) -> tuple[nn.Module, Any]:
    """Load what fits, as the released function does; returns the model and its missing and unexpected keys."""
    state = fit_to(model, read_source(url_or_filename), LoadReport(url_or_filename))
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key not in own or own[key].shape == value.shape}
    return model, model.load_state_dict(state, strict=False)


# Fitting a state dict to a model.


def load_state(model: nn.Module, state: State, source: str, task: str) -> LoadReport:
    """Load a state dict as `load_pretrained` does."""
    report = LoadReport(source)
    kind = kind_of(state)
    state = fit_to(model, state, report)
    own = model.state_dict()
    _refuse_other_shapes(own, state, report, task, kind)
    report.loaded = [key for key in own if key in state]
    report.left_over = [key for key in state if key not in own]
    _refuse_missing(own, state, report, task, kind)
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    start_twins(model, state)
    if (task, kind) in MEANING:
        report.notes.append(MEANING[task, kind])
    return report


def kind_of(state: State) -> str:
    """Recognise what a checkpoint was trained for."""
    prefixes = {key.split(".")[0] for key in state}
    for kind, has, lacks in KINDS:
        if prefixes.issuperset(has) and prefixes.isdisjoint(lacks):
            return kind
    return "unknown"


def fit_to(model: nn.Module, state: State, report: LoadReport) -> State:
    """Bring entries to the model's form: position embeddings, vocabulary, NLVR2's two cross-attentions."""
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    for name in ("visual_encoder", "visual_encoder_m"):
        key = f"{name}.pos_embed"
        if key not in state or key not in own or state[key].shape == own[key].shape:
            continue
        if state[key].shape[-1] == own[key].shape[-1]:
            state[key] = interpolate_pos_embed(state[key], getattr(model, name))
            report.resized.append(key)
    for key in list(state):
        if key in own and _lacks_added_tokens(key, state[key], own[key]):
            state[key] = torch.cat((state[key], own[key][len(state[key]) :].to(state[key].dtype)))
            report.resized.append(key)
    if any(".crossattention.self0." in key for key in own) and not any(".self0." in key for key in state):
        state = two_image_attention(state)
    return state


def _lacks_added_tokens(key: str, value: torch.Tensor, own: torch.Tensor) -> bool:
    """Tell whether an entry is of BERT's vocabulary, without [DEC] and [ENC]."""
    vocabulary = "word_embeddings" in key or "cls.predictions." in key
    return vocabulary and value.shape[1:] == own.shape[1:] and len(value) == len(own) - 2


def two_image_attention(state: State) -> State:
    """Start both of NLVR2's cross-attention sets from the one of a one-image checkpoint."""
    result = {}
    for key, value in state.items():
        copies = [key]
        if ".crossattention.self." in key:
            copies = [key.replace(".self.", f".self{i}.", 1) for i in (0, 1)]
        elif ".crossattention.output.dense." in key:
            copies = [key.replace(".dense.", f".dense{i}.") for i in (0, 1)]
        result |= dict.fromkeys(copies, value)
    return result


def _refuse_other_shapes(own: State, state: State, report: LoadReport, task: str, kind: str) -> None:
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    for key in wrong:
        if not re.search(MAY_BE_FRESH[task], key):
            raise UserError(
                f"{report.source} is a {kind} checkpoint of another architecture: {key} is "
                f"{tuple(state[key].shape)} there and {tuple(own[key].shape)} here; set vit, med_config and embed_dim "
                "as it was trained"
            )
    for key in wrong:
        del state[key]


def _refuse_missing(own: State, state: State, report: LoadReport, task: str, kind: str) -> None:
    missing = _untouched(own, report.loaded)
    needed = [key for key in missing if not re.search(MAY_BE_FRESH[task], key)]
    if needed:
        raise UserError(
            f"{report.source} is a {kind} checkpoint and lacks what the task ({task}) needs: {grouped(needed)}, "
            f"for instance {needed[0]}; give a checkpoint of the task or of pretraining"
        )
    report.fresh = missing


def _untouched(own: State, loaded: list[str]) -> list[str]:
    """Return a model's entries that were not loaded, nor share memory with one that was."""
    storages = {own[key].data_ptr() for key in loaded}
    return [key for key, value in own.items() if value.data_ptr() not in storages]


def start_twins(model: nn.Module, state: State) -> None:
    """Make momentum copies that a file lacks copies of what was loaded."""
    for name, module in model.named_children():
        if name.endswith("_m") and not any(key.startswith(f"{name}.") for key in state):
            module.load_state_dict(getattr(model, name.removesuffix("_m")).state_dict())


# Starting weights of pretraining.


def load_part(module: nn.Module, state: State, source: str) -> None:
    """Load what a part of a model shares, by name and shape, with a checkpoint of another kind; tell what it was."""
    own, report = module.state_dict(), LoadReport(source)
    for key in list(state):
        if key in own and _lacks_added_tokens(key, state[key], own[key]):
            state[key] = torch.cat((state[key], own[key][len(state[key]) :]))
            report.resized.append(key)
    report.loaded = [key for key in own if key in state and state[key].shape == own[key].shape]
    report.fresh = _untouched(own, report.loaded)
    if not report.loaded:
        raise UserError(f"{source} shares no parameter with the model; set vit and med_config to its architecture")
    module.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    if is_main_process():
        print("\n".join(report.lines()), flush=True)


def load_bert(text: nn.Module, source: str = BERT) -> None:
    """Start a text transformer, or a decoder with its LM head, from BERT.

    Cross-attention stays fresh; token types and pooler are left out.
    """
    prefix = "bert." if hasattr(text, "bert") else ""
    renames = ((r"^(bert\.)?(?=embeddings|encoder)", prefix), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
    state = {}
    for key, value in read_source(source).items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        state[key] = value
    load_part(text, state, source)


def load_deit(visual_encoder: nn.Module, source: str = DEIT_URL) -> None:
    """Start the base image encoder from DeiT-B/16 (224 px)."""
    _load_vit(visual_encoder, read_source(source), source)


def load_vit_in21k(visual_encoder: nn.Module, source: str = VIT_IN21K) -> None:
    """Start the large image encoder from ViT-L/16 trained on ImageNet-21k: a timm name, or a file."""
    if Path(source).is_file() or source.startswith(("http", "hf:")):
        _load_vit(visual_encoder, read_source(source), source)
        return
    state: State = {}
    on_main_process(lambda: state.update(_timm_weights(source)))
    _load_vit(visual_encoder, state or _timm_weights(source), source)  # the others find it in timm's cache


def _timm_weights(name: str) -> State:
    import timm

    load: Callable[..., nn.Module] = timm.create_model
    try:
        return load(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"timm's weights {name} could not be had ({reason}); set init: random, or pretrained") from None


def _load_vit(visual_encoder: nn.Module, state: State, source: str) -> None:
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], visual_encoder)
    load_part(visual_encoder, state, source)


if __name__ == "__main__":
    from models.convert import main

    raise SystemExit(main())
