"""Configurations: dataclasses read from YAML and `--set a.b=c`; errors name the file and the line."""

import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ruamel.yaml import YAML

from files import write_whole
from launch.ranges import RANGES, check_ranges
from launch.yaml_file import BAD_YAML, WORDS, abbreviate, describe_value, parse, plain, read_settings
from utils import UserError

CODE_FOLDER = Path(__file__).resolve().parent.parent
ATTENTION_MAPS = ("attn.qkv", "attn.proj", "query", "key", "value")


def setting(default: Any, text: str) -> Any:
    """Declare a configuration key with its default and one line of explanation."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


class Settings:
    """Mapping access to a dataclass of settings."""

    def __getitem__(self, key: str) -> Any:
        try:
            return getattr(self, key)
        except AttributeError:
            raise KeyError(key) from None

    def __contains__(self, key: str) -> bool:
        return hasattr(self, key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default` for a key this task does not have."""
        return getattr(self, key, default)


@dataclass
class ModelConfig(Settings):
    """What every task needs to build its model and to run."""

    image_root: str = setting("", "folder that annotations' image paths start from and must not leave; '' for any")
    ann_root: str = setting("annotation", "folder of the annotation files; absent files are downloaded to it")
    pretrained: str = setting("", "weights to start from: a path, a URL or hf:owner/name; '' for none")
    allow_pickle: bool = setting(False, "accept a checkpoint that may run code when read; only from those you trust")
    vit: str | dict = setting("base", "tiny, small, base, large, or embed_dim, depth, num_heads, patch_size")
    med_config: str | dict = setting("", "text transformer: a JSON file or a mapping; '' for configs/med_config.json")
    vit_grad_ckpt: bool = setting(False, "recompute the last ViT blocks in the backward pass, to save memory")
    vit_ckpt_layer: int = setting(0, "number of final ViT blocks to checkpoint")
    grad_ckpt: str = setting("torch", "checkpointing of ViT blocks by 'torch', or by 'fairscale' as released")
    image_size: int = setting(384, "side of the square input in pixels")
    exif_orientation: bool = setting(False, "turn images as EXIF says, and scale 16 bits to 8, as predict.py does")
    num_workers: int = setting(4, "processes that load data, per process that trains")
    amp: str = setting("", "mixed precision: 'bf16', 'fp16' (older GPUs), 'auto' (bf16 where fast), '' for float32")
    tf32: bool = setting(True, "float32 products on a GPU use TF32, as the released code did")
    compile: bool = setting(False, "compile the transformer blocks")
    deterministic: bool = setting(False, "PyTorch's deterministic algorithms, to repeat a run on a GPU; slower")
    cpu_products: str = setting("auto", "float32 products on a CPU: 'onednn', 'torch', or 'auto': oneDNN with AVX-512")

    def model_settings(self) -> dict[str, Any]:
        """Return the arguments that every model's factory takes."""
        keys = ("pretrained", "allow_pickle", "med_config", "image_size", "vit", "vit_grad_ckpt", "vit_ckpt_layer")
        return {key: self[key] for key in keys}


@dataclass
class TrainConfig(ModelConfig):
    """What every training adds."""

    init_lr: float = setting(1e-5, "learning rate at the start")
    min_lr: float = setting(0.0, "learning rate at the end")
    weight_decay: float = setting(0.05, "of AdamW, on every parameter")
    decay_norms: bool = setting(True, "weight decay on biases and norms too, as released")
    lr_layer_decay: float = setting(1.0, "factor on the learning rate of each ViT block, from last to first")
    max_epoch: int = setting(5, "passes over the training data")
    schedule: str = setting("epoch", "the learning rate changes every 'epoch', as released, or every 'step'")
    warmup: int = setting(0, "steps of linear warm-up, with schedule: step")
    grad_accum: int = setting(1, "batches whose gradients are added up for one step")
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0 for no limit")
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch is always evaluated")
    log_every: int = setting(50, "steps between two readings of the losses")
    save_every: int = setting(0, "steps between two checkpoints; 0 for one an epoch")
    hang_minutes: float = setting(15.0, "longest a step, or waiting for its data, may take; 0 for no limit")
    parallel: str = setting("ddp", "each process holds all weights (ddp), or a shard of weights and optimizer (fsdp)")
    text_grad_ckpt: bool = setting(False, "recompute the text transformer's layers in the backward pass too")
    tensorboard: bool = setting(False, "also write TensorBoard's event files")
    reduced_jpeg: bool = setting(False, "in training decode large JPEGs at a lower scale that no crop misses: faster")
    freeze: list = setting([], "parts of the model that stay as they are: visual_encoder, text_encoder, text_decoder")
    adapter_rank: int = setting(0, "train only low-rank adapters of this rank, with the package peft; 0 for none")
    adapter_alpha: float = setting(16.0, "what adapters add is scaled by this over their rank")
    adapter_targets: list = setting([*ATTENTION_MAPS], "linear layers that get adapters, by the end of their names")
    adapter_also: list = setting([], "parts trained whole beside adapters, by a piece of their names")
    adapter_weights: str = setting("", "adapters to start from, or to evaluate with: adapters.pth of a run")
    augment: bool = setting(True, "random crop, flip and RandAugment in training; off: resize only")


