"""The settings of every task: dataclasses of keys with their default, meaning and range."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

ATTENTION_MAPS = ("attn.qkv", "attn.proj", "query", "key", "value")
AMP = ("", "bf16", "fp16", "auto")
PRODUCTS = ("auto", "onednn", "torch")
SCORING = ("vqa", "aokvqa", "exact")
KEEP_IMAGES = ("auto", "device", "host")


def setting(default: Any, text: str, allowed: str | tuple[str, ...] = "") -> Any:
    """Declare a key with its default, one line of explanation, and its range, such as "> 0 and <= 1", or choices."""
    metadata = {"help": text, "allowed": allowed}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Mapping access to a dataclass of settings."""

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

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
    vit_ckpt_layer: int = setting(0, "number of final ViT blocks to checkpoint", ">= 0")
    grad_ckpt: str = setting("torch", "what checkpoints ViT blocks; as released: fairscale", ("torch", "fairscale"))
    image_size: int = setting(384, "side of the square input in pixels", ">= 1")
    exif_orientation: bool = setting(False, "turn images as EXIF says, and scale 16 bits to 8, as predict.py does")
    num_workers: int = setting(4, "processes that load data, per process that trains", ">= 0")
    amp: str = setting("", "mixed precision; auto: bf16 where it is fast; '': float32", AMP)
    tf32: bool = setting(True, "float32 products on a GPU use TF32, as the released code did")
    compile: bool = setting(False, "compile the transformer blocks")
    deterministic: bool = setting(False, "PyTorch's deterministic algorithms, to repeat a run on a GPU; slower")
    cpu_products: str = setting("auto", "float32 products on a CPU; auto: onednn, with AVX2 for few rows", PRODUCTS)

    def model_settings(self, *more: str) -> dict[str, Any]:
        """Return the arguments that every model's factory takes, and those of one task."""
        keys = ("pretrained", "allow_pickle", "med_config", "image_size", "vit", "vit_grad_ckpt", "vit_ckpt_layer")
        return {key: self[key] for key in (*keys, *more)}


@dataclass
class TrainConfig(ModelConfig):
    """What every training adds."""

    init_lr: float = setting(1e-5, "learning rate at the start", ">= 0")
    min_lr: float = setting(0.0, "learning rate at the end", ">= 0")
    weight_decay: float = setting(0.05, "of AdamW, on every parameter", ">= 0")
    decay_norms: bool = setting(True, "weight decay on biases and norms too, as released")
    lr_layer_decay: float = setting(1.0, "factor on the learning rate from each ViT block to the last", "> 0 and <= 1")
    max_epoch: int = setting(5, "passes over the training data", ">= 1")
    schedule: str = setting("epoch", "when the learning rate changes; as released: epoch", ("epoch", "step"))
    warmup: int = setting(0, "steps of linear warm-up, with schedule: step", ">= 0")
    grad_accum: int = setting(1, "batches whose gradients are added up for one step", ">= 1")
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0 for no limit", ">= 0")
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch is always evaluated", ">= 1")
    log_every: int = setting(50, "steps between two readings of the losses", ">= 1")
    save_every: int = setting(0, "steps between two checkpoints; 0 for one an epoch", ">= 0")
    hang_minutes: float = setting(15.0, "longest a step, or waiting for its data, may take; 0 for no limit", ">= 0")
    parallel: str = setting("ddp", "a process holds all weights, or with fsdp a shard of them", ("ddp", "fsdp"))
    text_grad_ckpt: bool = setting(False, "recompute the text transformer's layers in the backward pass too")
    tensorboard: bool = setting(False, "also write TensorBoard's event files")
    reduced_jpeg: bool = setting(False, "in training decode large JPEGs at a lower scale that no crop misses: faster")
    freeze: list = setting([], "parts of the model that stay as they are: visual_encoder, text_encoder, text_decoder")
    adapter_rank: int = setting(0, "rank of low-rank adapters (package peft), trained alone; 0 for none", ">= 0")
    adapter_alpha: float = setting(16.0, "what adapters add is scaled by this over their rank", "> 0")
    adapter_targets: list = setting([*ATTENTION_MAPS], "linear layers that get adapters, by the end of their names")
    adapter_also: list = setting([], "parts trained whole beside adapters, by pieces of names")
    adapter_weights: str = setting("", "adapters to start from, or to evaluate with: adapters.pth of a run")
    augment: bool = setting(True, "random crop, flip and RandAugment in training; off: resize only")


