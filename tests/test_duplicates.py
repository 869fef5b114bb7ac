"""Near-duplicates: hashes, the search against a plain one, and the stage by its command line.

    python -m tests.test_duplicates              # precision and recall; add numbers of images to time the search
"""

import io
import json
import resource
import sys
import tarfile
import tempfile
import time
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scripts import ROOT, run_here, settings  # noqa: E402
from test_capfilt_shards import write_tar  # noqa: E402

from bootstrap import duplicates  # noqa: E402
from bootstrap.duplicates import (  # noqa: E402
    NEAR,
    PLACES,
    alike_features,
    duplicates_of,
    image_hashes,
    keep_first,
    near_pairs,
)
from inference import load  # noqa: E402
from miniature.writing import write_miniature  # noqa: E402
from models.losses import unit_features  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(np, "bitwise_count"), reason="needs NumPy 2")
MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
KINDS = ("resized", "recompressed", "cropped")


def altered(image, kind, rng):
    """Return a near-duplicate: 0.4 to 1.5 times the size, JPEG of quality 30 to 80, or 5% less wide and high."""
    if kind == "resized":
        scale = rng.uniform(0.4, 1.5)
        return image.resize([max(8, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    if kind == "recompressed":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(30, 81)))
        return Image.open(file).convert("RGB")
    width, height = (round(side * 0.95) for side in image.size)
    x, y = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
    return image.crop((x, y, x + width, y + height))


def photograph_tiles(side=160):
    """Return disjoint squares of the photographs in scikit-image and scikit-learn."""
    skimage, datasets = pytest.importorskip("skimage.data"), pytest.importorskip("sklearn.datasets")
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "coins", "hubble_deep_field", "moon", "brick")
    photographs = [getattr(skimage, name)() for name in names] + datasets.load_sample_images().images
    photographs = [Image.fromarray(array).convert("RGB") for array in photographs]
    return [
        photo.crop((x, y, x + side, y + side))
        for photo in photographs
        for x in range(0, photo.width - side + 1, side)
        for y in range(0, photo.height - side + 1, side)
    ]


