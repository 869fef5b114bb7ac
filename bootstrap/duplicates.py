"""Near-duplicate images: a hash of 64 bits for each image and nine crops, and a search for hashes that nearly agree."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bootstrap.shards import Row, Shards, write_rows
from bootstrap.tars import Sample, Source
from data.images import image_batches
from files import write_whole
from inference.features import Extractor
from inference.neighbours import LARGE, NEAREST, Collection, approximate
from models.losses import unit_features
from utils import UserError, track

NEAR = 7  # bits of 64 in which two hashes may differ
SIDE = 32  # pixels of the image that is transformed
CROPPED = 0.95  # width and height of the crops
PLACES = tuple((x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1))  # of the crops, in what is cut
BLOCKS = ((0, 11), (11, 11), (22, 11), (33, 11), (44, 10), (54, 10))  # first bit and number of bits
AT_ONCE = 1 << 20  # hashes that are looked up at once
COMPARED = 1 << 17  # hashes that are compared at once: arrays that stay in a core's cache
MOST = 1000  # hashes of equal bits that are compared: the first ones, which are those that are kept
THREADS = 2  # each needs 30 bytes an image
LOWEST = sorted(((i, j) for i in range(16) for j in range(16)), key=lambda at: (sum(at), at))[1:65]  # frequencies
COSINES = np.cos(np.pi * np.outer(np.arange(16), 2 * np.arange(SIDE) + 1) / (2 * SIDE))


def image_hashes(image: Image.Image) -> torch.Tensor:
    """Return the hashes of an image and of its crops, (10,), as int64.

    A bit is the sign of one of the 64 lowest frequencies of the image's cosine transform, the lowest first.
    """
    small = image.convert("L")
    small.thumbnail((4 * SIDE, 4 * SIDE), Image.Resampling.BOX)
    size = np.array(small.size)
    boxes = [(0, 0, *size)]
    for place in PLACES:
        start = np.array(place) * (1 - CROPPED) * size
        boxes.append((*start, *(start + CROPPED * size)))
    pixels = [np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX, box), np.float64) for box in boxes]
    rows, columns = np.array(LOWEST).T
    bits = (COSINES @ np.stack(pixels) @ COSINES.T)[:, rows, columns] > 1e-6  # of an image of one colour, none
    return torch.from_numpy(np.ascontiguousarray(np.packbits(bits, axis=1)).view(">u8")[:, 0].astype(np.int64))


def make_hashes(config: Any, source: Source) -> Callable[[int], list[Row]]:
    """Return the work of the stage: the hashes of each image of a shard, in hexadecimal; UserError for NumPy 1."""
    if not hasattr(np, "bitwise_count"):
        raise UserError(f"stage dedup needs NumPy 2, and this is {np.__version__}; pip install 'numpy>=2'")

    def work(shard: int) -> list[Row]:
        """Return a row for each image of a shard."""
        rows: list[Row] = []
        for samples, errors in source(shard):
            images = [sample.image for sample in samples]
            for batch in image_batches(images, image_hashes, config.batch_size, config.num_workers):
                good = [i for i in batch["index"] if i not in batch["errors"]]
                found = {i: {"error": text} for i, text in batch["errors"].items()}
                if good:
                    codes = [hashes.numpy().tobytes().hex() for hashes in batch["image"]]
                    found |= {i: {"code": code} for i, code in zip(good, codes, strict=True)}
                rows += [{"image": samples[i].name, **found[i]} for i in batch["index"]]
            rows += errors
        return rows

    return work


def make_features(config: Any, model: Extractor, source: Source) -> Callable[[int], list[Row]]:
    """Return the work of the stage: the features of each image of a shard, float16, in hexadecimal."""

    def predict(image: torch.Tensor, names: list[str]) -> list[Row]:
        """Return the projected features, of unit length."""
        found = unit_features(model.model.vision_proj, model.model.visual_encoder(image)[:, 0])
        return [{"code": row.numpy().tobytes().hex()} for row in found.cpu().half()]

    def work(shard: int) -> list[Row]:
        """Return a row for each image of a shard."""
        rows: list[Row] = []
        for samples, errors in source(shard):
            images, names = [sample.image for sample in samples], [sample.name for sample in samples]
            rows += [*model.rows(images, predict, config.batch_size, config.num_workers, names), *errors]
        return rows

    return work


def near_pairs(hashes: np.ndarray) -> np.ndarray:
    """Return the pairs of images where a hash or crop of one is near the hash of the other: (2, pairs), ordered.

    Hashes are compared that agree in two of six blocks of bits. With so few blocks, all pairs that differ in up to
    4 bits are found, and of those that differ in 5, 6 and 7 random bits, 91%, 75% and 59%.

    Args:
        hashes: (images, 1 + crops), uint64.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        codes = list(pool.map(lambda blocks: _agreeing(hashes, *blocks), combinations(BLOCKS, 2)))
    return np.stack(np.divmod(np.unique(np.concatenate(codes)), len(hashes)))