@dataclass
class CaptionConfig(TrainConfig):
    """Captioning (paper section 5.2)."""

    coco_gt_root: str = setting("annotation/coco_gt", "folder of the ground-truth files in COCO format")
    train_file: str = setting("", "own training annotations; '' for coco_karpathy_train.json")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_file")
    val_file: str = setting("", "own validation annotations; '' for coco_karpathy_val.json")
    test_file: str = setting("", "own test annotations; '' for coco_karpathy_test.json")
    splits: list = setting(["val", "test"], "splits that --evaluate reads: val, test or both")
    val_gt: str = setting("", "own validation ground truth; '' for coco_karpathy_val_gt.json")
    test_gt: str = setting("", "own test ground truth; '' for coco_karpathy_test_gt.json")
    batch_size: int = setting(32, "images per process and step")
    max_length: int = setting(20, "longest caption in tokens, prompt included")
    min_length: int = setting(5, "shortest caption in tokens, prompt included")
    num_beams: int = setting(3, "width of the beam search")
    prompt: str = setting("a picture of ", "what every caption begins with")
    java: bool = setting(True, "also compute what needs Java: METEOR, SPICE, the tokenizer of published scores")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class RetrievalConfig(TrainConfig):
    """Image-text retrieval (paper section 5.1)."""

    dataset: str = setting("coco", "'coco' or 'flickr'")
    train_file: str = setting("", "own training annotations; '' for the dataset's")
    val_file: str = setting("", "own validation annotations; '' for the dataset's")
    test_file: str = setting("", "own test annotations; '' for the dataset's")
    splits: list = setting(["val", "test"], "splits that --evaluate reads: val, test or both")
    batch_size_train: int = setting(32, "pairs per process and step")
    batch_size_test: int = setting(64, "images or texts at once in evaluation")
    queue_size: int = setting(57600, "features kept in each queue")
    alpha: float = setting(0.4, "share of the momentum model in the contrastive targets")
    k_test: int = setting(256, "candidates that the matching head re-ranks")
    keep_images: str = setting("auto", "image tokens wait on 'device', 'host', or 'auto': host if half full")
    negative_all_rank: bool = setting(True, "draw hard negatives from all processes, not the own batch only")
    itc_all_ranks: bool = setting(False, "contrast with the pairs of all processes, beside the queues")
    itc_cached: bool = setting(False, "contrast with the pairs of all grad_accum batches, as one large batch would")
    embed_dim: int = setting(256, "width of the contrastive features")


@dataclass
class VQAConfig(TrainConfig):
    """Visual question answering (paper section 5.3)."""

    vqa_root: str = setting("", "folder of the VQA images (COCO's)")
    vg_root: str = setting("", "folder of the Visual Genome images")
    train_files: list = setting(["vqa_train", "vqa_val", "vg_qa"], "annotation files to train on, without .json")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_files")
    test_file: str = setting("", "own test questions; '' for vqa_test.json")
    answer_list: str = setting("", "own candidate answers; '' for answer_list.json")
    batch_size_train: int = setting(16, "questions per process and step")
    batch_size_test: int = setting(32, "questions at once in evaluation")
    k_test: int = setting(128, "candidates ranked in full")
    inference: str = setting("rank", "'rank' a list of answers, 'generate' freely, or rank the question's 'choices'")
    scoring: str = setting("vqa", "accuracy as in VQA v2 and OK-VQA: 'vqa', in A-OKVQA: 'aokvqa', in GQA: 'exact'")
    drop_path_rate: float = setting(0.1, "stochastic depth of the image encoder")
    mask_padding: bool = setting(True, "generated answers ignore padded questions; false: as the released code")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class NLVRConfig(TrainConfig):
    """Statements about two images (paper section 5.4)."""

    train_file: str = setting("", "own training annotations; '' for nlvr_train.json")
    val_file: str = setting("", "own validation annotations; '' for nlvr_dev.json")
    test_file: str = setting("", "own test annotations; '' for nlvr_test.json")
    splits: list = setting(["val", "test"], "splits that --evaluate reads: val, test or both")
    batch_size_train: int = setting(16, "statements per process and step")
    batch_size_test: int = setting(64, "statements at once in evaluation")
    drop_path_rate: float = setting(0.1, "stochastic depth of the image encoder")
    adapter_also: list = setting(["cls_head", "merge_layer"], "as for every task; by default what is new in NLVR2")
    released_eval_swap: bool = setting(False, "swap images at random in evaluation too, as the released code did")


