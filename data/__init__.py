"""Datasets of every task and their loaders."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.annotations import find_annotation
from data.classification import Classified, read_folder, read_pairs
from data.coco_flickr import MAX_WORDS, CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.dialogue import Dialogues, DialogueTrain
from data.mixture import Mixture, MixtureSampler, read_ratios
from data.nlvr import NLVR
from data.pretrain import PairDataset, list_turns
from data.sampler import EpochSampler, SeededDataset
from data.shards import TarPairs
from data.tars import only_shards
from data.transforms import Transform, test_transform, train_transform
from data.video import VideoDataset
from data.video_qa import VideoQuestions
from data.vqa import VQATest, VQATrain, vqa_collate_fn
from released import door
from utils import UserError, get_rank, get_world_size

__all__ = ["build_datasets", "prefetch", "make_loader", "make_loaders", "vqa_collate_fn"]
VQA_FILES = ("vqa_train.json", "vqa_val.json", "vg_qa.json")  # released, and so downloaded if absent
MIN_SCALE = {"pretrain": 0.2}  # least share of an image's area in a training crop; 0.5 elsewhere


def build_datasets(dataset: str, config: Any, min_scale: float = 0.5) -> dict[str, Dataset]:
    """Build the datasets of those of "train", "val" and "test" that a task has.

    `dataset` is a key of `DATASETS`, `config` a mapping of settings, such as those of `launch.config`, `min_scale` the
    least share of an image's area in a training crop. UserError for an unknown name, or for annotations or images that
    are missing or wrong.
    """
    return {split: _build(dataset, config, split, min_scale) for split in _splits(dataset)}


def make_loaders(
    dataset: str, config: Any, splits: Sequence[str] | None = None, seed: int = 0
) -> dict[str, DataLoader]:
    """Build the loaders of a task's splits, each over this process's part of it; `loader.dataset` is the whole split.

    Arguments and errors are those of `build_datasets`; `splits` None builds all that the task has, `seed` is that of
    the training order and augmentation. The training loader shuffles, and drops the last incomplete batch.
    """
    loaders = {}
    for split in _splits(dataset) if splits is None else splits:
        is_train = split == "train"
        data = _build(dataset, config, split, MIN_SCALE.get(dataset, 0.5))
        collate_fn = vqa_collate_fn if dataset == "vqa" and is_train else None
        batch_size = config.get("batch_size_train" if is_train else "batch_size_test") or config["batch_size"]
        if dataset in ("retrieval_msrvtt", "video_qa"):  # batch_size counts texts, and a clip is several images
            batch_size = max(batch_size // config["num_frm_test"], 1)
        loaders[split] = make_loader(data, batch_size, is_train, config["num_workers"], seed, collate_fn)
    return loaders


def _splits(dataset: str) -> tuple[str, ...]:
    if dataset not in DATASETS:
        raise UserError(f"dataset is {dataset!r}; expected one of {', '.join(DATASETS)}")
    return DATASETS[dataset][1]


def _build(dataset: str, config: Any, split: str, min_scale: float) -> Dataset:
    upright = config.get("exif_orientation", False)
    if split == "train":
        options = config.get("augment", True), config.get("reduced_jpeg", False), upright
        transform = train_transform(config["image_size"], min_scale, *options)
        if mix := config.get("train_mix"):
            return _mixture(dataset, config, read_ratios(mix), transform)
    else:
        transform = test_transform(config["image_size"], upright)
    return DATASETS[dataset][0](config, split, transform)


def _mixture(dataset: str, config: Any, ratios: dict[str, float], transform: Transform) -> Mixture:
    """Build a training dataset of every file that `train_mix` names."""
    if config.get("laion_path") or only_shards(list(ratios), "train_mix"):
        raise UserError("train_mix mixes lists of pairs alone; leave laion_path and tar shards out")
    settings, parts = config if isinstance(config, Mapping) else vars(config), []
    for file in ratios:
        own = {"train_file": file if dataset == "caption_coco" else [file], "train_files": [file]}
        parts.append(DATASETS[dataset][0]({**settings, **own}, "train", transform))
    return Mixture(parts, list(ratios.values()))


def _file(config: Any, split: str, released: str) -> str:
    """Return the path of a split's annotations: the config's `<split>_file`, else the released file."""
    return find_annotation(config["ann_root"], released, config.get(f"{split}_file") or "")


def _captions(prefix: str, config: Any, split: str, transform: Transform) -> Dataset:
    file = _file(config, split, f"{prefix}_{split}.json")
    if split == "train":
        max_words = config.get("max_words") or MAX_WORDS
        return CaptionTrain(file, config["image_root"], transform, config["prompt"], max_words)
    return CaptionEval(file, config["image_root"], transform)


def _retrieval(prefix: str, config: Any, split: str, transform: Transform) -> Dataset:
    file = _file(config, split, f"{prefix}_{split}.json")
    kind = RetrievalTrain if split == "train" else RetrievalEval
    return kind(file, config["image_root"], transform, max_words=config.get("max_words") or MAX_WORDS)


def _vqa(config: Any, split: str, transform: Transform) -> Dataset:
    roots = {"vqa": config["vqa_root"], "vg": config["vg_root"]}
    if split == "train":
        return VQATrain([_vqa_file(config["ann_root"], name) for name in config["train_files"]], roots, transform)
    answers = ""
    if config.get("inference", "rank") == "rank":
        answers = find_annotation(config["ann_root"], "answer_list.json", config.get("answer_list") or "")
    return VQATest(_file(config, split, "vqa_test.json"), roots, transform, answers)


def _vqa_file(ann_root: str, name: str) -> str:
    """Return the path of a training file given by a released name, or by the path of an own file."""
    file = name if name.endswith((".json", ".jsonl")) else f"{name}.json"
    return find_annotation(ann_root, file, "" if file in VQA_FILES else file)


def _nlvr(config: Any, split: str, transform: Transform) -> Dataset:
    file = _file(config, split, f"nlvr_{'dev' if split == 'val' else split}.json")
    swap = split == "train" or config.get("released_eval_swap", False)
    return NLVR(file, config["image_root"], transform, swap)


def _classification(config: Any, split: str, transform: Transform) -> Dataset:
    own, classes = config.get(f"{split}_file") or "", config["classes"]
    if own and Path(own).is_dir():
        return Classified(read_folder(own, classes, config.get("text", "")), transform)
    file = _file(config, split, f"ve_{'dev' if split == 'val' else split}.json")
    return Classified(read_pairs(file, config["image_root"], classes), transform)


def _dialogue(config: Any, split: str, transform: Transform) -> Dataset:
    file = find_annotation(config["ann_root"], "", config[f"{split}_file"] or f"visdial_1.0_{split}.json")
    if split == "train":
        return DialogueTrain(file, config["image_root"], transform, config["num_rounds"], config["num_negatives"])
    dense = config[f"{split}_dense"] and find_annotation(config["ann_root"], "", config[f"{split}_dense"])
    return Dialogues(file, config["image_root"], transform, dense)


def _pretrain(config: Any, split: str, transform: Transform) -> Dataset:
    files = config["train_file"]
    if only_shards(files, "train_file"):
        if config.get("laion_path"):
            raise UserError("train_file names shards and laion_path a folder of lists; give shards alone")
        pairs = config.get("shard_pairs", 0)
        return TarPairs(files, transform, config["batch_size"], pairs, config.get("shuffle_buffer", 2000))
    return PairDataset(files, config.get("image_root", ""), transform, list_turns(config.get("laion_path", "")))


def _msrvtt(config: Any, split: str, transform: Transform) -> Dataset:
    file = _file(config, split, "msrvtt_test.jsonl")
    upright = config.get("exif_orientation", False)
    return VideoDataset(file, config["video_root"], config["num_frm_test"], config["image_size"], upright)


def _video_qa(config: Any, split: str, transform: Transform) -> Dataset:
    own, answers = config.get("test_file") or "", ""
    if not own:
        raise UserError("test_file is ''; name the questions of MSRVTT-QA or MSVD-QA, for instance test_qa.json")
    if config["inference"] == "rank":
        answers = find_annotation(config["ann_root"], "answer_list.json", config["answer_list"])
    names = config["video_map"] and find_annotation(config["ann_root"], "", config["video_map"])
    sizes = config["num_frm_test"], config["image_size"], config.get("exif_orientation", False)
    file = find_annotation(config["ann_root"], "", own)
    return VideoQuestions(file, config["video_root"], *sizes, names, answers)


ALL_SPLITS = ("train", "val", "test")
DATASETS = {  # how a split is built, and the splits there are
    "pretrain": (_pretrain, ("train",)),
    "caption_coco": (partial(_captions, "coco_karpathy"), ALL_SPLITS),
    "nocaps": (partial(_captions, "nocaps"), ("val", "test")),
    "retrieval_coco": (partial(_retrieval, "coco_karpathy"), ALL_SPLITS),
    "retrieval_flickr": (partial(_retrieval, "flickr30k"), ALL_SPLITS),
    "vqa": (_vqa, ("train", "test")),
    "nlvr": (_nlvr, ALL_SPLITS),
    "classification": (_classification, ALL_SPLITS),
    "dialogue": (_dialogue, ALL_SPLITS),
    "retrieval_msrvtt": (_msrvtt, ("test",)),
    "video_qa": (_video_qa, ("test",)),
}


def make_loader(
    dataset: Dataset, batch_size: int, is_train: bool, num_workers: int = 0, seed: int = 0,
    collate_fn: Callable | None = None, processes: tuple[int, int] | None = None,
) -> DataLoader:  # fmt: skip
    """Build the loader of a dataset for this process.

    Args:
        dataset: yields dicts, which `collate_fn`, by default `collate`, joins.
        is_train: shuffle, and drop a last incomplete batch; otherwise each process reads its own part in order.
        num_workers: processes that load data; they stay alive between epochs.
        seed: of the training order and augmentation.
        processes: number of processes and the number of this one; None takes those of the process group.
    """
    num_replicas, rank = processes or (get_world_size(), get_rank())
    sampler: Sampler | range = range(rank, len(dataset), num_replicas)
    if is_train:
        if isinstance(dataset, Mixture):
            sampler = MixtureSampler(dataset, num_replicas, rank, seed)
        else:
            sampler = EpochSampler(len(dataset), num_replicas, rank, not isinstance(dataset, TarPairs), seed)
        dataset = SeededDataset(dataset, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=is_train,
        collate_fn=collate_fn or collate,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # so that loading leaves the global random numbers alone
        worker_init_fn=set_one_thread,
    )


def set_one_thread(_: int) -> None:
    """Let a data worker compute with one thread."""
    torch.set_num_threads(1)


def collate(batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join items: tensors are stacked, whole numbers become an int64 tensor if they fit, anything else a list."""
    return {key: _join([item[key] for item in batch]) for key in batch[0]}


def _join(values: list[Any]) -> Any:
    if all(torch.is_tensor(value) for value in values):
        return torch.stack(values)
    if all(isinstance(value, int) and value.bit_length() < 64 for value in values):
        return torch.tensor(values)
    return values


def prefetch(loader: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a loader's batches with their images on a device; a batch moves while the one before it is computed.

    Numbers such as ids stay where they are, since they are read on the host.
    """
    ahead: list[dict[str, Any]] = []
    for batch in loader:
        moved = {
            key: value.to(device, non_blocking=True) if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in batch.items()
        }
        yield from ahead
        ahead = [moved]
    yield from ahead


__getattr__ = door(__name__)
