"""Load checkpoints into models, report every entry, and refuse checkpoints that lack what a task needs."""

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
# what a checkpoint may lack for a task, and then starts fresh; it must have every other entry of the model
MAY_BE_FRESH = {
    "caption": r"$^",
    "features": r"$^",
    "itm": r"$^",
    "retrieval": MOMENTUM,
    "vqa": r"^text_decoder\..*crossattention\.self\.(key|value)",  # only if their width differs
    "nlvr": r"(merge_layer|^cls_head)",
    "classification": r"^cls_head",
    "pretrain": MOMENTUM,
}
KINDS = (  # of checkpoint: name, prefixes that are present, prefixes that are absent
    ("pretraining", ("itm_head", "text_decoder"), ()),
    ("NLVR2", ("cls_head",), ()),  # or classification, which reads one image
    ("retrieval", ("itm_head",), ("text_decoder",)),
    ("VQA", ("text_encoder", "text_decoder"), ("itm_head",)),
    ("captioning", ("text_decoder",), ("text_encoder",)),
    ("features", ("text_encoder",), ("text_decoder", "itm_head")),
)
NOTES = {
    ("caption", "pretraining"): "a pretraining checkpoint: a start for fine-tuning, but its captions imitate web texts",
    ("vqa", "pretraining"): "a pretraining checkpoint: a start for fine-tuning, but it has not learned to answer",
    ("caption", "VQA"): "a VQA checkpoint: its decoder answers questions, so captions are gibberish until fine-tuned",
}
DEIT_URL = "https://dl.fbaipublicfiles.com/deit/deit_base_patch16_224-b5f2ef4d.pth"
VIT_IN21K = "vit_large_patch16_224.augreg_in21k"
BERT = "hf:google-bert/bert-base-uncased"