@dataclass
class ClassificationConfig(TrainConfig):
    """Classification of images, with or without a text (not in the paper; after LAVIS)."""

    classes: list = setting([], "names of the classes, in the order of their numbers; [] takes those of the folders")
    train_file: str = setting("", "own annotations, or a folder with a folder for each class; '' for ve_train.json")
    val_file: str = setting("", "the same for validation; '' for ve_dev.json")
    test_file: str = setting("", "the same for the test; '' for ve_test.json")
    splits: list = setting(["val", "test"], "splits that --evaluate reads: val, test or both")
    text: str = setting("", "text that goes with every image of a folder")
    batch_size_train: int = setting(32, "examples per process and step")
    batch_size_test: int = setting(64, "examples at once in evaluation")
    drop_path_rate: float = setting(0.0, "stochastic depth of the image encoder")
    adapter_also: list = setting(["cls_head"], "as for every task; by default what is new in classification")
    zero_shot: bool = setting(False, "compare images with the names of the classes by contrast, without training")
    templates: list = setting(["a photo of a {}"], "texts that name a class in zero-shot classification")
    temperature: float = setting(0.01, "of the softmax over classes in zero-shot classification")
    embed_dim: int = setting(256, "width of the contrastive features, in zero-shot classification")


@dataclass
class NoCapsConfig(ModelConfig):
    """Captions for objects never seen in training (paper section 5.2)."""

    val_file: str = setting("", "own validation images; '' for nocaps_val.json")
    test_file: str = setting("", "own test images; '' for nocaps_test.json")
    splits: list = setting(["val", "test"], "splits to caption: val, test or both")
    val_gt: str = setting("", "ground truth in COCO format, if there is one")
    test_gt: str = setting("", "ground truth in COCO format, if there is one")
    batch_size: int = setting(32, "images at once")
    max_length: int = setting(20, "longest caption in tokens, prompt included")
    min_length: int = setting(5, "shortest caption in tokens, prompt included")
    num_beams: int = setting(3, "width of the beam search")
    repetition_penalty: float = setting(1.1, "above 1 discourages words already said")
    prompt: str = setting("a picture of ", "what every caption begins with")
    java: bool = setting(True, "also compute what needs Java: METEOR, SPICE, the tokenizer of published scores")


@dataclass
class VideoConfig(ModelConfig):
    """Zero-shot text-to-video retrieval (paper section 5.6)."""

    video_root: str = setting("", "folder of the clips")
    test_file: str = setting("", "own captions; '' for msrvtt_test.jsonl")
    batch_size: int = setting(64, "texts at once")
    num_frm_test: int = setting(8, "frames per clip, evenly spaced")
    k_test: int = setting(128, "candidates that the matching head re-ranks")
    keep_images: str = setting("auto", "image tokens wait on 'device', 'host', or 'auto': host if half full")
    embed_dim: int = setting(256, "width of the contrastive features")


@dataclass
class VideoQAConfig(ModelConfig):
    """Zero-shot questions about clips (paper section 5.6)."""

    video_root: str = setting("", "folder of the clips")
    test_file: str = setting("", "questions in the format of MSRVTT-QA or MSVD-QA")
    video_map: str = setting("", "MSVD-QA's youtube_mapping.txt, with lines '<name> vid<n>'; '' for clips video<n>")
    answer_list: str = setting("", "own candidate answers; '' for answer_list.json")
    batch_size: int = setting(64, "questions at once")
    num_frm_test: int = setting(16, "frames per clip, evenly spaced")
    k_test: int = setting(128, "candidates ranked in full")
    inference: str = setting("generate", "'generate' answers freely, or 'rank' a list of answers")
    smooth_padding: bool = setting(True, "ranking counts padding, as the released code does")


