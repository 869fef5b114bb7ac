"""Datasets of every task, by the released names, and their loaders."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.annotations import find_annotation
from data.coco_flickr import MAX_WORDS, CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.nlvr import NLVR
from data.pretrain import PairDataset, list_turns
from data.sampler import EpochSampler, SeededDataset, ShardSampler
from data.shards import TarPairs, only_shards
from data.transforms import Transform, test_transform, train_transform
from data.video import VideoDataset
from data.vqa import VQATest, VQATrain, vqa_collate_fn
from utils import UserError

__all__ = ["create_dataset", "create_loader", "create_sampler", "vqa_collate_fn"]
VQA_FILES = ("vqa_train.json", "vqa_val.json", "vg_qa.json")  # released, and so downloaded if absent


def create_dataset(dataset: str, config: Any, min_scale: float = 0.5) -> Any:
    """Build the datasets of a task.

    Args:
        dataset: 'pretrain', 'caption_coco', 'nocaps', 'retrieval_coco', 'retrieval_flickr', 'vqa', 'nlvr' or
            'retrieval_msrvtt'.
        config: mapping of settings, such as `launch.config` has.
        min_scale: least share of an image's area in a training crop.

    Returns:
        What the released function returned: train, validation and test datasets as far as the task has them.

    Raises:
        UserError: an unknown name, or annotations or images that are missing or wrong.
    """
    if dataset not in BUILDERS:
        raise UserError(f"dataset is {dataset!r}; expected one of {', '.join(BUILDERS)}")
    reduced, upright = config.get("reduced_jpeg", False), config.get("exif_orientation", False)
    train = train_transform(config["image_size"], min_scale, config.get("augment", True), reduced, upright)
    return BUILDERS[dataset](config, train, test_transform(config["image_size"], upright))


def _files(config: Any, **names: str) -> list[str]:
    """Return annotation paths: own ones by the config's `<split>_file`, else the released names."""
    return [find_annotation(config["ann_root"], name, config.get(f"{s}_file") or "") for s, name in names.items()]


def _max_words(config: Any) -> int:
    return config.get("max_words") or MAX_WORDS


def _captions(config: Any, train: Transform, test: Transform) -> tuple[Dataset, Dataset, Dataset]:
    names = {split: f"coco_karpathy_{split}.json" for split in ("train", "val", "test")}
    train_file, val_file, test_file = _files(config, **names)
    root = config["image_root"]
    return (
        CaptionTrain(train_file, root, train, config["prompt"], _max_words(config)),
        CaptionEval(val_file, root, test),
        CaptionEval(test_file, root, test),
    )


def _retrieval(prefix: str) -> Callable[[Any, Transform, Transform], tuple[Dataset, ...]]:
    def build(config: Any, train: Transform, test: Transform) -> tuple[Dataset, ...]:
        names = {split: f"{prefix}_{split}.json" for split in ("train", "val", "test")}
        train_file, val_file, test_file = _files(config, **names)
        root = config["image_root"]
        return (
            RetrievalTrain(train_file, root, train, max_words=_max_words(config)),
            RetrievalEval(val_file, root, test, _max_words(config)),
            RetrievalEval(test_file, root, test, _max_words(config)),
        )

    return build


def _vqa(config: Any, train: Transform, test: Transform) -> tuple[Dataset, Dataset]:
    roots = {"vqa": config["vqa_root"], "vg": config["vg_root"]}
    files = [_vqa_file(config["ann_root"], name) for name in config["train_files"]]
    (test_file,) = _files(config, test="vqa_test.json")
    answers = ""
    if config.get("inference", "rank") == "rank":
        answers = find_annotation(config["ann_root"], "answer_list.json", config.get("answer_list") or "")
    return VQATrain(files, roots, train), VQATest(test_file, roots, test, answers)


def _vqa_file(ann_root: str, name: str) -> str:
    """Return the path of a training file given by a released name, or by the path of an own file."""
    file = name if name.endswith((".json", ".jsonl")) else f"{name}.json"
    return find_annotation(ann_root, file, "" if file in VQA_FILES else file)


def _nlvr(config: Any, train: Transform, test: Transform) -> tuple[Dataset, Dataset, Dataset]:
    files = _files(config, train="nlvr_train.json", val="nlvr_dev.json", test="nlvr_test.json")
    swaps = (True, config.get("released_eval_swap", False), config.get("released_eval_swap", False))
    return tuple(
        NLVR(file, config["image_root"], transform, swap)
        for file, transform, swap in zip(files, (train, test, test), swaps, strict=True)
    )


def _nocaps(config: Any, train: Transform, test: Transform) -> tuple[Dataset, Dataset]:
    files = _files(config, val="nocaps_val.json", test="nocaps_test.json")
    return tuple(CaptionEval(file, config["image_root"], test) for file in files)


def _pretrain(config: Any, train: Transform, test: Transform) -> Dataset:
    files = config["train_file"]
    if only_shards(files, "train_file"):
        if config["laion_path"]:
            raise UserError("train_file names shards and laion_path a folder of lists; give shards alone")
        return TarPairs(files, train, config["batch_size"], config.get("shard_pairs", 0), config["shuffle_buffer"])
    return PairDataset(config["train_file"], config["image_root"], train, list_turns(config["laion_path"]))


def _msrvtt(config: Any, train: Transform, test: Transform) -> Dataset:
    (file,) = _files(config, test="msrvtt_test.jsonl")
    return VideoDataset(file, config["video_root"], config["num_frm_test"], config["image_size"])


BUILDERS = {
    "pretrain": _pretrain,
    "caption_coco": _captions,
    "nocaps": _nocaps,
    "retrieval_coco": _retrieval("coco_karpathy"),
    "retrieval_flickr": _retrieval("flickr30k"),
    "vqa": _vqa,
    "nlvr": _nlvr,
    "retrieval_msrvtt": _msrvtt,
}


def create_sampler(
    datasets: Sequence[Dataset], shuffles: Sequence[bool], num_tasks: int, global_rank: int, seed: int = 0
) -> list[Sampler]:
    """Build a sampler for each dataset: shuffled ones for training, the others for evaluation.

    Args:
        datasets: of training or evaluation.
        shuffles: for each, whether it is shuffled.
        num_tasks: number of processes.
        global_rank: number of this one.
        seed: of the order.
    """
    return [
        EpochSampler(len(data), num_tasks, global_rank, not isinstance(data, TarPairs), seed)
        if shuffle
        else ShardSampler(len(data), num_tasks, global_rank)
        for data, shuffle in zip(datasets, shuffles, strict=True)
    ]


def create_loader(
    datasets: Sequence[Dataset],
    samplers: Sequence[Sampler],
    batch_size: Sequence[int],
    num_workers: Sequence[int],
    is_trains: Sequence[bool],
    collate_fns: Sequence[Callable | None],
) -> list[DataLoader]:
    """Build a loader for each dataset; all arguments are lists of one length.

    Training drops a last incomplete batch. Batches are dicts (see `collate`). Workers stay alive between epochs.
    """
    rows = zip(datasets, samplers, batch_size, num_workers, is_trains, collate_fns, strict=True)
    return [_loader(*row) for row in rows]


def _loader(
    dataset: Dataset, sampler: Sampler, batch_size: int, num_workers: int, is_train: bool, collate_fn: Callable | None
) -> DataLoader:
    if isinstance(sampler, EpochSampler):
        dataset = SeededDataset(dataset, sampler.seed)
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
        worker_init_fn=_one_thread,
    )


def _one_thread(_: int) -> None:
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