@dataclass
class Files(Settings):
    """Files of a task that evaluates two splits."""

    val_file: str = setting("", "own validation annotations; '' for the dataset's")
    test_file: str = setting("", "own test annotations; '' for the dataset's")
    splits: list = setting(["val", "test"], "splits that an evaluation reads: val, test or both")


@dataclass
class Captions(Settings):
    """How captions are generated and scored."""

    val_gt: str = setting("", "own validation ground truth in COCO format; '' for the dataset's if there is one")
    test_gt: str = setting("", "own test ground truth in COCO format; '' for the dataset's if there is one")
    batch_size: int = setting(32, "images per process and step", ">= 1")
    max_length: int = setting(20, "longest caption in tokens, prompt included", ">= 1")
    min_length: int = setting(5, "shortest caption in tokens, prompt included", ">= 0")
    num_beams: int = setting(3, "width of the beam search", ">= 1")
    prompt: str = setting("a picture of ", "what every caption begins with")
    java: bool = setting(True, "also compute what needs Java: METEOR, SPICE, the tokenizer of published scores")


@dataclass
class Contrast(Settings):
    """Contrast with queues of momentum features."""

    queue_size: int = setting(57600, "features kept in each queue", ">= 1")
    alpha: float = setting(0.4, "share of the momentum model in the contrastive targets", ">= 0 and <= 1")
    itc_all_ranks: bool = setting(False, "contrast with the pairs of all processes, beside the queues")
    itc_cached: bool = setting(False, "contrast with the pairs of all grad_accum batches, as one large batch would")
    embed_dim: int = setting(256, "width of the contrastive features", ">= 1")


@dataclass
class CaptionConfig(Captions, Files, TrainConfig):
    """Captioning (paper section 5.2)."""

    train_file: str = setting("", "own training annotations; '' for the dataset's")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_file")
    coco_gt_root: str = setting("annotation/coco_gt", "folder of the ground-truth files in COCO format")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class RetrievalConfig(Contrast, Files, TrainConfig):
    """Image-text retrieval (paper section 5.1)."""

    dataset: str = setting("coco", "whose published files are read", ("coco", "flickr"))
    train_file: str = setting("", "own training annotations; '' for the dataset's")
    batch_size_train: int = setting(32, "pairs per process and step", ">= 1")
    batch_size_test: int = setting(64, "images or texts at once in evaluation", ">= 1")
    k_test: int = setting(256, "candidates that the matching head re-ranks", ">= 1")
    keep_images: str = setting("auto", "where image tokens wait; auto: host if the device is half full", KEEP_IMAGES)
    negative_all_rank: bool = setting(True, "draw hard negatives from all processes, not the own batch only")


@dataclass
class VQAConfig(TrainConfig):
    """Visual question answering (paper section 5.3)."""

    vqa_root: str = setting("", "folder of the VQA images (COCO's)")
    vg_root: str = setting("", "folder of the Visual Genome images")
    train_files: list = setting(["vqa_train", "vqa_val", "vg_qa"], "annotation files to train on, without .json")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_files")
    test_file: str = setting("", "own test questions; '' for vqa_test.json")
    answer_list: str = setting("", "own candidate answers; '' for answer_list.json")
    batch_size_train: int = setting(16, "questions per process and step", ">= 1")
    batch_size_test: int = setting(32, "questions at once in evaluation", ">= 1")
    k_test: int = setting(128, "candidates ranked in full", ">= 1")
    inference: str = setting("rank", "rank answer_list, generate, or rank own choices", ("rank", "generate", "choices"))
    scoring: str = setting("vqa", "accuracy as in VQA v2 and OK-VQA, in A-OKVQA, or in GQA (exact)", SCORING)
    drop_path_rate: float = setting(0.1, "stochastic depth of the image encoder", ">= 0 and < 1")
    mask_padding: bool = setting(True, "generated answers ignore padded questions; false: as the released code")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class NLVRConfig(Files, TrainConfig):
    """Statements about two images (paper section 5.4)."""

    train_file: str = setting("", "own training annotations; '' for the dataset's")
    batch_size_train: int = setting(16, "statements per process and step", ">= 1")
    batch_size_test: int = setting(64, "statements at once in evaluation", ">= 1")
    drop_path_rate: float = setting(0.1, "stochastic depth of the image encoder", ">= 0 and < 1")
    adapter_also: list = setting(["cls_head", "merge_layer"], "parts trained whole beside adapters, by pieces of names")
    released_eval_swap: bool = setting(False, "swap images at random in evaluation too, as the released code did")


