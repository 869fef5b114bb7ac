"""Datasets and loaders with the released constructors, whose items and batches unpack as the released tuples."""

from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Normalize

from data import DATASETS, build_datasets, set_one_thread
from data.annotations import read_list
from data.coco_flickr import MAX_WORDS
from data.sampler import EpochSampler, SeededDataset
from data.shards import TarPairs
from data.transforms import MEAN, STD, Transform
from data.video import VideoDataset as Clips
from data.vqa import vqa_collate_fn as collate_answers
from utils import UserError

__all__ = ["create_dataset", "create_loader", "create_sampler"]
load_jsonl = read_list


class Row(tuple):
    """An item of a dataset: unpacks as the released tuple; its fields are read by name too."""

    fields: dict[str, Any]

    def __new__(cls, fields: dict[str, Any]) -> "Row":
        row = super().__new__(cls, fields.values())
        row.fields = fields
        return row

    def __getnewargs__(self) -> tuple[dict[str, Any]]:
        return (self.fields,)

    def __getitem__(self, key: Any) -> Any:
        return self.fields[key] if isinstance(key, str) else super().__getitem__(key)


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


# Constructors.


def build(task: str, split: str, transform: Callable, **config: Any) -> Any:
    """Build a split of a task in `data.DATASETS`; the transform is any callable that takes an RGB image."""
    if not isinstance(transform, Transform):
        transform = Transform([transform])
    return DATASETS[task][0](config, split, transform)


def constructor(name: str, task: str, required: str, **defaults: Any) -> type[TupleDataset]:
    """Return a class of datasets that is called with a transform and settings of a task, some of them by default."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(key, kind) for key in required.split()]
    signature = Signature(parameters + [Parameter(key, kind, default=value) for key, value in defaults.items()])

    def __init__(self: TupleDataset, *args: Any, **kwargs: Any) -> None:
        config = {"split": "train", **defaults, **signature.bind(*args, **kwargs).arguments}
        TupleDataset.__init__(self, build(task, **config))
        if "prompt" in config:
            self.dataset.prompt = config["prompt"]

    return type(name, (TupleDataset,), {"__init__": __init__, "__signature__": signature})


TRAIN, TEST = "transform image_root ann_root", "transform image_root ann_root split"
# (image, caption, number of the image)
coco_karpathy_train = constructor("coco_karpathy_train", "retrieval_coco", TRAIN, max_words=MAX_WORDS, prompt="")
flickr30k_train = constructor("flickr30k_train", "retrieval_flickr", TRAIN, max_words=MAX_WORDS, prompt="")
# (image, index); text, image, txt2img and img2txt describe the collection
coco_karpathy_retrieval_eval = constructor("coco_karpathy_retrieval_eval", "retrieval_coco", TEST, max_words=MAX_WORDS)
flickr30k_retrieval_eval = constructor("flickr30k_retrieval_eval", "retrieval_flickr", TEST, max_words=MAX_WORDS)
# (image, image id)
coco_karpathy_caption_eval = constructor("coco_karpathy_caption_eval", "caption_coco", TEST)
nocaps_eval = constructor("nocaps_eval", "nocaps", TEST)
# (left image, right image, sentence, label)
# Differs from the released code: images are swapped in training only, and both words left and right exchanged.
nlvr_dataset = constructor("nlvr_dataset", "nlvr", TEST)
# (image, question, answers, weights) in training, else (image, question, question id)
vqa_dataset = constructor("vqa_dataset", "vqa", "transform ann_root vqa_root vg_root", train_files=(), split="train")


class pretrain_dataset(TupleDataset):
    """Pairs of several lists, and of one list of the folder `laion_path` at a time: (image, caption)."""

    def __init__(self, ann_file: Sequence[str], laion_path: str, transform: Callable):
        super().__init__(build("pretrain", "train", transform, train_file=ann_file, laion_path=laion_path))


class VideoDataset(ClipRows):
    """Clips of msrvtt_test.jsonl; UserError for frames that are not sampled uniformly, or clips that are not .mp4."""

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


class ImageNorm(Normalize):
    """Normalise frames (frames, 3, H, W), in place; of 0 to 255 they are divided by 255 first."""

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
        super().__init__(mean, std, inplace=True)

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return super().forward(img.div_(255.0) if img.max() > 1 >= max(self.mean) else img)


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
        keys = list(super().__iter__())
        self.set_epoch(self.epoch + 1)
        return (EpochIndex(index, epoch) for epoch, index in keys)


def create_sampler(
    datasets: Sequence[Dataset], shuffles: Sequence[bool], num_tasks: int, global_rank: int
) -> list[Sampler | range]:
    """Build a sampler for each dataset; a process evaluates its own part of it, no sample twice."""
    samplers: list[Sampler | range] = []
    for data, shuffle in zip(datasets, shuffles, strict=True):
        in_order = isinstance(getattr(data, "dataset", data), TarPairs)  # shards are shuffled while they are read
        train = TrainSampler(len(data), num_tasks, global_rank, not in_order)
        samplers.append(train if shuffle else range(global_rank, len(data), num_tasks))
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
