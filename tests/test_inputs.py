"""What predict.py is given: files, folders, lists, standard input, shells' globs, options in any order, odd texts."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from scripts import ROOT

import predict
from data.images import as_rgb
from data.pretrain import open_lists
from inference import load
from inference.inputs import find_images, image_endings, read_texts
from inference.options import parse
from inference.predictor import Predictor
from utils import UserError

MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
VQA = str(ROOT / "configs" / "miniature" / "vqa.safetensors")
RED = Image.new("RGB", (20, 12), (200, 30, 30))


@pytest.fixture
def folder(tmp_path):
    """Images in every way, text files beside them, a subfolder, a linked folder, and other systems' files."""
    root = tmp_path / "images"
    for sub in ("more", "__MACOSX"):
        (root / sub).mkdir(parents=True)
    for name in ("a.jpg", "b.PNG", "c.jfif", "d.avif", "e.tiff", "f.gif", "g.bmp", "h.jp2", "i.webp", "more/j.png"):
        RED.save(root / name)
    for name in ("a.txt", "b.txt", "notes.md", "clip.mp4", "no_ending"):
        (root / name).write_text("a red image\n")
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/a.jpg"):
        (root / name).write_bytes(b"\0")
    (tmp_path / "elsewhere").mkdir()
    RED.save(tmp_path / "elsewhere" / "k.png")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    return root


def names(images):
    return [os.path.basename(image) for image in images]


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    return predict.main()


def test_d9_what_a_folder_holds_besides_images_is_counted_once(folder, capsys):
    assert names(find_images([folder])) == [*(f"{n}" for n in (
        "a.jpg", "b.PNG", "c.jfif", "d.avif", "e.tiff", "f.gif", "g.bmp", "h.jp2", "i.webp", "j.png"))]  # fmt: skip
    (told,) = capsys.readouterr().err.splitlines()
    for part in ("2 .txt files", "1 .md files", "1 .mp4 files", "1 files without ending", "1 linked folders"):
        assert part in told
    assert names(find_images([folder], recursive=False))[-1] == "i.webp"


def test_endings_are_pillows_own():
    assert {".jpg", ".jfif", ".tiff", ".gif", ".bmp", ".jp2", ".webp", ".avif", ".pbm"} <= image_endings()
    assert not {".pdf", ".eps", ".mpg", ".h5", ".txt", ".json"} & image_endings()


def test_e_a_glob_that_catches_text_files(folder, capsys):
    caught = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = names(find_images(caught))
    assert found[:2] == ["a.jpg", "b.PNG"] and not any(name.endswith((".txt", ".md")) for name in found)
    assert "2 .txt files that name no images" in capsys.readouterr().err
    (folder / "list.txt").write_text("a.jpg\nmore/j.png\n")
    assert names(find_images([folder / "list.txt", folder / "b.PNG"])) == ["a.jpg", "j.png", "b.PNG"]


@pytest.mark.parametrize("ending", [".txt", ".json", ".jsonl"])
def test_e_a_list_with_a_byte_order_mark(folder, ending):
    content = {".txt": "a.jpg\nb.PNG\n", ".json": '["a.jpg", "b.PNG"]', ".jsonl": '{"image": "a.jpg"}\n"b.PNG"\n'}
    path = folder / f"list{ending}"
    path.write_text("\ufeff" + content[ending], encoding="utf-8")
    assert find_images([path]) == [folder / "a.jpg", folder / "b.PNG"]
    assert read_texts(path, "image") == ["a.jpg", "b.PNG"]