@dataclass
class LoadReport:
    """How the entries of a checkpoint and of a model matched."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        found = [f"weights from {self.source}: {len(self.loaded)} entries loaded"]
        for title, keys in (("resized", self.resized), ("fresh", self.fresh), ("left over", self.left_over)):
            if keys:
                found.append(f"  {title}: {grouped(keys)}")
        return found + [f"  note: {note}" for note in self.notes]


def grouped(keys: Iterable[str]) -> str:
    """Return keys counted by their first part: "text_encoder (197), temp"."""
    counts: dict[str, int] = {}
    for key in keys:
        counts[key.split(".")[0]] = counts.get(key.split(".")[0], 0) + 1
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def load_pretrained(model: nn.Module, source: str, task: str, allow_pickle: bool = False) -> nn.Module:
    """Load weights into a model for a task, and print a report on the main process.

    Args:
        model: any of the BLIP models.
        source: a path, a URL, `hf:owner/name` (or `hf:` and a local folder), or '' for none.
        task: "caption", "features", "itm", "retrieval", "vqa", "nlvr" or "pretrain".
        allow_pickle: accept a file that may run code when it is read.

    Returns:
        The model.

    Raises:
        UserError: the file is missing, damaged or refused, of another architecture, or lacks what the task needs.
    """
    if source:
        report = model.load_report = load_state(model, read_source(source, allow_pickle), source, task)
        if is_main_process():
            print("\n".join(report.lines()), flush=True)
    return model


def refuse_fresh_parts(model: nn.Module) -> None:
    """Refuse a model to evaluate or predict with, parts of which its checkpoint lacks.

    Raises:
        UserError: parts other than those of momentum and queues have fresh random weights.
    """
    report = getattr(model, "load_report", None)
    fresh = [key for key in report.fresh if not re.search(MOMENTUM, key)] if report else []
    if fresh:
        raise UserError(
            f"{report.source} lacks {grouped(fresh)}, which would keep random weights (for instance {fresh[0]}); "
            "fine-tune it first, or give a checkpoint of the task"
        )


def load_checkpoint(model: nn.Module, url_or_filename: str) -> tuple[nn.Module, Any]:
    """Load the entries that fit, as the released function does; return the model, and missing and unexpected keys."""
    state = fit_to(model, read_source(url_or_filename), LoadReport(url_or_filename))
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key not in own or own[key].shape == value.shape}
    return model, model.load_state_dict(state, strict=False)


# Fitting a state dict to a model.


def load_state(model: nn.Module, state: State, source: str, task: str) -> LoadReport:
    """Load a state dict as `load_pretrained` does."""
    report = LoadReport(source)
    kind = checkpoint_kind(state)
    state = fit_to(model, state, report)
    own = model.state_dict()
    _refuse_other_shapes(own, state, report, task, kind)
    report.loaded = [key for key in own if key in state]
    report.left_over = [key for key in state if key not in own]
    _refuse_missing(own, state, report, task, kind)
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    start_momentum(model, state)
    if (task, kind) in NOTES:
        report.notes.append(NOTES[task, kind])
    return report


def checkpoint_kind(state: State) -> str:
    """Return the name of the task that a checkpoint was trained for, or "unknown"."""
    prefixes = {key.split(".")[0] for key in state}
    for kind, has, lacks in KINDS:
        if prefixes.issuperset(has) and prefixes.isdisjoint(lacks):
            one_image = kind == "NLVR2" and not any(".crossattention.self0." in key for key in state)
            return "classification" if one_image else kind
    return "unknown"


def describe_kind(kind: str) -> str:
    """Return a kind of checkpoint as messages name it."""
    return "a checkpoint of unknown kind" if kind == "unknown" else f"a {kind} checkpoint"


def fit_to(model: nn.Module, state: State, report: LoadReport) -> State:
    """Adapt entries to the model: position embeddings, vocabulary, the two cross-attentions of NLVR2."""
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    if "ptr_queue" in own and {"queue_ptr", "idx_queue"} <= state.keys():  # retrieval in LAVIS; not pretraining
        state.setdefault("ptr_queue", state.pop("queue_ptr"))
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
    """Return True if an entry belongs to a vocabulary without [DEC] and [ENC]."""
    vocabulary = "word_embeddings" in key or "cls.predictions." in key
    return vocabulary and value.shape[1:] == own.shape[1:] and len(value) == len(own) - 2


def two_image_attention(state: State) -> State:
    """Copy the cross-attention of a one-image checkpoint to both sets of NLVR2."""
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
                f"{report.source} is {describe_kind(kind)} of another architecture: {key} is "
                f"{tuple(state[key].shape)} there and {tuple(own[key].shape)} here; set vit, med_config and embed_dim "
                "as in its training"
            )
    for key in wrong:
        del state[key]


def _refuse_missing(own: State, state: State, report: LoadReport, task: str, kind: str) -> None:
    missing = _untouched(own, report.loaded)
    needed = [key for key in missing if not re.search(MAY_BE_FRESH[task], key)]
    if needed:
        raise UserError(
            f"{report.source} is {describe_kind(kind)} and lacks what the task ({task}) needs: {grouped(needed)}, "
            f"for instance {needed[0]}; give a checkpoint of the task or of pretraining"
        )
    report.fresh = missing


def _untouched(own: State, loaded: list[str]) -> list[str]:
    """Return entries of a model that were not loaded and share no memory with a loaded one."""
    storages = {own[key].data_ptr() for key in loaded}
    return [key for key, value in own.items() if value.data_ptr() not in storages]


def start_momentum(model: nn.Module, state: State) -> None:
    """Copy the loaded encoders to momentum encoders that the checkpoint lacks."""
    for name, module in model.named_children():
        if name.endswith("_m") and not any(key.startswith(f"{name}.") for key in state):
            module.load_state_dict(getattr(model, name.removesuffix("_m")).state_dict())


# Starting weights of pretraining.


def load_part(module: nn.Module, state: State, source: str) -> None:
    """Load the entries of another kind of checkpoint that fit a part of a model by name and shape; print a report."""
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
    """Load BERT into a text transformer, or into a decoder with its LM head.

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
    """Load DeiT-B/16 (224 px) into the base image encoder."""
    _load_vit(visual_encoder, read_source(source), source)


def load_vit_in21k(visual_encoder: nn.Module, source: str = VIT_IN21K) -> None:
    """Load ViT-L/16 trained on ImageNet-21k into the large image encoder; `source` is a timm name or a file."""
    if Path(source).is_file() or source.startswith(("http", "hf:")):
        _load_vit(visual_encoder, read_source(source), source)
        return
    state: State = {}
    on_main_process(lambda: state.update(_timm_weights(source)))
    _load_vit(visual_encoder, state or _timm_weights(source), source)  # the other processes read timm's cache


def _timm_weights(name: str) -> State:
    import timm

    load: Callable[..., nn.Module] = timm.create_model
    try:
        return load(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"timm's {name} could not be loaded ({reason}); set init: random, or pretrained") from None


def _load_vit(visual_encoder: nn.Module, state: State, source: str) -> None:
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], visual_encoder)
    load_part(visual_encoder, state, source)