def planted(images, seed=0, share=0.2):
    """Return images with a share of altered ones among them, in random order, and the pairs that belong together."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[: round(share / (1 - share) * len(images))]
    items = [(i, image) for i, image in enumerate(images)]
    items += [(int(i), altered(images[i], KINDS[n % 3], rng)) for n, i in enumerate(chosen)]
    items = [items[i] for i in rng.permutation(len(items))]
    return [image for _, image in items], [i for i, _ in items]


def by_hash(images):
    return duplicates_of(np.stack([image_hashes(image).numpy() for image in images]).view(np.uint64))


def by_features(model, cosine):
    """Return a function that finds duplicates by the features of a model."""

    def find(images):
        with torch.no_grad():
            tokens = model.model.visual_encoder(torch.stack([model.transform(image) for image in images]))
            feats = unit_features(model.model.vision_proj, tokens[:, 0])
        return alike_features(feats.half().numpy(), cosine, Path())

    return find


def precision_and_recall(images, owners, find=by_hash):
    """Return precision and recall of the images that are left out."""
    found = find(images)
    right = sum(owners[i] == owners[j] for i, j in found.items())
    return right / max(len(found), 1), right / (len(owners) - len(set(owners)))


def test_photographs_with_planted_duplicates():
    tiles = photograph_tiles()
    results = [precision_and_recall(*planted(tiles, seed)) for seed in range(10)]
    precision, recall = np.mean(results, axis=0)
    assert precision >= 0.99 and recall >= 0.95, results


def plain_pairs(hashes):
    """Compare everything with everything."""
    near = [
        (i, j)
        for i, j in combinations(range(len(hashes)), 2)
        for a, b in [*((hashes[i, 0], other) for other in hashes[j]), *((hashes[j, 0], other) for other in hashes[i])]
        if bin(int(a) ^ int(b)).count("1") <= NEAR
    ]
    return sorted(set(near))


def flipped(value, bits, rng):
    for bit in rng.permutation(64)[:bits]:
        value ^= np.uint64(1) << np.uint64(bit)
    return value


def test_the_search_finds_all_pairs_of_four_bits_and_no_others(monkeypatch):
    monkeypatch.setattr(duplicates, "AT_ONCE", 50)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (120, 1 + len(PLACES)), dtype=np.uint64)
    for number in range(60):
        column = 0 if number < 30 else 1 + number % len(PLACES)
        hashes[60 + number, 0] = flipped(hashes[number, column], number % 5, rng)
    exact = plain_pairs(hashes)
    assert len(exact) >= 60 and list(map(tuple, near_pairs(hashes).T.tolist())) == exact


@pytest.mark.parametrize(("bits", "least"), [(5, 0.85), (6, 0.68), (7, 0.5)])
def test_the_search_finds_most_pairs_of_more_bits(bits, least):
    rng = np.random.default_rng(bits)
    hashes = np.repeat(rng.integers(0, 2**64, (800, 1), dtype=np.uint64), 1 + len(PLACES), axis=1)
    hashes[400:] = [[flipped(value, bits, rng)] * (1 + len(PLACES)) for value in hashes[:400, 0]]
    assert near_pairs(hashes).shape[1] >= least * 400


def test_the_first_is_kept_and_no_chain_is_followed():
    pairs = np.array([[0, 1, 2, 1], [1, 2, 3, 3]])
    assert keep_first(pairs) == {1: 0, 3: 2}  # 2 is near 1 alone, which is left out itself
    hashes = np.random.default_rng(0).integers(0, 2**64, (4, 6), dtype=np.uint64)
    assert duplicates_of(hashes[[0, 1, 0, 2, 1, 1, 3]]) == {2: 0, 4: 1, 5: 1}


def test_an_image_of_one_colour_has_a_hash_without_bits():
    assert image_hashes(Image.new("RGB", (9, 30), (7, 100, 200))).tolist() == [0] * 10


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A list of photographs and duplicates of them; the second names its image twice, the third is broken."""
    folder = tmp_path_factory.mktemp("world")
    write_miniature(folder, level=1, num_train=2, num_val=1, num_test=1, num_web=2)
    tiles, rng = photograph_tiles()[:5], np.random.default_rng(0)
    images = [*tiles, altered(tiles[1], "cropped", rng), altered(tiles[3], "resized", rng)]
    rows = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"text {number}"})
    (folder / "2.png").write_bytes(b"broken")
    rows.append({"image": "1.png", "caption": "another text"})
    (folder / "web.json").write_text(json.dumps(rows))
    return folder, rows


