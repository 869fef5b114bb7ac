"""Datasets and loaders with the released constructors, whose items and batches unpack as the released tuples."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data import build_datasets, set_one_thread
from data.annotations import find_annotation, read_list
from data.coco_flickr import MAX_WORDS, CaptionEval, RetrievalEval, RetrievalTrain
from data.nlvr import NLVR
from data.pretrain import PairDataset, list_turns
from data.sampler import EpochSampler, SeededDataset, ShardSampler
from data.shards import TarPairs
from data.transforms import MEAN, STD, Transform
from data.video import VideoDataset as Clips
from data.vqa import VQATest, VQATrain
from data.vqa import vqa_collate_fn as collate_answers
from utils import UserError

NAMES = {"data": {"create_dataset", "create_loader", "create_sampler"}}
NLVR_FILES = {"train": "nlvr_train.json", "val": "nlvr_dev.json", "test": "nlvr_test.json"}


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


class TupleDataset(Dataset):
    """A dataset whose items are `Row`s; its other attributes are those of the dataset within."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return Row(self.dataset[index])

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "at"):  # absent while unpickling; `at` returns items that are not tuples
            raise AttributeError(name)
        return getattr(self.dataset, name)


def as_transform(transform: Callable) -> Transform:
    """Return a transform that reads image files, from any callable that takes an RGB image."""
    return transform if isinstance(transform, Transform) else Transform([transform])


class coco_karpathy_train(TupleDataset):
    """Pairs of COCO: (image, caption, number of the image)."""

    file = "coco_karpathy_train.json"

    def __init__(
        self, transform: Callable, image_root: str, ann_root: str, max_words: int = MAX_WORDS, prompt: str = ""
    ):
        path = find_annotation(ann_root, self.file)
        super().__init__(RetrievalTrain(path, image_root, as_transform(transform), prompt, max_words))


class coco_karpathy_caption_eval(TupleDataset):
    """Images of COCO to caption: (image, image id)."""

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str):
        path = find_annotation(ann_root, f"coco_karpathy_{split}.json")
        super().__init__(CaptionEval(path, image_root, as_transform(transform)))


class coco_karpathy_retrieval_eval(TupleDataset):
    """Images of COCO to search: (image, index); text, image, txt2img and img2txt describe the collection."""

    file = "coco_karpathy_{}.json"

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str, max_words: int = MAX_WORDS):
        path = find_annotation(ann_root, self.file.format(split))
        super().__init__(RetrievalEval(path, image_root, as_transform(transform), max_words))


class flickr30k_train(coco_karpathy_train):
    """Pairs of Flickr30k: (image, caption, number of the image)."""

    file = "flickr30k_train.json"


class flickr30k_retrieval_eval(coco_karpathy_retrieval_eval):
    """Images of Flickr30k to search: (image, index)."""

    file = "flickr30k_{}.json"


class nocaps_eval(TupleDataset):
    """Images of NoCaps: (image, image id)."""

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str):
        path = find_annotation(ann_root, f"nocaps_{split}.json")
        super().__init__(CaptionEval(path, image_root, as_transform(transform)))


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
        roots, transform = {"vqa": vqa_root, "vg": vg_root}, as_transform(transform)
        if split == "train":
            files = [find_annotation(ann_root, f"{name}.json") for name in train_files]
            super().__init__(VQATrain(files, roots, transform))
        else:
            test, answers = (find_annotation(ann_root, name) for name in ("vqa_test.json", "answer_list.json"))
            super().__init__(VQATest(test, roots, transform, answers))


def vqa_collate_fn(batch: Sequence[tuple]) -> tuple:
    """Join training questions: images, questions, all answers, their weights, and how many each question has."""
    names = ("image", "question", "answers", "weights")
    return tuple(collate_answers([dict(zip(names, item, strict=True)) for item in batch]).values())


class nlvr_dataset(TupleDataset):
    """Statements about two images: (left image, right image, sentence, label).

    Differs from the released code: images are swapped in training only, and both words left and right exchanged.
    """

    def __init__(self, transform: Callable, image_root: str, ann_root: str, split: str):
        path = find_annotation(ann_root, NLVR_FILES[split])
        super().__init__(NLVR(path, image_root, as_transform(transform), swap=split == "train"))