@dataclass
class ClassificationConfig(Files, TrainConfig):
    """Classification of images, with or without a text (not in the paper; after LAVIS)."""

    classes: list = setting([], "names of the classes, in the order of their numbers; [] takes those of the folders")
    train_file: str = setting("", "own annotations, or a folder with a folder for each class; '' for ve_train.json")
    val_file: str = setting("", "the same for validation; '' for ve_dev.json")
    test_file: str = setting("", "the same for the test; '' for ve_test.json")
    text: str = setting("", "text that goes with every image of a folder")
    batch_size_train: int = setting(32, "examples per process and step", ">= 1")
    batch_size_test: int = setting(64, "examples at once in evaluation", ">= 1")
    drop_path_rate: float = setting(0.0, "stochastic depth of the image encoder", ">= 0 and < 1")
    adapter_also: list = setting(["cls_head"], "parts trained whole beside adapters, by pieces of names")
    zero_shot: bool = setting(False, "compare images with the names of the classes by contrast, without training")
    templates: list = setting(["a photo of a {}"], "texts that name a class in zero-shot classification")
    temperature: float = setting(0.01, "of the softmax over classes in zero-shot classification", "> 0")
    embed_dim: int = setting(256, "width of the contrastive features, in zero-shot classification", ">= 1")


@dataclass
class DialogueConfig(Files, TrainConfig):
    """Visual dialogue (paper section 5.5)."""

    train_file: str = setting("", "own training dialogues; '' for visdial_1.0_train.json")
    val_file: str = setting("", "the same for validation; '' for visdial_1.0_val.json")
    test_file: str = setting("", "the same for the test; '' for visdial_1.0_test.json")
    val_dense: str = setting("", "relevance of the validation's options (dense annotations), for NDCG; '' for none")
    test_dense: str = setting("", "the same for the test")
    batch_size_train: int = setting(8, "dialogues per process and step", ">= 1")
    batch_size_test: int = setting(32, "images at once in evaluation", ">= 1")
    num_rounds: int = setting(10, "rounds of each dialogue that a step trains, evenly spaced", ">= 1")
    num_negatives: int = setting(3, "wrong options that a round trains beside the right one, drawn at random", ">= 1")
    drop_path_rate: float = setting(0.0, "stochastic depth of the image encoder", ">= 0 and < 1")
    adapter_also: list = setting(["itm_head"], "parts trained whole beside adapters, by pieces of names")


@dataclass
class NoCapsConfig(Captions, Files, ModelConfig):
    """Captions for objects never seen in training (paper section 5.2)."""

    repetition_penalty: float = setting(1.1, "above 1 discourages words already said", "> 0")


@dataclass
class VideoConfig(ModelConfig):
    """Zero-shot text-to-video retrieval (paper section 5.6)."""

    video_root: str = setting("", "folder of the clips")
    test_file: str = setting("", "own captions; '' for msrvtt_test.jsonl")
    batch_size: int = setting(64, "texts at once", ">= 1")
    num_frm_test: int = setting(8, "frames per clip, evenly spaced", ">= 1")
    k_test: int = setting(128, "candidates that the matching head re-ranks", ">= 1")
    keep_images: str = setting("auto", "where image tokens wait; auto: host if the device is half full", KEEP_IMAGES)
    embed_dim: int = setting(256, "width of the contrastive features", ">= 1")


@dataclass
class VideoQAConfig(ModelConfig):
    """Zero-shot questions about clips (paper section 5.6)."""

    video_root: str = setting("", "folder of the clips")
    test_file: str = setting("", "questions in the format of MSRVTT-QA or MSVD-QA")
    video_map: str = setting("", "MSVD-QA's youtube_mapping.txt, with lines '<name> vid<n>'; '' for clips video<n>")
    answer_list: str = setting("", "own candidate answers; '' for answer_list.json")
    batch_size: int = setting(64, "questions at once", ">= 1")
    num_frm_test: int = setting(16, "frames per clip, evenly spaced", ">= 1")
    k_test: int = setting(128, "candidates ranked in full", ">= 1")
    inference: str = setting("generate", "generate answers freely, or rank answer_list", ("generate", "rank"))
    smooth_padding: bool = setting(True, "ranking counts padding, as the released code does")