def arguments(output, pairs, **more):
    values = dict(pairs=f"[{pairs}]", captioner=MODEL, filter=MODEL, max_length=40, shard_size=3, num_workers=0) | more
    return ["--config", ROOT / "configs" / "capfilt.yaml", "--output_dir", output, *settings(**values)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lists_lose_their_duplicates(world, tmp_path):
    words = arguments(tmp_path, world[0] / "web.json", image_root=world[0])
    assert run_here("capfilt.py", *words, *settings(stage="dedup"))[0] == 0
    assert read(tmp_path / "duplicates.jsonl") == [{"image": f"{a}.png", "of": f"{b}.png"} for a, b in ((5, 1), (6, 3))]
    assert run_here("capfilt.py", *words, *settings(stage="caption"))[0] == 0
    web = [row["caption"] for row in read(tmp_path / "bootstrapped.jsonl") if row["source"] == "web"]
    assert web == ["text 0", "text 1", "text 3", "text 4", "another text"]
    next((tmp_path / "shards" / "duplicates").glob("*.jsonl")).unlink()
    code, told = run_here("capfilt.py", *words)
    assert code == 2 and "duplicates of 1 of 3 shards are not written; repeat stage=dedup first" in told


def test_features_find_what_a_model_takes_for_the_same(world, tmp_path):
    paths = sorted((world[0] / "images" / "train").iterdir()) + sorted((world[0] / "images" / "web").iterdir())
    rows = [{"image": str(path.relative_to(world[0])), "caption": "a text"} for path in paths]
    copy = Image.open(paths[1])
    copy.save(world[0] / "copy.bmp")
    (world[0] / "copied.json").write_text(json.dumps([*rows, {"image": "copy.bmp", "caption": "a text"}]))
    words = arguments(tmp_path, world[0] / "copied.json", image_root=world[0], duplicate_cosine=0.995)
    assert run_here("capfilt.py", *words, *settings(stage="dedup"))[0] == 0
    assert read(tmp_path / "duplicates.jsonl") == [{"image": "copy.bmp", "of": rows[1]["image"]}]
    code, told = run_here("capfilt.py", *words, *settings(duplicate_cosine=0.9))
    assert code == 2 and "shards of other settings (duplicate_cosine)" in told


def test_captions_made_before_are_not_mixed_with_those_without_duplicates(world, tmp_path):
    words = arguments(tmp_path, world[0] / "web.json", image_root=world[0])
    for stage in ("caption", "dedup"):
        assert run_here("capfilt.py", *words, *settings(stage=stage))[0] == 0
    code, told = run_here("capfilt.py", *words, *settings(stage="caption"))
    assert code == 2 and "shards of other settings (deduplicated)" in told


def test_tars_lose_their_duplicates(world, tmp_path):
    images = [(world[0] / row["image"]).read_bytes() for row in world[1]]
    write_tar(tmp_path / "0.tar", [(f"{i}", "png", images[i], f"text {i}") for i in range(4)])
    write_tar(tmp_path / "1.tar", [(f"{i}", "png", images[i], f"text {i}") for i in range(4, len(images))])
    words = arguments(tmp_path / "out", f"'{tmp_path}/*.tar'", stage="caption")
    assert run_here("capfilt.py", *words, *settings(stage="dedup"))[0] == 0
    found = [(row["image"], row["of"]) for row in read(tmp_path / "out" / "duplicates.jsonl")]
    assert found == [("5", f"{tmp_path}/0.tar: 1"), ("6", f"{tmp_path}/0.tar: 3"), ("7", f"{tmp_path}/0.tar: 1")]
    assert run_here("capfilt.py", *words)[0] == 0
    with tarfile.open(tmp_path / "out" / "bootstrapped" / "00001.tar") as tar:
        assert {name.partition("-")[0] for name in tar.getnames()} == {"4"}


def time_search(images):
    """Print the time of a search of random hashes, a fifth planted: four bits at most from an image or a crop."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, (images, 1 + len(PLACES)), dtype=np.uint64)
    count = images // 5
    near = hashes[rng.integers(0, images - count, count), rng.integers(0, 1 + len(PLACES), count)]
    for _ in range(4):
        near ^= np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64)
    hashes[-count:, 0] = near
    began, cpu = time.monotonic(), time.process_time()
    found = duplicates_of(hashes)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{images} images: {len(found)} found, {count} planted, {seconds:.0f} s, {cpu:.0f} of CPU, {memory:.2f} GiB")


def main():
    """Print precision and recall, means of ten draws, and the times of searches."""
    with tempfile.TemporaryDirectory() as name:
        write_miniature(Path(name), level=4, num_train=300, num_val=1, num_test=1, num_web=1)
        paths = sorted((Path(name) / "images" / "train").iterdir())
        sets = {"photographs": photograph_tiles(), "miniature": [Image.open(path).convert("RGB") for path in paths]}
    model = load("features", MODEL, "cpu")
    ways = {"hash": by_hash} | {f"cosine {cosine}": by_features(model, cosine) for cosine in (0.95, 0.99, 0.999)}
    for (name, images), (way, find) in product(sets.items(), ways.items()):
        results = [precision_and_recall(*planted(images, seed), find) for seed in range(10)]
        precision, recall = np.mean(results, axis=0)
        print(f"{name}, {len(images)} images, {way}: precision {precision:.3f}, recall {recall:.3f}", flush=True)
    for images in map(int, sys.argv[1:]):
        time_search(images)


if __name__ == "__main__":
    main()
