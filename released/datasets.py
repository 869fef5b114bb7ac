"""Datasets and loaders with the released constructors, whose items and batches unpack as the released tuples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data import DATASETS, build_datasets, set_one_thread
from data.annotations import read_list
from data.coco_flickr import MAX_WORDS
from data.sampler import EpochSampler, SeededDataset, ShardSampler
from data.shards import TarPairs
from data.transforms import MEAN, STD, Transform
from data.video import VideoDataset as Clips
from data.vqa import vqa_collate_fn as collate_answers
from utils import UserError

__all__ = ["create_dataset", "create_loader", "create_sampler"]
load_jsonl = read_list


class Row(tuple):
    """An item of a dataset: unpacks as the released tuple; its fields are read by name too."""

    names: list[str]

    def __new__(cls, item: dict[str, Any]) -> "Row":
        row = super().__new__(cls, item.values())
        row.names = list(item)
        return row

    def __getnewargs__(self) -> tuple[dict[str, Any]]:
        return (dict(zip(self.names, self, strict=True)),)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self.names.index(key) if isinstance(key, str) else key)


class EpochIndex(int):
    """An index of a training sample, with the epoch that its augmentation depends on."""

    def __new__(cls, index: int, epoch: int = 0) -> "EpochIndex":
        number = super().__new__(cls, index)
        number.epoch = epoch
        return number


class TupleDataset(Dataset):
    """A dataset whose items are `Row`s; its other attributes are those of the dataset within."""

    epoch = 0  # of items that are asked for by a plain number

    def __init__(self, dataset: Any):
        self.dataset, self.seeded = dataset, SeededDataset(dataset, seed=0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        if isinstance(index, EpochIndex):
            item = self.seeded[index.epoch, int(index)]
        else:
            item = self.dataset.at(self.epoch, index) if hasattr(self.dataset, "at") else self.dataset[index]
        return Row({name: value for name, value in item.items() if name != "bad"})

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # absent while unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def reload_laion(self, epoch: int) -> None:
        """Take the list of `laion_path` whose turn it is in an epoch."""
        self.epoch = epoch


class ClipRows(TupleDataset):
    """Clips with one caption each: (frames, name of the clip)."""

    def __init__(self, dataset: Clips):
        super().__init__(dataset)
        self.txt2video = self.video2txt = list(range(len(dataset.text)))

    def __len__(self) -> int:
        return len(self.txt2video)

    def __getitem__(self, index: int) -> Row:
        clip = self.dataset.txt2video[index]
        return Row({"video": self.dataset[clip]["video"], "name": self.dataset.names[clip]})


def build(task: str, split: str, transform: Callable, **config: Any) -> Any:
    """Build a split of a task in `data.DATASETS`; the transform is any callable that takes an RGB image."""
    if not isinstance(transform, Transform):
        transform = Transform([transform])
    return DATASETS[task][0](config, split, transform)


class coco_karpathy_train(TupleDataset):
    """Pairs: (image, caption, number of the image)."""

    task = "retrieval_coco"

    def __init__(
        self, transform: Callable, image_root: str, ann_root: str, max_words: int = MAX_WORDS, prompt: str = ""
    ):
        roots = {"image_root": image_root, "ann_root": ann_root}
        super().__init__(build(self.task, "train", transform, **roots, max_words=max_words))
        self.dataset.prompt = prompt


class flickr30k_train(coco_karpathy_train):
    """The same for Flickr30k."""

    task = "retrieval_flickr"


class coco_karpathy_caption_eval(TupleDataset):
    """Images to caption: (image, image id)."""

    task = "caption_coco"

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str):
        super().__init__(build(self.task, split, transform, image_root=image_root, ann_root=ann_root))


class nocaps_eval(coco_karpathy_caption_eval):
    """Images of NoCaps: (image, image id)."""

    task = "nocaps"


class nlvr_dataset(coco_karpathy_caption_eval):
    """Statements about two images: (left image, right image, sentence, label).

    Differs from the released code: images are swapped in training only, and both words left and right exchanged.
    """

    task = "nlvr"


class coco_karpathy_retrieval_eval(TupleDataset):
    """Images to search: (image, index); text, image, txt2img and img2txt describe the collection."""

    task = "retrieval_coco"

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str, max_words: int = MAX_WORDS):
        roots = {"image_root": image_root, "ann_root": ann_root}
        super().__init__(build(self.task, split, transform, **roots, max_words=max_words))


class flickr30k_retrieval_eval(coco_karpathy_retrieval_eval):
    """The same for Flickr30k."""

    task = "retrieval_flickr"


class vqa_dataset(TupleDataset):
    """Questions: (image, question, answers, weights) in training, else (image, question, question id)."""

    def __init__(
        self,
        transform: Callable,
        ann_root: str,
        vqa_root: str,
        vg_root: str,
        train_files: Sequence[str] = (),
        split: str = "train",
    ):
        roots = {"ann_root": ann_root, "vqa_root": vqa_root, "vg_root": vg_root}
        super().__init__(build("vqa", split, transform, **roots, train_files=train_files))


class pretrain_dataset(TupleDataset):
    """Pairs of several lists, and of one list of the folder `laion_path` at a time: (image, caption)."""

    def __init__(self, ann_file: Sequence[str], laion_path: str, transform: Callable):
        super().__init__(build("pretrain", "train", transform, train_file=ann_file, laion_path=laion_path))


class VideoDataset(ClipRows):
    """Clips of msrvtt_test.jsonl.

    Raises:
        UserError: a sampling strategy other than "uniform", or clips that are not .mp4.
    """

    def __init__(
        self,
        video_root: str,
        ann_root: str,
        num_frm: int = 4,
        frm_sampling_strategy: str = "uniform",
        max_img_size: int = 384,
        video_fmt: str = ".mp4",
    ):
        if (frm_sampling_strategy, video_fmt) != ("uniform", ".mp4"):
            got = f"frm_sampling_strategy {frm_sampling_strategy!r}, video_fmt {video_fmt!r}"
            raise UserError(f"{got}; expected 'uniform' and '.mp4', which the released evaluation uses")
        config = {"video_root": video_root, "ann_root": ann_root, "num_frm_test": num_frm, "image_size": max_img_size}
        super().__init__(build("retrieval_msrvtt", "test", Transform([]), **config))


class ImageNorm:
    """Normalise frames (frames, 3, H, W), in place; of 0 to 255 they are divided by 255 first."""

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        if img.max() > 1 and self.mean.max() <= 1:
            img.div_(255.0)
        return img.sub_(self.mean).div_(self.std)


# Loaders.


def create_dataset(dataset: str, config: Any, min_scale: float = 0.5) -> Any:
    """Build the datasets of a task: those of train, val and test that it has, as a tuple, or the only one."""
    parts = build_datasets(dataset, config, min_scale).values()
    found = tuple(ClipRows(part) if isinstance(part, Clips) else TupleDataset(part) for part in parts)
    return found if len(found) > 1 else found[0]


def vqa_collate_fn(batch: Sequence[tuple]) -> tuple:
    """Join training questions: images, questions, all answers, their weights, and how many each question has."""
    names = ("image", "question", "answers", "weights")
    return tuple(collate_answers([dict(zip(names, item, strict=True)) for item in batch]).values())


class TrainSampler(EpochSampler):
    """Training order of one process. A pass that `set_epoch` does not precede is of the next epoch."""

    set_epoch = EpochSampler.set_position

    def __iter__(self) -> Iterator[EpochIndex]:
        epoch, indices = self.epoch, [index for _, index in super().__iter__()]
        self.set_epoch(epoch + 1)
        return (EpochIndex(index, epoch) for index in indices)


def create_sampler(
    datasets: Sequence[Dataset], shuffles: Sequence[bool], num_tasks: int, global_rank: int
) -> list[Sampler]:
    """Build a sampler for each dataset; a process evaluates its own part of it, no sample twice."""
    samplers: list[Sampler] = []
    for data, shuffle in zip(datasets, shuffles, strict=True):
        in_order = isinstance(getattr(data, "dataset", data), TarPairs)  # shards are shuffled while they are read
        train = TrainSampler(len(data), num_tasks, global_rank, not in_order)
        samplers.append(train if shuffle else ShardSampler(len(data), num_tasks, global_rank))
    return samplers


def create_loader(
    datasets: Sequence[Dataset],
    samplers: Sequence[Sampler | None],
    batch_size: Sequence[int],
    num_workers: Sequence[int],
    is_trains: Sequence[bool],
    collate_fns: Sequence[Callable | None],
) -> list[DataLoader]:
    """Build a loader for each dataset; a training dataset without a sampler is shuffled."""
    rows = zip(datasets, samplers, batch_size, num_workers, is_trains, collate_fns, strict=True)
    return [
        DataLoader(
            dataset,
            size,
            sampler=create_sampler([dataset], [True], 1, 0)[0] if is_train and sampler is None else sampler,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=is_train,
            collate_fn=collate_fn,
            generator=torch.Generator(),
            worker_init_fn=set_one_thread,
        )
        for dataset, sampler, size, workers, is_train, collate_fn in rows
    ]
