"""Load checkpoints into models, report every entry, and refuse checkpoints that lack what a task needs."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.hub import PIXELS
from models.tokenizer import equal_tokenizers, init_tokenizer
from models.vit import interpolate_pos_embed
from models.weights import Config, State, read_checkpoint, read_source
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
    "dialogue": r"^(caption_proj|itm_head)",
    "pretrain": MOMENTUM,
}
KINDS = (  # of checkpoint: name, prefixes that are present, prefixes that are absent
    ("pretraining", ("itm_head", "text_decoder"), ()),
    ("NLVR2", ("cls_head",), ()),  # or classification, which reads one image
    ("retrieval", ("itm_head", "vision_proj"), ("text_decoder",)),
    ("dialogue", ("itm_head",), ("text_decoder",)),
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

    def show(self) -> None:
        """Print the report on the main process."""
        lines = [f"weights from {self.source}: {len(self.loaded)} entries loaded"]
        for title, keys in (("resized", self.resized), ("fresh", self.fresh), ("left over", self.left_over)):
            lines += [f"  {title}: {grouped(keys)}"] if keys else []
        lines += [f"  note: {note}" for note in self.notes]
        if is_main_process():
            print("\n".join(lines), flush=True)


def grouped(keys: Iterable[str]) -> str:
    """Return keys counted by their first part: "text_encoder (197), temp"."""
    counts = Counter(key.split(".")[0] for key in keys)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def load_pretrained(model: nn.Module, source: str, task: str, allow_pickle: bool = False) -> nn.Module:
    """Load weights into a model for a task of MAY_BE_FRESH, print a report on the main process, and return the model.

    `source` is a path, a URL, `hf:owner/name` (or `hf:` and a local folder), or '' for none; `allow_pickle` accepts a
    file that may run code when it is read. UserError if it is missing, damaged or refused, of another architecture, or
    lacks what the task needs.
    """
    if source:
        state, config = read_checkpoint(source, allow_pickle)
        model.load_report = load_state(model, state, source, task)
        if "folder" in config:
            compare_with_folder(model, config, model.load_report)
        model.load_report.show()
    return model


def refuse_fresh_parts(model: nn.Module) -> None:
    """Refuse to evaluate or predict with fresh random weights, other than those of momentum and queues."""
    report = getattr(model, "load_report", None)
    fresh = [key for key in report.fresh if not re.search(MOMENTUM, key)] if report else []
    if fresh:
        raise UserError(
            f"{report.source} lacks {grouped(fresh)}, which would keep random weights (for instance {fresh[0]}); "
            "fine-tune it first, or give a checkpoint of the task"
        )


def compare_with_folder(model: nn.Module, config: Config, report: LoadReport) -> None:
    """Refuse a folder of transformers with another vocabulary, activation or number of heads than the model's."""
    vocab_file = config["med_config"].get("vocab_file", "")
    if vocab_file != model.text_config.vocab_file and not equal_tokenizers(
        init_tokenizer(vocab_file or None), model.tokenizer
    ):
        raise UserError(f"{report.source} has another vocabulary than the model; set vocab_file in med_config")
    vit = {"layer_norm_eps": 1e-6, "hidden_act": "gelu"} | model.vit_sizes
    for part, own in (("med_config", vars(model.text_config)), ("vit", vit)):
        for key, value in config[part].items():
            if key in ("num_attention_heads", "num_heads", "hidden_act") and own[key] != value:
                raise UserError(
                    f"{report.source} says {key} {value!r}, and the model has {own[key]!r}; set {key} in {part} as the "
                    "folder says, or give hf-released: in place of hf: for an old file of the Hub"
                )
            if key == "layer_norm_eps" and own[key] != value:
                report.notes.append(f"{key} of {part} is {value} in the folder and {own[key]} here")
    if unusual := [f"{key} {config[key]}" for key in PIXELS if key in config]:
        report.notes.append(f"its images have {', '.join(unusual)}: predict.py follows it, training does not")


def load_checkpoint(model: nn.Module, url_or_filename: str) -> tuple[nn.Module, Any]:
    """Load the entries that fit, as the released function does; return the model, and missing and unexpected keys."""
    state = fit_to(model, read_source(url_or_filename), LoadReport(url_or_filename))
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key not in own or own[key].shape == value.shape}
    return model, model.load_state_dict(state, strict=False)


# Fitting a state dict to a model.


