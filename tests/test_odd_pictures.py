"""Images of every odd kind: what each becomes, in every reader, and how a training set with 1% of them goes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scripts import TINY, run_here
from scripts import settings as given_settings

from data import build_datasets
from data.coco_flickr import CaptionTrain
from data.images import as_rgb
from data.pretrain import PairDataset
from data.shards import TarPairs
from data.transforms import BAD_IMAGE, open_image, to_rgb, train_transform
from data.transforms import test_transform as plain_transform
from launch.config import CaptionConfig
from launch.run import Run
from pretrain import BadImages
from utils import UserError

ORANGE = (200, 100, 40)
TURN = Image.Exif()
TURN[0x0112] = 6  # "turn by a quarter to the right"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def orange(mode="RGB", size=(20, 12)):
    return Image.new("RGB", size, ORANGE).convert(mode)


def animated():
    frames = [orange(), Image.new("RGB", (20, 12), (0, 0, 255))]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def transparent():
    image = orange("RGBA")
    image.putalpha(0)
    return encoded(image)


def turned():
    """Left half black, right half orange; upright, the right half is below."""
    image = orange()
    image.paste((0, 0, 0), (0, 0, 10, 12))
    return encoded(image, "JPEG", exif=TURN, quality=95)


JPEG = encoded(orange(), "JPEG", quality=95)
# name -> bytes, size as read, colour at the right edge as read
READ = {
    "grey.jpg": (encoded(Image.new("L", (20, 12), 90), "JPEG"), (20, 12), (90, 90, 90)),
    "cmyk.jpg": (encoded(orange("CMYK"), "JPEG", quality=95), (20, 12), ORANGE),
    "palette.png": (encoded(orange("P")), (20, 12), None),
    "sixteen.png": (encoded(Image.fromarray(np.full((12, 20), 30_000, np.uint16))), (20, 12), (255, 255, 255)),
    "alpha.png": (transparent(), (20, 12), ORANGE),
    "animated.gif": (animated(), (20, 12), None),
    "turned.jpg": (turned(), (20, 12), ORANGE),
    "one.png": (encoded(orange(size=(1, 1))), (1, 1), ORANGE),
    "mislabelled.jpg": (encoded(orange()), (20, 12), ORANGE),
}
REFUSED = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "empty.jpg": b"",
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "bomb.png": encoded(Image.new("1", (14_000, 14_000))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("odd")
    for name, (content, *_) in READ.items():
        (found / name).write_bytes(content)
    for name, content in REFUSED.items():
        (found / name).write_bytes(content)
    for number in range(200):
        Image.new("RGB", (20, 12), (number, 0, 0)).save(found / f"plain{number}.png")
    return found


@pytest.mark.parametrize("name", READ)
def test_read(folder, name):
    image = open_image(folder / name)
    assert (image.mode, image.size) == ("RGB", READ[name][1])
    wanted = READ[name][2] or ORANGE
    near = 3 if READ[name][2] else 60  # palettes have the web's colours, or a GIF's
    assert np.abs(np.subtract(image.getpixel((image.width - 1, 0)), wanted)).max() <= near
    for transform in (plain_transform(16), train_transform(16)):
        assert transform.read(folder / name).shape == (3, 16, 16)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(folder, name):
    with pytest.raises(UserError, match=f"{name} cannot be read .*replace it or take it out") as error:
        open_image(folder / name)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_hundred_megapixels_are_read(tmp_path):
    Image.new("L", (10_000, 10_000), 77).save(tmp_path / "large.jpg")
    tensor = plain_transform(16).read(tmp_path / "large.jpg")
    again = train_transform(16, augment=False, reduced_jpeg=True).read(tmp_path / "large.jpg")
    assert tensor.std(dim=(1, 2)).max() < 1e-3 and (tensor - again).abs().max() < 0.02


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[0, 255]], np.int32), [0, 255]),  # mode I that holds bytes
        (np.array([[0, 65535]], np.int32), [0, 255]),
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 200]], np.uint16), [0, 200]),
        (np.array([[0.0, 0.5, 1.0, 1.0, 1.0]], np.float32), [0, 128, 255, 255, 255]),  # mode F
        (np.array([[0.0, 200.0]], np.float32), [0, 200]),
        (np.array([[0.0, 65535.0]], np.float32), [0, 255]),
    ],
)
def test_d7_values_are_scaled_by_what_they_hold(values, wanted, tmp_path):
    image = Image.fromarray(values)
    image.save(tmp_path / "i.tiff")
    for source in (image, values, tmp_path / "i.tiff", (tmp_path / "i.tiff").read_bytes(), np.stack([values] * 3)):
        assert [pixel[0] for pixel in np.asarray(as_rgb(source))[0]] == wanted
    normalised = torch.tensor([[[-1.8, 2.1]]])
    for bad in (normalised, np.full((2, 2), np.nan), np.full((2, 2), 70_000)):
        with pytest.raises(UserError, match="cannot be read .*expected 0 to 1, to 255 or to 65535"):
            as_rgb(bad)


def test_orientation_is_left_aside_unless_asked(folder):
    row = [{"image": "turned.jpg", "caption": "x"}]
    (folder / "rows.json").write_text(json.dumps(row))
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name, content in (("0.jpg", READ["turned.jpg"][0]), ("0.txt", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for upright, dark in ((False, (slice(None), slice(8))), (True, (slice(8), slice(None)))):
        for transform in (plain_transform(16, upright), train_transform(16, augment=False, upright=upright)):
            captions = CaptionTrain(str(folder / "rows.json"), str(folder), transform)
            pairs = PairDataset([folder / "rows.json"], str(folder), transform)
            shard = TarPairs([str(folder / "shard.tar")], transform, 1, 1, 1)
            for item in (captions[0], pairs[0], shard.at(0, 0)):
                red = item["image"][0]
                assert red[dark].mean() < -1 < red.mean()


def test_the_setting_reaches_every_dataset(folder):
    (folder / "rows.json").write_text(json.dumps([{"image": "turned.jpg", "caption": "x"}]))
    own = dict.fromkeys(("train_file", "val_file", "test_file"), str(folder / "rows.json"))
    for asked in (False, True):
        config = CaptionConfig(image_root=str(folder), image_size=16, exif_orientation=asked, **own)
        assert [data.transform.upright for data in build_datasets("caption_coco", config).values()] == [asked] * 3
    assert CaptionConfig().exif_orientation is False


def test_one_percent_of_a_pretraining_list(folder):
    """Every unreadable image is replaced and named, every other one is read."""
    names = [f"plain{i}.png" for i in range(200)] * 6
    odd = [*READ, *REFUSED]
    for place, name in enumerate(odd):
        names[place * 97] = name
    (folder / "pairs.json").write_text(json.dumps([{"image": name, "caption": name} for name in names]))
    data = PairDataset([folder / "pairs.json"], str(folder), plain_transform(16))
    items = [data.at(0, i) for i in range(len(data))]
    named = [line for item in items for line in item["bad"].splitlines()]
    assert len(named) == len(REFUSED) and all(any(name in line for line in named) for name in REFUSED)
    assert not {item["caption"] for item in items} & set(REFUSED)


def test_pretraining_counts_them_in_its_log(folder, tmp_path):
    names = [f"plain{i}.png" for i in range(28)] + list(REFUSED)
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": name, "caption": "a dog"} for name in names]))
    values = dict(image_root=folder, train_file=f"[{tmp_path / 'pairs.json'}]", batch_size=8, max_epoch=2,
                  queue_size=16, embed_dim=16)  # fmt: skip
    tiny = [part for value in TINY for part in ("--set", value)]
    config = ["--config", "configs/miniature/pretrain.yaml", "--output_dir", tmp_path / "out"]
    code, told = run_here("pretrain.py", *config, *tiny, *given_settings(**values))
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert code == 0, told
    assert [row["bad_images"] for row in rows] == [len(REFUSED)] * 2  # each counted once
    listed = (tmp_path / "out" / "bad_images_rank0.txt").read_text().splitlines()
    assert len(listed) == len(REFUSED)


def test_the_count_goes_on_with_the_run(tmp_path):
    run = Run(tmp_path, "cpu")
    BadImages(9, run).inspect({"bad": ["a.jpg: bad", "", "b.jpg: bad\nc.jpg: bad"]})
    run.resume = tmp_path / "checkpoint_last.pth"
    again = BadImages(9, run)
    again.inspect({"bad": ["b.jpg: bad", "d.jpg: bad"]})
    assert again.count(None) == {"bad_images": 4} and len(again.path.read_text().splitlines()) == 4
    run.resume = None
    assert BadImages(9, run).count(None) == {"bad_images": 0} and not again.path.exists()


def test_other_trainings_stop_at_one(folder, tmp_path):
    rows = [{"image": "truncated.jpg", "image_id": 1, "caption": "x"}] * 8
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "gt.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": rows[:1]}))
    own = dict.fromkeys(("train_file", "val_file", "test_file"), tmp_path / "rows.json")
    own |= dict.fromkeys(("val_gt", "test_gt"), tmp_path / "gt.json")
    values = dict(image_root=folder, batch_size=4, max_epoch=1, java="false", **own)
    tiny = [part for value in TINY for part in ("--set", value)]
    config = ["--config", "configs/miniature/caption.yaml", "--output_dir", tmp_path / "out"]
    code, told = run_here("train_caption.py", *config, *tiny, *given_settings(**values))
    assert code == 2 and told.splitlines()[-1].startswith("error: image ") and "truncated.jpg" in told


WHOLE = {kind: encoded(orange(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")}


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sampled_from(sorted(WHOLE)), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
       st.just(1) | st.floats(0.3, 1))  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_are_a_image_or_a_known_error(kind, changes, share):
    content = bytearray(WHOLE[kind])
    for place, value in changes:
        content[place % len(content)] = value
    try:
        with Image.open(io.BytesIO(content[: int(len(content) * share)])) as image:
            if image.width * image.height < 10**6:
                assert to_rgb(image, upright=True).mode == "RGB"
    except BAD_IMAGE as error:
        assert not isinstance(error, AssertionError), error