def test_standard_input_is_a_list(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{folder}/a.jpg\n\n{folder}/b.PNG\nhttps://example.org/c.jpg\n"))
    assert find_images(["-"]) == [folder / "a.jpg", folder / "b.PNG", "https://example.org/c.jpg"]


def test_e_options_stand_anywhere():
    orders = [
        "caption a.jpg b.jpg --checkpoint m --num_beams 1",
        "--checkpoint m caption --num_beams 1 a.jpg b.jpg",
        "--num_beams 1 caption a.jpg --checkpoint m b.jpg",
        "caption --checkpoint m a.jpg --num_beams 1 b.jpg",
    ]
    first, *others = [parse("", order.split()) for order in orders]
    assert first.images == ["a.jpg", "b.jpg"] and first.num_beams == 1 and first.checkpoint == "m"
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("caption a.jpg --checkpoint m --temperature 0", "expected a number above 0"),
        ("caption a.jpg --checkpoint m --top_p nan", "expected a number above 0, at most 1"),
        ("caption a.jpg --checkpoint m --num_beams 0", "expected a whole number, at least 1"),
        ("caption a.jpg --checkpoint m --num_captions 1e3", "expected a whole number, at least 1"),
        ("a.jpg --checkpoint m", "invalid choice: 'a.jpg'"),
        ("", "the following arguments are required: caption|vqa"),
    ],
)
def test_e_options_that_cannot_be(words, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        parse("", words.split())
    assert stop.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_e_a_device_that_is_absent(folder, monkeypatch, capsys, device):
    if torch.get_device_module(device).is_available():
        pytest.skip(f"this machine has {device}")
    assert command(monkeypatch, "caption", folder / "a.jpg", "--checkpoint", MODEL, "--device", device) == 2
    assert f"--device is '{device}', and PyTorch finds no such device" in capsys.readouterr().err


def test_e_lone_surrogates_in_texts(folder, monkeypatch, capsys):
    words = (folder / "a.jpg", "--text", "a \udcff circle", "--checkpoint", MODEL)
    assert command(monkeypatch, "match", *words) == 0
    assert json.loads(capsys.readouterr().out)["matches"][0]["text"] == "a \udcff circle"
    ask = ("vqa", folder / "a.jpg", "--question", "what \ud800?", "--checkpoint", VQA)
    assert command(monkeypatch, *ask) == 0


def test_e_a_missing_image_has_no_image_root(folder, monkeypatch, capsys):
    (folder / "list.txt").write_text("a.jpg\nabsent.jpg\n")
    assert command(monkeypatch, "caption", folder / "list.txt", "--checkpoint", MODEL) == 0
    told = capsys.readouterr().err
    assert "absent.jpg does not exist; correct its path" in told and "image_root" not in told


def test_e_a_full_disk_under_standard_output(folder, monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = command(monkeypatch, "caption", folder / "a.jpg", "--checkpoint", MODEL)
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.flush()
        assert code == 2
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert "standard output could not be written" in capsys.readouterr().err


def test_d9_texts_that_are_cut_are_counted(folder, capsys):
    long = " ".join(["red circle"] * 30)
    load("match", MODEL).match(folder / "a.jpg", ["a red circle", long])
    assert "1 of 2 texts are longer than 35 tokens" in capsys.readouterr().err
    load("vqa", VQA).answer(folder / "a.jpg", [long + "?"])
    assert "1 of 1 questions are longer than 35 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", [1.0, 2.0, 4.0])  # later than the start of Python itself
def test_e_an_interrupt_during_the_start_has_no_stack_trace(folder, seconds):
    words = [sys.executable, "predict.py", "caption", str(folder), "--checkpoint", MODEL]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert "Traceback" not in told


def settings_text():
    with safe_open(MODEL, "pt") as file:
        return file.metadata()["config"]


def test_e_messages_name_what_there_is(folder, tmp_path, monkeypatch, capsys):
    state = {key: value for key, value in load_file(MODEL).items() if key.startswith("visual")}
    torch.save({"model": state, "config": json.loads(settings_text())}, tmp_path / "odd.pth")
    assert command(monkeypatch, "match", folder / "a.jpg", "--text", "a", "--checkpoint", tmp_path / "odd.pth") == 2
    assert "odd.pth is a checkpoint of unknown kind and lacks" in capsys.readouterr().err
    (tmp_path / "pairs.json").write_text("no list")
    with pytest.raises(UserError, match="its beginning cannot be read"):
        open_lists([tmp_path / "pairs.json"])


# From Python.


@pytest.fixture(scope="module")
def captioner():
    return load("caption", MODEL)


def encoded(image=RED):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_images_in_any_form(folder, captioner, monkeypatch):
    array = np.asarray(RED)
    text = base64.b64encode(encoded()).decode()
    RED.save(folder / "same.png")
    monkeypatch.setattr("data.images.cached", lambda url: folder / "same.png")
    forms = [
        folder / "same.png", str(folder / "same.png"), RED, array, torch.tensor(array), array / 255,
        torch.tensor(array).permute(2, 0, 1), encoded(), text, f"data:image/png;base64,{text}",
        "https://example.org/same.png",
    ]  # fmt: skip
    with open(folder / "same.png", "rb") as file:
        rows = captioner.caption([*forms, io.BytesIO(encoded()), file])
    assert len({row["captions"][0]["caption"] for row in rows}) == 1
    assert rows[0]["image"] == str(folder / "same.png") and rows[2]["image"] == rows[8]["image"] == ""
    for form in (*forms, io.BytesIO(encoded())):
        assert np.array_equal(np.asarray(as_rgb(form)), array)
        assert len(captioner.caption(io.BytesIO(encoded()) if hasattr(form, "read") else form)) == 1
    assert len(captioner.caption(np.stack([array] * 3))) == 3 == len(captioner.caption(torch.zeros(3, 3, 8, 8)))


def test_a_generator_is_read_as_needed(captioner):
    read = []

    def images():
        for number in range(100):
            read.append(number)
            yield RED

    rows = captioner.captions(images(), batch_size=2)
    next(rows)
    assert len(read) <= 16
    assert len(list(rows)) == 99


@pytest.mark.parametrize("wrong", [{"image": "a.jpg"}, 5, None])
def test_what_is_no_image_is_one_clear_error(captioner, wrong):
    with pytest.raises(UserError, match=f"images are a {type(wrong).__name__}; expected a path, URL"):
        captioner.caption(wrong)


def test_what_is_no_image_in_a_list_is_its_rows_error(captioner):
    good, *bad = captioner.caption([RED, 5, None, np.zeros((2, 2, 2, 2))])
    assert "captions" in good and all("cannot be read" in row["error"] for row in bad)


# Memory.


class LittleMemory(Predictor):
    """Predicts at most three images at once."""

    def __init__(self):
        super().__init__(torch.nn.Linear(1, 1), 8)
        self.sizes = []

    def predict(self, image, names):
        self.sizes.append(len(image))
        if len(image) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return [{"mean": float(one.mean()), "name": name} for one, name in zip(image, names, strict=True)]


def test_e_a_batch_that_does_not_fit_is_halved(capsys):
    model = LittleMemory()
    given = [str(number) for number in range(20)]
    images = [Image.new("L", (8, 8), number) for number in range(20)]
    rows = list(model.rows(images, model.predict, batch_size=8, names=given))
    assert [row["name"] for row in rows] == given
    assert [row["mean"] for row in rows] == sorted(row["mean"] for row in rows)
    assert model.sizes == [8, 4, 2, 2, 2, 2] + [2] * 6
    assert capsys.readouterr().err.count("do not fit into memory") == 2


def test_e_one_image_that_does_not_fit_is_reported():
    model = LittleMemory()

    def predict(image, names):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(UserError, match="one image of 8 pixels does not fit into the memory of cpu"):
        list(model.rows([RED], predict))
    with pytest.raises(RuntimeError, match="something else"):
        list(model.rows([RED], lambda image, names: (_ for _ in ()).throw(RuntimeError("something else"))))