class PairRows(TupleDataset):
    """Pairs for pretraining: (image, caption)."""

    epoch = 0

    def at(self, epoch: int, index: int) -> Row:
        """Return a pair of an epoch."""
        item = self.dataset.at(epoch, index)
        return Row({name: item[name] for name in ("image", "caption")})

    def __getitem__(self, index: int) -> Row:
        return self.at(self.epoch, index)

    def reload_laion(self, epoch: int) -> None:
        """Take the list of `laion_path` whose turn it is in an epoch."""
        self.epoch = epoch


class pretrain_dataset(PairRows):
    """Pairs of several lists, and of one list of the folder `laion_path` at a time: (image, caption)."""

    def __init__(self, ann_file: Sequence[str], laion_path: str, transform: Callable):
        super().__init__(PairDataset(ann_file, "", as_transform(transform), list_turns(laion_path)))


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
        super().__init__(Clips(find_annotation(ann_root, "msrvtt_test.jsonl"), video_root, num_frm, max_img_size))


class ImageNorm:
    """Normalise frames (frames, 3, H, W), in place; of 0 to 255 they are divided by 255 first."""

    def __init__(self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def __call__(self, img: torch.Tensor) -> torch.Tensor:
        if img.max() > 1 and self.mean.max() <= 1:
            img.div_(255.0)
        return img.sub_(self.mean).div_(self.std)


def load_jsonl(filename: str) -> list[Any]:
    """Read JSON lines."""
    return read_list(filename)


# Loaders.


def create_dataset(dataset: str, config: Any, min_scale: float = 0.5) -> Any:
    """Build the datasets of a task: those of train, val and test that it has, as a tuple, or the only one."""
    found = tuple(as_tuples(part) for part in build_datasets(dataset, config, min_scale).values())
    return found if len(found) > 1 else found[0]


def as_tuples(dataset: Any) -> TupleDataset:
    """Return a dataset with `Row`s in place of mappings."""
    if isinstance(dataset, PairDataset | TarPairs):
        return PairRows(dataset)
    return ClipRows(dataset) if isinstance(dataset, Clips) else TupleDataset(dataset)


class TrainSampler(EpochSampler):
    """Training order of one process. A pass that `set_epoch` does not precede is of the next epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.set_position(epoch)

    def __iter__(self) -> Iterator[int]:
        indices = [index for _, index in super().__iter__()]
        self.set_position(self.epoch + 1)
        return iter(indices)


class EpochKeys(Sampler):
    """The indices of a `TrainSampler` with their epoch, as `SeededDataset` is read."""

    def __init__(self, sampler: TrainSampler):
        self.sampler, self.set_epoch = sampler, sampler.set_epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.sampler.epoch
        for index in self.sampler:
            yield epoch, index


class SeededRows(SeededDataset):
    """A `SeededDataset` with the attributes of the dataset within."""

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "seed"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def create_sampler(
    datasets: Sequence[Dataset], shuffles: Sequence[bool], num_tasks: int, global_rank: int
) -> list[Sampler]:
    """Build a sampler for each dataset; a process evaluates its own part of it, no sample twice."""
    return [
        TrainSampler(len(data), num_tasks, global_rank, not isinstance(data.dataset, TarPairs))
        if shuffle
        else ShardSampler(len(data), num_tasks, global_rank)
        for data, shuffle in zip(datasets, shuffles, strict=True)
    ]


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
    return [_loader(*row) for row in rows]


def _loader(
    dataset: Any, sampler: Any, batch_size: int, num_workers: int, is_train: bool, collate_fn: Callable | None
) -> DataLoader:
    if is_train and sampler is None:
        (sampler,) = create_sampler([dataset], [True], 1, 0)
    if isinstance(sampler, TrainSampler):
        dataset, sampler = SeededRows(dataset, sampler.seed), EpochKeys(sampler)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=is_train,
        collate_fn=collate_fn,
        generator=torch.Generator(),
        worker_init_fn=set_one_thread,
    )
