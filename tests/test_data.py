"""Datasets of every task: what an item holds, own data, and the message for every fault of a file."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import data.annotations
from data import create_dataset, transforms, vqa_collate_fn
from data.annotations import find_annotation, read_annotation
from data.coco_flickr import CaptionEval, CaptionTrain, RetrievalEval, RetrievalTrain
from data.ids import image_id
from data.nlvr import NLVR
from data.text import exchange_left_right, pre_caption, pre_question
from data.transforms import MEAN, STD, open_image, train_transform
from data.vqa import VQATest, VQATrain
from formula import golden
from utils import UserError

IMAGES = ("COCO_val2014_000000000007.jpg", "b.jpg", "c.jpg")
SIZE = 16
SQUARE = transforms.test_transform(SIZE)


@pytest.fixture
def root(tmp_path):
    """Three plain images, each of another grey."""
    for number, name in enumerate(IMAGES):
        Image.new("RGB", (20, 12), (60 * number,) * 3).save(tmp_path / name)
    return tmp_path


def grey(image):
    """Return the number of the image in a normalised tensor."""
    return round(float((image[0] * STD[0] + MEAN[0]).mean() * 255 / 60))


def write(folder, rows, name="rows.json"):
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return str(folder / name)


# Texts.


@pytest.mark.parametrize("text, max_words, result", golden()["pre_caption"])
def test_pre_caption(text, max_words, result):
    assert pre_caption(text, max_words) == result


@pytest.mark.parametrize("text, max_words, result", golden()["pre_question"])
def test_pre_question(text, max_words, result):
    assert pre_question(text, max_words) == result


def test_exchange_left_right():
    text = "the left image, right of the leftmost one, left-hand"
    assert exchange_left_right(text) == "the right image, left of the leftmost one, right-hand"


# Images.


def test_evaluation_squares_bicubically_and_normalises():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (30, 50, 3), np.uint8))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    expected = torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)
    torch.testing.assert_close(SQUARE(image), expected)


def test_training_crops_as_much_as_asked():
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 200, 3)))

    def spans(min_scale):
        torch.manual_seed(0)
        crop = train_transform(32, min_scale).transforms[0]
        return [float(np.ptp(np.asarray(crop(ramp)))) / 199 for _ in range(60)]

    # a side is at least sqrt(0.5 * 3 / 4) = 0.61 of the image's at scale 0.5, and 0.39 at 0.2
    assert 0.58 < min(spans(0.5)) < 0.75 and 0.36 < min(spans(0.2)) < 0.56
    torch.testing.assert_close(train_transform(SIZE, augment=False)(ramp), SQUARE(ramp))


def test_images_open_as_rgb_without_turning(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by a quarter"
    Image.new("L", (20, 10), 90).save(tmp_path / "grey.jpg", exif=exif)
    image = open_image(tmp_path / "grey.jpg")
    assert (image.mode, image.size) == ("RGB", (20, 10))


def test_bad_images_are_named(root):
    whole = (root / "b.jpg").read_bytes()
    (root / "short.jpg").write_bytes(whole[: len(whole) // 2])
    for name, words in (("absent.jpg", "does not exist"), ("short.jpg", "cannot be read")):
        with pytest.raises(UserError, match=f"{name} {words}"):
            open_image(root / name)


# Captions and retrieval.


def test_caption_train(root):
    rows = [
        {"image": IMAGES[1], "caption": "A DOG! (runs)", "image_id": "coco_9"},
        {"image": IMAGES[2], "caption": "two cats", "image_id": "coco_3"},
        {"image": IMAGES[1], "caption": "one dog", "image_id": "coco_9"},
    ]
    dataset = CaptionTrain(write(root, rows), root, SQUARE, "a picture of ")
    captions = [f"a picture of {text}" for text in ("a dog runs", "two cats", "one dog")]
    assert [dataset[i]["caption"] for i in range(3)] == captions
    assert [dataset[i]["image_id"] for i in range(3)] == [0, 1, 0]
    assert [grey(dataset[i]["image"]) for i in range(3)] == [1, 2, 1]
    pairs = RetrievalTrain(write(root, rows), root, SQUARE, max_words=1)
    assert [(pairs[i]["caption"], pairs[i]["idx"]) for i in range(3)] == [("a", 0), ("two", 1), ("one", 0)]


def test_a_validation_file_can_be_trained_on(root):
    rows = [{"image": IMAGES[0], "caption": ["one", "two"]}, {"image": IMAGES[1], "caption": ["three"]}]
    dataset = CaptionTrain(write(root, rows), root, SQUARE)
    assert [(dataset[i]["caption"], dataset[i]["image_id"]) for i in range(3)] == [("one", 0), ("two", 0), ("three", 1)]


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"image": "val2014/COCO_val2014_000000391895.jpg"}, 391895),
        ({"image": "000000000139.jpg"}, 139),
        ({"image": "cats/cat1.jpg"}, "cat1"),
        ({"image": "cat.7.png"}, "cat.7"),
        ({"image": "cat1.jpg", "image_id": "x"}, "x"),
        ({"image": "000139.jpg", "img_id": 4}, 4),
        ({"image": "000139.jpg", "id": 0}, 0),
    ],
)
def test_image_id(entry, expected):
    assert image_id(entry) == expected


def test_caption_eval_takes_an_image_once(root):
    rows = [{"image": name} for name in (IMAGES[0], IMAGES[1], IMAGES[0], IMAGES[2])]
    dataset = CaptionEval(write(root, rows), root, SQUARE)
    assert [dataset[i]["image_id"] for i in range(len(dataset))] == [7, "b", "c"]
    assert [grey(dataset[i]["image"]) for i in range(3)] == [0, 1, 2]
    assert dataset.path(2) == root / "c.jpg"


def test_two_images_cannot_have_one_id(root):
    rows = [{"image": IMAGES[1], "image_id": 5}, {"image": IMAGES[2], "image_id": "5"}]
    said = r"entries 0 and 1 .*the id 5 belongs to two images, b\.jpg and c\.jpg.*its own"
    with pytest.raises(UserError, match=said):
        CaptionEval(write(root, rows), root, SQUARE)


def test_retrieval_eval(root):
    rows = [
        {"image": IMAGES[0], "caption": ["A dog.", "Two dogs"]},
        {"image": IMAGES[1], "caption": "one line per caption"},
        {"image": IMAGES[1], "caption": "and again"},
    ]
    dataset = RetrievalEval(write(root, rows), root, SQUARE)
    assert dataset.text == ["a dog", "two dogs", "one line per caption", "and again"]
    assert dataset.image == list(IMAGES[:2]) and len(dataset) == 2
    assert dataset.txt2img == {0: 0, 1: 0, 2: 1, 3: 1}
    assert dataset.img2txt == {0: [0, 1], 1: [2, 3]}
    assert dataset[1]["index"] == 1 and grey(dataset[1]["image"]) == 1


# VQA.


def test_vqa_train(root):
    ten = ["yes"] * 7 + ["no"] * 2 + ["red"]
    rows = [
        {"dataset": "vqa", "image": IMAGES[0], "question": "Is it (so)?", "question_id": 1, "answer": ten},
        {"dataset": "vg", "image": IMAGES[1], "question": "What?", "question_id": 2, "answer": "a dog"},
    ]
    (root / "genome").mkdir()
    (root / IMAGES[1]).rename(root / "genome" / IMAGES[1])
    dataset = VQATrain([write(root, rows)], {"vqa": root, "vg": root / "genome"}, SQUARE)
    batch = vqa_collate_fn([dataset[0], dataset[1]])
    assert batch["question"] == ["is it so?", "what?"] and batch["n"] == [3, 1]
    assert batch["answer"] == ["yes", "no", "red", "a dog"]
    torch.testing.assert_close(batch["weights"], torch.tensor([0.7, 0.2, 0.1, 0.2]))
    assert [grey(image) for image in batch["image"]] == [0, 1]


def test_vqa_test(root):
    rows = [{"image": IMAGES[2], "question": "What?", "question_id": 12}]
    file, answers = write(root, rows), write(root, ["yes", "no"], "answers.json")
    dataset = VQATest(file, {"vqa": root, "vg": root}, SQUARE, answers)
    assert (dataset[0]["question"], dataset[0]["question_id"], dataset.answer_list) == ("what?", 12, ["yes", "no"])
    assert VQATest(file, {"vqa": root}, SQUARE).answer_list == []
    with pytest.raises(UserError, match=r"answers\.json, entry 1 .*: 3; expected a text"):
        VQATest(file, {"vqa": root}, SQUARE, write(root, ["yes", 3], "answers.json"))
    with pytest.raises(UserError, match="dataset is 'coco'; expected 'vqa' or 'vg'"):
        VQATest(write(root, [{**rows[0], "dataset": "coco"}]), {"vqa": root, "vg": root}, SQUARE)


# NLVR2.


def test_nlvr(root):
    rows = [{"images": list(IMAGES[1:]), "sentence": "The LEFT one is right.", "label": "True"}]
    dataset = NLVR(write(root, rows), root, SQUARE, swap=True)
    items = [dataset[0] for _ in range(40)]
    seen = {(grey(item["image0"]), grey(item["image1"]), item["sentence"]) for item in items}
    assert seen == {(1, 2, "the left one is right"), (2, 1, "the right one is left")}
    assert {item["label"] for item in items} == {1}
    still = NLVR(write(root, [{**rows[0], "label": "False"}]), root, SQUARE, swap=False)
    assert {(grey(still[0]["image0"]), still[0]["sentence"], still[0]["label"]) for _ in range(20)} == {
        (1, "the left one is right", 0)
    }


@pytest.mark.parametrize("change", [{"label": "yes"}, {"images": ["b.jpg"]}, {"images": "b.jpg"}, {"images": [1, 2]}])
def test_nlvr_faults(root, change):
    row = {"images": ["b.jpg", "c.jpg"], "sentence": "x", "label": "True"}
    with pytest.raises(UserError, match="entry 1 .*expected 'True' or 'False', and two images"):
        NLVR(write(root, [row, {**row, **change}]), root, SQUARE, swap=False)


# Annotation files.

FAULTS = [
    ("rows.json", '[\n{"image": "b.jpg"},\n{"image" "c.jpg"}\n]', "is not JSON: line 3: "),
    ("rows.jsonl", '{"image": "a"}\n\n{"image": "b\u2028"}\n{image}\n', "is not JSON: line 4: "),
    ("rows.json", '{"image": "b.jpg"}', "holds no list of entries"),
    ("rows.json", "[]", "holds no list of entries"),
    ("rows.json", '[{"image": "b.jpg"}, {"caption": "x"}]', r"entry 1 \(the first is 0\): lacks 'image'; add it"),
    ("rows.json", '[{"image": "b.jpg"}, "c.jpg"]', "entry 1 .*: is 'c.jpg'; expected an object with 'image'"),
    ("rows.json", '[{"image": ["b.jpg"]}]', r"entry 0 .*: 'image' is \['b.jpg'\]; expected a text"),
]


@pytest.mark.parametrize("name, content, message", FAULTS)
def test_faults_of_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        read_annotation(write(tmp_path, content, name), ("image",))


@pytest.mark.parametrize("caption", [3, True, {"raw": "x"}, ["x", 3], [["x"]], float("nan")])
def test_a_caption_is_a_text_or_texts(tmp_path, caption):
    with pytest.raises(UserError, match="'caption' is .*; expected a text, or a list of texts"):
        read_annotation(write(tmp_path, [{"caption": caption}]), ("caption",))


def test_encodings(tmp_path):
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf[{"image": "\xc3\xa4"}]')
    assert read_annotation(tmp_path / "bom.json", ("image",)) == [{"image": "ä"}]
    (tmp_path / "old.json").write_bytes(b'[{"image": "\xe4"}]')
    with pytest.raises(UserError, match="not text in UTF-8"):
        read_annotation(tmp_path / "old.json", ("image",))
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        read_annotation(tmp_path / "none.json", ("image",))


def test_missing_images_are_counted_and_named(root):
    rows = [{"image": name, "caption": "x"} for name in (*IMAGES, "sub/z.jpg", "y.jpg", "x.jpg", "w.jpg", "w.jpg")]
    with pytest.raises(UserError, match=r"4 of 7 files do not exist: \S*sub/z\.jpg, \S*w\.jpg, \S*x\.jpg, \.\.\.; "):
        CaptionTrain(write(root, rows), root, SQUARE)


def test_find_annotation(root, monkeypatch):
    def no_network(url, path, check):
        if path.is_file():
            return path
        raise UserError(f"{url} could not be downloaded; put it at {path}")

    monkeypatch.setattr(data.annotations, "fetch", no_network)
    mine = write(root, [])
    assert find_annotation(root, "rows.json") == mine
    assert find_annotation("elsewhere", "released.json", mine) == mine
    assert find_annotation(root, "released.json", "rows.json") == mine
    address = "https://storage.googleapis.com/sfr-vision-language-research/datasets/nlvr_dev.json"
    with pytest.raises(UserError, match=f"{root}/nlvr_dev.json is absent: {address} .* or name your own"):
        find_annotation(root, "nlvr_dev.json")
    with pytest.raises(UserError, match="other.json does not exist, neither here nor in"):
        find_annotation(root, "released.json", "other.json")


# By name.


def settings(root, **changes):
    return {"image_size": SIZE, "image_root": str(root), "ann_root": str(root), "prompt": "a ", **changes}


def test_create_dataset_on_own_files(root):
    rows = [{"image": name, "caption": ["one two three", "four"]} for name in IMAGES]
    own = dict.fromkeys(("train_file", "val_file", "test_file"), write(root, rows, "own.json"))
    train, val, test = create_dataset("caption_coco", settings(root, **own, max_words=2))
    assert (len(train), len(val), len(test)) == (6, 3, 3)
    assert train[0]["caption"] == "a one two" and train[0]["image"].shape == (3, SIZE, SIZE)
    train, val, _ = create_dataset("retrieval_flickr", settings(root, **own, max_words=2))
    assert (len(train), val.text[:2], train[0]["caption"]) == (6, ["one two", "four"], "one two")
    statement = {"images": list(IMAGES[:2]), "sentence": "x", "label": "True"}
    own = dict.fromkeys(own, write(root, [statement], "nlvr.json"))
    train, val, test = create_dataset("nlvr", settings(root, **own))
    assert (train.swap, val.swap, test.swap) == (True, False, False)
    assert create_dataset("nlvr", settings(root, **own, released_eval_swap=True))[2].swap is True


def test_create_dataset_by_released_names(root):
    for prefix in ("coco_karpathy", "flickr30k"):
        for split in ("train", "val", "test"):
            write(root, [{"image": IMAGES[0], "caption": split}], f"{prefix}_{split}.json")
    for name in ("retrieval_coco", "retrieval_flickr"):
        _, val, test = create_dataset(name, settings(root))
        assert (val.text, test.text) == (["val"], ["test"])
    for split, number in (("val", 3), ("test", 4)):
        write(root, [{"image": IMAGES[1], "img_id": number}], f"nocaps_{split}.json")
    assert [part[0]["image_id"] for part in create_dataset("nocaps", settings(root))] == [3, 4]


def test_create_dataset_vqa(root):
    row = {"image": IMAGES[0], "question": "What?", "question_id": 1, "answer": ["dog"]}
    write(root, [row] * 2, "vqa_train.json"), write(root, [row], "mine.json"), write(root, [row], "vqa_test.json")
    config = settings(root, vqa_root=str(root), vg_root=str(root), train_files=["vqa_train", "mine"])
    train, test = create_dataset("vqa", {**config, "inference": "generate"})  # which needs no list of answers
    assert (len(train), len(test), test.answer_list) == (3, 1, [])
    write(root, ["dog"], "answer_list.json")
    assert create_dataset("vqa", {**config, "inference": "rank"})[1].answer_list == ["dog"]
    with pytest.raises(UserError, match=r"yours\.json does not exist"):
        create_dataset("vqa", {**config, "train_files": ["yours"]})


def test_unknown_dataset():
    with pytest.raises(UserError, match="dataset is 'coco'; expected one of pretrain, caption_coco"):
        create_dataset("coco", settings("."))


def test_large_jpegs_are_decoded_at_a_lower_scale_that_no_crop_misses(tmp_path):
    rows, columns = np.mgrid[0:640, 0:896] / 20.0
    smooth = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], axis=-1) * 100 + 128
    path = tmp_path / "large.jpg"
    Image.fromarray(smooth.astype(np.uint8)).save(path, quality=95)
    assert open_image(path).size == (896, 640)
    for smallest, size in ((1, (112, 80)), (320, (448, 320)), (321, (896, 640))):
        assert open_image(path, smallest=smallest).size == size
    for image_size, min_scale in ((64, 0.2), (64, 0.5), (96, 0.2)):
        # the smallest crop is a side of sqrt(min_scale * 3 / 4) of the shorter side, and not below the result's
        smallest = train_transform(image_size, min_scale, reduced_jpeg=True).smallest
        assert image_size <= smallest * (min_scale * 0.75) ** 0.5 < image_size + 1
    whole, reduced = (train_transform(64, augment=False, reduced_jpeg=on).read(path) for on in (False, True))
    assert 0 < (whole - reduced).abs().mean() < 0.05
