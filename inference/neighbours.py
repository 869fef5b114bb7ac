"""The images of a collection that are nearest to a feature: exactly, or approximately through faiss."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from files import write_whole
from models.losses import similarity
from utils import note

LARGE = 100_000  # images above which an approximate index is faster
RECALL = 0.98  # share of the nearest images that an approximate index finds, on features of the collection itself
NEAREST = 10  # images to which this refers
PROBES = 500  # features that are searched to measure it
PER_LIST = 40  # features that the k-means of an index is trained on, for each of its lists


@dataclass(frozen=True)
class Collection:
    """Names and unit-length features (images, embed_dim) of images, and an index of faiss where there is one."""

    names: list[str]
    feats: torch.Tensor
    index: Any = None

    def nearest(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and number of the images nearest to features (queries, embed_dim), each (queries, count)."""
        count = min(count, len(self.names))
        if self.index is not None:
            cosine, number = map(torch.from_numpy, self.index.search(queries.float().cpu().numpy(), count))
            if (number >= 0).all():  # else the lists that were read hold fewer
                return cosine, number
        cosine, number = similarity(queries, self.feats.to(queries.device)).topk(count, dim=1)
        return cosine.cpu(), number.cpu()


def approximate(feats: torch.Tensor, beside: Path) -> Any:
    """Return an index of unit-length features (images, embed_dim), or None if faiss is not installed.

    It is read from the file beside an index of images whose name has a hash of the features, or made and written there.
    """
    try:
        import faiss
    except ImportError:
        note(f"all {len(feats)} images are compared; pip install faiss-cpu for an approximate index")
        return None
    values = np.ascontiguousarray(feats.numpy())
    path = beside.with_name(f"{beside.name}.{hashlib.blake2b(values, digest_size=8).hexdigest()}.faiss")
    if path.is_file():
        return faiss.read_index(str(path))
    index = build(values)
    for old in beside.parent.glob(f"{beside.name}.*.faiss"):
        old.unlink()
    with write_whole(path, "wb") as file:
        file.write(faiss.serialize_index(index))
    return index


def build(values: np.ndarray) -> Any:
    """Return an index of features (images, embed_dim) that reads as few lists as `RECALL` needs."""
    import faiss

    num_lists = int(4 * len(values) ** 0.5)
    index = faiss.index_factory(values.shape[1], f"IVF{num_lists},Flat", faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    index.train(values[rng.permutation(len(values))[: PER_LIST * num_lists]])
    index.add(values)
    probes = values[rng.permutation(len(values))[:PROBES]]
    index.nprobe, found = 8, 0.0
    while (found := recall(index, values, probes)) < RECALL and index.nprobe < num_lists:
        index.nprobe = min(2 * index.nprobe, num_lists)
    note(
        f"approximate index of {len(values)} images: it finds {found:.1%} of the {NEAREST} nearest and reads "
        f"{index.nprobe} of {num_lists} lists; --exact compares all"
    )
    return index


def recall(index: Any, values: np.ndarray, queries: np.ndarray, count: int = NEAREST) -> float:
    """Return the share of the `count` nearest features to queries, identical ones aside, that an index finds."""
    exact = torch.from_numpy(queries @ values.T).topk(count + 1, dim=1).indices[:, 1:].numpy()
    found = index.search(queries, count + 1)[1]
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(exact, found, strict=True)]))