@dataclass
class PretrainConfig(Contrast, TrainConfig):
    """Pretraining (paper section 4.1)."""

    train_file: list = setting([], "lists of pairs, JSON or JSON lines; or tar shards, as a/{000..131}.tar or pipe:...")
    train_mix: dict = setting({}, "files and the ratio of each, as {a.json: 3, b.json: 1}, in place of train_file")
    shard_pairs: int = setting(0, "pairs in all tar shards; 0 counts them", ">= 0")
    shuffle_buffer: int = setting(2000, "pairs of shards among which a worker draws the next; 1: their order", ">= 1")
    laion_path: str = setting("", "folder of further lists, one per epoch in turn; '' for none")
    init: str = setting("released", "starting weights; released: DeiT or ViT-in21k, and BERT", ("released", "random"))
    batch_size: int = setting(75, "pairs per process and step", ">= 1")
    warmup_lr: float = setting(1e-6, "learning rate at the start of the warm-up", ">= 0")
    lr_decay_rate: float = setting(0.9, "factor on the learning rate after each epoch", "> 0 and <= 1")
    warmup_steps: int = setting(3000, "steps of linear warm-up", ">= 0")
    max_bad_images: int = setting(1000, "unreadable images that are replaced before the run stops", ">= 0")
    smooth_padding: bool = setting(True, "label smoothing counts padding, as the released training did")


@dataclass
class CapFiltConfig(Settings):
    """Captioning and filtering of web pairs (paper section 3.3)."""

    pairs: list = setting([], "lists of pairs, JSON or Parquet; or shards, as a/{000..131}.tar, s3://... or pipe:..")
    image_root: str = setting("", "folder or address that the pairs' image paths start from")
    output: str = setting("", "folder or address, as s3://..., of the set's shards; '': bootstrapped in output_dir")
    parquet: bool = setting(False, "the set in Parquet: a row for each image, with its texts and their scores")
    captioner: str = setting("", "checkpoint that writes captions: a path, a URL or hf:owner/name")
    filter: str = setting("", "checkpoint that judges texts: a path, a URL or hf:owner/name")
    allow_pickle: bool = setting(False, "accept checkpoints that may run code when read; only from those you trust")
    stage: str = setting(
        "both",
        "filter alone reads web texts, and captions if written; dedup finds near-duplicates, which later stages omit",
        ("both", "caption", "filter", "dedup"),
    )
    duplicate_cosine: float = setting(
        0.0, "of stage dedup: least cosine of duplicates' features by filter; 0: a perceptual hash", ">= 0 and <= 1"
    )
    sample: bool = setting(True, "nucleus sampling, as in the paper; false for beam search")
    top_p: float = setting(0.9, "share of probability that sampling draws from", "> 0 and <= 1")
    num_beams: int = setting(3, "width of the beam search", ">= 1")
    num_captions: int = setting(1, "synthetic captions of each image", ">= 1")
    best_of: int = setting(1, "captions written of each image, if over num_captions: the filter keeps the best", ">= 1")
    max_length: int = setting(20, "longest caption in tokens, prompt included", ">= 1")
    min_length: int = setting(5, "shortest caption in tokens, prompt included", ">= 0")
    repetition_penalty: float = setting(1.1, "above 1 discourages repeated words; released sampling: 1.1", "> 0")
    threshold: float = setting(0.5, "least probability of a match of texts that are kept", ">= 0 and <= 1")
    shard_size: int = setting(1000, "pairs of a shard, the unit of work; of tar shards, pairs held at once", ">= 1")
    batch_size: int = setting(64, "images at once", ">= 1")
    num_workers: int = setting(0, "processes that read images, per process", ">= 0")
    amp: str = setting("", "mixed precision; auto: bf16 where it is fast; '': float32", AMP)
    engine: str = setting("torchrun", "ray: workers of a Ray cluster, which may come and go", ("torchrun", "ray"))
    ray_address: str = setting("", "of the cluster, as auto or ray://host:10001; '': start one on this machine")
    workers: int = setting(0, "workers on Ray; 0: as many as the cluster has room for", ">= 0")
    cpus_per_worker: float = setting(1.0, "cores that Ray gives a worker", "> 0")
    gpus_per_worker: float = setting(0.0, "GPUs that Ray gives a worker; parts of one are allowed", ">= 0")


def describe(config_class: type[Settings]) -> Iterator[str]:
    """Yield a line per key: name, default, meaning, range or choices."""
    defaults = config_class()
    for item in fields(config_class):
        allowed = item.metadata["allowed"]
        limits = f" ({allowed if isinstance(allowed, str) else ', '.join(map(repr, allowed))})" if allowed else ""
        yield f"  {item.name}: {defaults[item.name]!r}".ljust(36) + item.metadata["help"] + limits