@dataclass
class PretrainConfig(TrainConfig):
    """Pretraining (paper section 4.1)."""

    train_file: list = setting([], "lists of pairs, JSON or JSON lines; or tar shards, as a/{000..131}.tar or pipe:...")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_file")
    shard_pairs: int = setting(0, "pairs in all tar shards; 0 counts them")
    shuffle_buffer: int = setting(2000, "pairs of shards among which each worker draws the next; 1 keeps their order")
    laion_path: str = setting("", "folder of further lists, one per epoch in turn; '' for none")
    init: str = setting("released", "starting weights: 'released' (DeiT or ViT-in21k, and BERT) or 'random'")
    batch_size: int = setting(75, "pairs per process and step")
    queue_size: int = setting(57600, "features kept in each queue")
    alpha: float = setting(0.4, "share of the momentum model in the contrastive targets")
    itc_all_ranks: bool = setting(False, "contrast with the pairs of all processes, beside the queues")
    itc_cached: bool = setting(False, "contrast with the pairs of all grad_accum batches, as one large batch would")
    warmup_lr: float = setting(1e-6, "learning rate at the start of the warm-up")
    lr_decay_rate: float = setting(0.9, "factor on the learning rate after each epoch")
    warmup_steps: int = setting(3000, "steps of linear warm-up")
    embed_dim: int = setting(256, "width of the contrastive features")
    max_bad_images: int = setting(1000, "unreadable images that are replaced before the run stops")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class CapFiltConfig(Settings):
    """Captioning and filtering of web pairs (paper section 3.3)."""

    pairs: list = setting([], "lists of web pairs, JSON or JSON lines; or tar shards, as a/{000..131}.tar or pipe:...")
    image_root: str = setting("", "folder that the pairs' image paths start from")
    captioner: str = setting("", "checkpoint that writes captions: a path, a URL or hf:owner/name")
    filter: str = setting("", "checkpoint that judges texts: a path, a URL or hf:owner/name")
    allow_pickle: bool = setting(False, "accept checkpoints that may run code when read; only from those you trust")
    stage: str = setting("both", "'caption' only, 'filter' only (web texts, and captions if written), or 'both'")
    sample: bool = setting(True, "nucleus sampling, as in the paper; false for beam search")
    top_p: float = setting(0.9, "share of probability that sampling draws from")
    num_beams: int = setting(3, "width of the beam search")
    num_captions: int = setting(1, "synthetic captions of each image")
    max_length: int = setting(20, "longest caption in tokens, prompt included")
    min_length: int = setting(5, "shortest caption in tokens, prompt included")
    repetition_penalty: float = setting(1.1, "above 1 discourages words already said; 1.1 as in released sampling")
    threshold: float = setting(0.5, "least probability of a match of texts that are kept")
    shard_size: int = setting(1000, "pairs of one shard, the unit of work; of tar shards, how many are held at once")
    batch_size: int = setting(64, "images at once")
    num_workers: int = setting(0, "processes that read images, per process")
    amp: str = setting("", "mixed precision: 'bf16', 'fp16' (older GPUs), 'auto' (bf16 where fast), '' for float32")


Config = TypeVar("Config", bound=Settings)


def load_config(config_class: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `key=value` overrides.

    Args:
        config_class: the task's dataclass.
        path: YAML file; a released path such as configs/vqa.yaml is also looked for beside the code.
        overrides: "key=value", value in YAML; "vit.depth=4" changes one entry of a mapping.

    Raises:
        UserError: no such file, not YAML, an unknown key, a wrong type or a value out of range, with file and line.
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
        raise UserError(f"--set got {abbreviate(override)}; expected key=value, for instance --set batch_size=8")
    try:
        value = plain(parse(text)) if text else ""
    except BAD_YAML:
        raise UserError(f"--set {abbreviate(override)}: the value is not YAML; put it in quotes") from None
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            problem = f"{parent} is {describe_value(values)}, not a mapping; set {parent} as a whole"
            raise UserError(f"--set {abbreviate(override)}: {problem}")
    values[last] = value
    places[key.split(".")[0]] = f"--set {override}"[:80]


def _build(config_class: type[Config], values: dict[str, Any], places: dict[str, str]) -> Config:
    known: dict[str, Field] = {f.name: f for f in fields(config_class)}
    hints = typing.get_type_hints(config_class)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"this task has {', '.join(sorted(known))}"
            raise UserError(f"{places[key]}: unknown key {abbreviate(key)}; {meant}")
        values[key] = _convert(value, hints[key], f"{places[key]}: {key}")
    config = config_class(**values)
    check_ranges(config, places)
    return config


def _convert(value: Any, hint: Any, place: str) -> Any:
    """Return a value as the type of its field.

    Raises:
        UserError: it has another type.
    """
    allowed = typing.get_args(hint) or (hint,)
    if value is None and str in allowed:
        return ""
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) in allowed:
        return value
    if list in allowed and isinstance(value, str):
        return [value]
    wanted = " or ".join(WORDS[kind] for kind in allowed)
    raise UserError(f"{place} is {describe_value(value)}; expected {wanted}")


def save_config(config: ModelConfig, path: Path) -> None:
    """Write a configuration as YAML; the file starts the same run again."""
    with write_whole(path) as file:
        YAML().dump(asdict(config), file)


def describe(config_class: type[ModelConfig]) -> Iterator[str]:
    """Yield a line per key: name, default, meaning, range."""
    for item in fields(config_class):
        default = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
        limits = f" ({RANGES[item.name]})" if item.name in RANGES else ""
        yield f"  {item.name}: {default!r}".ljust(36) + item.metadata["help"] + limits