def _agreeing(hashes: np.ndarray, one: tuple[int, int], other: tuple[int, int]) -> np.ndarray:
    """Return the pairs of near hashes that agree in two blocks of bits, each as first * images + second."""

    def in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the bits of values in two blocks, sorted, and the place of each before."""
        parts = [(values >> np.uint64(first)) & np.uint64((1 << bits) - 1) for first, bits in (one, other)]
        keys = parts[0] << np.uint64(other[1]) | parts[1]
        packed = np.sort(keys << np.uint64(32) | np.arange(len(keys), dtype=np.uint64)).view(np.int64)
        return packed >> 32, packed & 0xFFFFFFFF

    own, order = in_order(hashes[:, 0])
    ordered, order = hashes[order, 0], order.astype(np.uint32)
    starts = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=1 << (one[1] + other[1])))]).astype(np.int32)
    found = []
    for start in range(0, len(hashes), AT_ONCE):
        for column in hashes[start : start + AT_ONCE].T:
            wanted, number = in_order(column)  # in order, so that memory is read in order
            first = starts[wanted]
            reader, place = _compare(column[number], ordered, first, np.minimum(starts[wanted + 1] - first, MOST))
            pair = start + number[reader], order[place].astype(np.int64)
            codes = np.minimum(*pair) * len(hashes) + np.maximum(*pair)
            found.append(codes[pair[0] != pair[1]])
    return np.concatenate(found)


def _compare(
    values: np.ndarray, ordered: np.ndarray, first: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare each value with ordered[first : first + count]; return the indices of near ones in both."""
    ends, found = np.cumsum(count), []
    cuts = np.searchsorted(ends, np.arange(COMPARED, ends[-1], COMPARED))
    for low, high in pairwise(np.unique([0, *cuts, len(count)])):
        own, before = count[low:high], ends[low:high] - count[low:high]
        reader = np.repeat(np.arange(low, high), own)
        place = np.repeat(first[low:high] - before, own) + np.arange(before[0], ends[high - 1])
        near = np.flatnonzero(np.bitwise_count(ordered[place] ^ values[reader]) <= NEAR)
        found.append((reader[near], place[near]))
    reader, place = map(np.concatenate, zip(*found, strict=True))
    return reader, place


def keep_first(pairs: np.ndarray) -> dict[int, int]:
    """Return {duplicate: the image that is kept}: of a pair the second is left out, unless the first is itself."""
    found: dict[int, int] = {}
    for first, second in pairs[:, np.lexsort(pairs)].T.tolist():
        if first not in found and second not in found:
            found[second] = first
    return found


def alike_features(feats: np.ndarray, cosine: float, folder: Path) -> dict[int, int]:
    """Return {duplicate: the image that is kept} of features (images, embed_dim) with at least this cosine."""
    values = torch.from_numpy(feats.astype(np.float32))
    index = approximate(values, folder / "features") if len(values) > LARGE else None
    images, found = Collection([""] * len(values), values, index), []
    for start in range(0, len(values), 1024):
        near, number = images.nearest(values[start : start + 1024], NEAREST)
        own = start + torch.arange(len(number))[:, None].expand_as(number)
        pairs = torch.stack([own, number])[:, (near >= cosine) & (number != own)]
        found.append(pairs.sort(dim=0).values)
    return keep_first(torch.cat(found, dim=1).numpy())


def duplicates_of(hashes: np.ndarray) -> dict[int, int]:
    """Return {duplicate: the image that is kept} of hashes (images, 1 + crops): the first of those that are near."""
    _, first, number = np.unique(hashes[:, 0], return_index=True, return_inverse=True)
    alone = np.sort(first)  # images with a hash that no earlier one has
    found = {int(alone[j]): int(alone[i]) for j, i in keep_first(near_pairs(hashes[alone])).items()}
    same = np.flatnonzero(first[number] != np.arange(len(number)))
    return found | {int(j): found.get(int(i), int(i)) for j, i in zip(same, first[number[same]], strict=True)}


def write_duplicates(hashes: Shards, duplicates: Shards, folder: Path, cosine: float = 0.0) -> tuple[int, int]:
    """Search all finished hashes, write which images of each shard are left out, and a list of all of them.

    An image of a list is one image however many shards name it. With a least cosine, the shards hold features.

    Returns:
        The numbers of images and of those that are left out.
    """
    table, names, count = bytearray(), bytearray(), 0
    for _, row in _hashed(hashes, "reading hashes"):
        table += bytes.fromhex(row["code"])
        count += 1
        if not hashes.tars:
            names += hashlib.blake2b(row["image"].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    values = np.frombuffer(table, np.float16 if cosine else np.uint64).reshape(count, -1)
    image = np.arange(count)  # the first row of each row's image
    if not hashes.tars:
        _, first, number = np.unique(np.frombuffer(names, np.uint64), return_index=True, return_inverse=True)
        image = first[number]
    rows = np.unique(image)
    values = values[rows] if len(rows) < count else values
    near = alike_features(values, cosine, folder) if cosine else duplicates_of(values)
    found = {int(rows[j]): int(rows[i]) for j, i in near.items()}
    originals = dict.fromkeys(found.values(), "")
    for number, (shard, row) in enumerate(_hashed(hashes, "naming duplicates")):
        if number in originals:
            originals[number] = f"{hashes.pairs(shard)[0]}: {row['image']}" if hashes.tars else row["image"]
    of = (originals.get(found.get(int(first), -1)) for first in image)
    with write_whole(folder / "duplicates.jsonl") as everything:
        for shard in range(len(hashes)):
            own = [{"image": row["image"], "of": next(of)} for row in hashes.rows(shard) if "code" in row]
            own = [row for row in own if row["of"]]
            write_rows(everything, own)
            with write_whole(duplicates.path(shard)) as file:
                write_rows(file, own)
    return len(rows), len(found)


def _hashed(hashes: Shards, title: str) -> Iterator[tuple[int, Row]]:
    """Yield shard and row of every image that could be read."""
    for shard in track(range(len(hashes)), title):
        yield from ((shard, row) for row in hashes.rows(shard) if "code" in row)


def without(source: Source, duplicates: Shards) -> Source:
    """Return a source that leaves out the duplicates of each shard."""

    def kept(shard: int) -> Iterator[tuple[list[Sample], list[Row]]]:
        """Yield the samples of a shard that are no duplicates, and rows for what could not be read."""
        names = {row["image"] for row in duplicates.rows(shard)}
        for samples, errors in source(shard):
            yield [sample for sample in samples if sample.name not in names], errors

    return kept