def load_state(model: nn.Module, state: State, source: str, task: str) -> LoadReport:
    """Load a state dict as `load_pretrained` does."""
    report, kind, optional = LoadReport(source), checkpoint_kind(state), MAY_BE_FRESH[task]
    described = "a checkpoint of unknown kind" if kind == "unknown" else f"a {kind} checkpoint"
    state, own = fit_to(model, state, report), model.state_dict()
    refuse_not_finite({key: state[key] for key in state if key in own}, source)
    for key in [key for key in state if key in own and state[key].shape != own[key].shape]:
        if not re.search(optional, key):
            raise UserError(
                f"{source} is {described} of another architecture: {key} is {tuple(state[key].shape)} there and "
                f"{tuple(own[key].shape)} here; set vit, med_config and embed_dim as in its training"
            )
        del state[key]
    report.loaded = [key for key in own if key in state]
    report.left_over = [key for key in state if key not in own]
    report.fresh = _untouched(own, report.loaded)
    if needed := [key for key in report.fresh if not re.search(optional, key)]:
        raise UserError(
            f"{source} is {described} and lacks what the task ({task}) needs: {grouped(needed)}, "
            f"for instance {needed[0]}; give a checkpoint of the task or of pretraining"
        )
    model.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    for name, module in model.named_children():  # momentum encoders that the checkpoint lacks
        if name.endswith("_m") and not any(key.startswith(f"{name}.") for key in state):
            module.load_state_dict(getattr(model, name.removesuffix("_m")).state_dict())
    if (task, kind) in NOTES:
        report.notes.append(NOTES[task, kind])
    return report


def refuse_not_finite(state: State, source: str) -> None:
    """Refuse NaN and infinity in weights: results of a training that diverged would mean nothing."""
    for key, value in state.items():
        value = value.float()
        if not value.sum().isfinite() and not value.isfinite().all():  # one pass where the sum is finite
            raise UserError(f"{source} has values in {key} that are not finite; take an earlier checkpoint")


def checkpoint_kind(state: State) -> str:
    """Return the name of the task that a checkpoint was trained for, or "unknown"."""
    prefixes = {key.split(".")[0] for key in state}
    for kind, has, lacks in KINDS:
        if prefixes.issuperset(has) and prefixes.isdisjoint(lacks):
            one_image = kind == "NLVR2" and not any(".crossattention.self0." in key for key in state)
            return "classification" if one_image else kind
    return "unknown"


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
    _add_tokens(own, state, report)
    if any(".crossattention.self0." in key for key in own) and not any(".self0." in key for key in state):
        state = two_image_attention(state)
    return state


def _add_tokens(own: State, state: State, report: LoadReport) -> None:
    """Append the rows of [DEC] and [ENC] to entries of a vocabulary without them."""
    for key in [key for key in own if key in state]:
        value, target = state[key], own[key]
        of_vocabulary = "word_embeddings" in key or "cls.predictions." in key
        if of_vocabulary and value.shape[1:] == target.shape[1:] and len(value) == len(target) - 2:
            state[key] = torch.cat((value, target[len(value) :].to(value.dtype)))
            report.resized.append(key)


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


def _untouched(own: State, loaded: list[str]) -> list[str]:
    """Return entries of a model that were not loaded and share no memory with a loaded one."""
    storages = {own[key].data_ptr() for key in loaded}
    return [key for key, value in own.items() if value.data_ptr() not in storages]


# Starting weights of pretraining.


def load_part(module: nn.Module, state: State, source: str) -> None:
    """Load the entries of another kind of checkpoint that fit a part of a model by name and shape; print a report."""
    own, report = module.state_dict(), LoadReport(source)
    _add_tokens(own, state, report)
    report.loaded = [key for key in own if key in state and state[key].shape == own[key].shape]
    report.fresh = _untouched(own, report.loaded)
    if not report.loaded:
        raise UserError(f"{source} shares no parameter with the model; set vit and med_config to its architecture")
    module.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    report.show()


def load_bert(text: nn.Module, source: str = BERT) -> None:
    """Load BERT into a text transformer, or into a decoder with its LM head; cross-attention stays fresh."""
    prefix = "bert." if hasattr(text, "bert") else ""
    renames = ((r"^(bert\.)?(?=embeddings|encoder)", prefix), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
    state = {}
    for key, value in read_source(source).items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        state[key] = value
    load_part(text, state, source)


def load_vit(visual_encoder: nn.Module, source: str) -> None:
    """Load an image encoder of DeiT or timm; `source` is a checkpoint (DEIT_URL) or a timm name (VIT_IN21K)."""
    if Path(source).is_file() or source.startswith(("http", "hf:")):
        state = read_source(source)
    else:
        state = {}
        on_main_process(lambda: state.update(_timm_weights(source)))
        state = state or _timm_weights(source)  # the other processes read timm's cache
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], visual_encoder)
    load_part(visual_encoder, state, source)


def _timm_weights(name: str) -> State:
    import timm

    try:
        return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(f"timm's {name} could not be loaded ({reason}); set init: random, or pretrained") from None
