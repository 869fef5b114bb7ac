"""The captioner and the VQA model as ONNX graphs, searched without PyTorch: the same texts as with it."""

import json
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import ROOT

import convert
from inference import load
from inference.onnx import OnnxModel
from inference.onnx_export import quantize
from miniature.scene import draw_scene, render
from miniature.text import caption_is_exact
from models.tokenizer import decode, init_tokenizer

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
MINIATURE = ROOT / "configs" / "miniature"
CHECKPOINTS = {"caption": MINIATURE / "model.safetensors", "vqa": MINIATURE / "vqa.safetensors"}
QUESTIONS = ("how many objects are there?", "what color is the circle?", "is there a red ring left of a (blue) square?")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders that convert.py writes."""
    root = tmp_path_factory.mktemp("onnx")
    for task, checkpoint in CHECKPOINTS.items():
        words = ["--to-onnx", str(checkpoint), "--part", task, "--output", str(root / task)]
        convert.convert(convert._parser().parse_args(words))
    return root


@pytest.fixture(scope="module")
def images():
    rng = random.Random(11)
    return [render(draw_scene(rng, 1 + number % 4)) for number in range(500)]


def captions(rows):
    return [row["captions"][0]["caption"] for row in rows]


def test_500_captions_of_500_are_equal(folders, images):
    found = OnnxModel(folders / "caption", 1).caption(images)
    assert found == captions(load("caption", CHECKPOINTS["caption"], "cpu").captions(images))
    assert len(set(found)) > 300


@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 5, "max_length": 30, "min_length": 15}])
def test_captions_of_other_searches_are_equal(folders, images, search):
    found = OnnxModel(folders / "caption", 1).caption(images[:60], batch_size=7, **search)
    assert found == captions(load("caption", CHECKPOINTS["caption"], "cpu").captions(images[:60], **search))


def test_answers_are_equal(folders, images):
    model, answerer = OnnxModel(folders / "vqa", 1), load("vqa", CHECKPOINTS["vqa"], "cpu")
    rows = answerer.answer(images[:60], QUESTIONS)
    for number, question in enumerate(QUESTIONS):
        assert model.answer(images[:60], question) == [row["answers"][number]["answer"] for row in rows]


def test_log_probabilities_are_the_models_own(folders, images):
    model = OnnxModel(folders / "caption", 1)
    texts = model.search(model._run("image", image=model.pixels(images[:8]))[0])
    rows = load("caption", CHECKPOINTS["caption"], "cpu").caption(images[:8])
    expected = [row["captions"][0]["log_prob"] for row in rows]
    assert [text.log_prob for text in texts] == pytest.approx(expected, abs=1e-3)


def test_int8_has_a_third_of_the_size_and_like_scores(folders, images, tmp_path):
    scenes, rng = [], random.Random(11)
    for number in range(500):
        scenes.append([(item.color, item.shape) for item in draw_scene(rng, 1 + number % 4).items])
    exact, sizes = [], []
    shutil.copytree(folders / "caption", tmp_path / "int8")
    for path in (tmp_path / "int8").glob("*.onnx"):
        quantize(path)
    for folder in (folders / "caption", tmp_path / "int8"):
        captions = OnnxModel(folder, 1).caption(images)
        exact.append(sum(map(caption_is_exact, captions, scenes)) / 500)
        sizes.append(sum(path.stat().st_size for path in folder.iterdir()))
    assert sizes[1] < sizes[0] / 3 and exact[1] > exact[0] - 0.005, (sizes, exact)


def test_the_runner_needs_no_torch(folders, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'torchvision', 'transformers')))\n"
        "from inference import onnx; sys.exit(onnx.main())"
    )
    for task, more in (("caption", ()), ("vqa", ("--question", QUESTIONS[0]))):
        words = [sys.executable, "-c", code, str(folders / task), str(tmp_path / "a.png"), *more]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout).keys() == {"image", "caption" if task == "caption" else "answer"}


def test_pixels_are_the_transforms(folders, captioner_transform, images):
    odd = [
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (91, 33, 4), np.uint8), "RGBA"),
        images[0].convert("L"), images[1].convert("P"), images[2].convert("CMYK"), images[3],
    ]  # fmt: skip
    found = OnnxModel(folders / "caption", 1).pixels(odd)
    assert np.array_equal(found, torch.stack([captioner_transform(i.convert("RGB")) for i in odd]).numpy())


@pytest.fixture(scope="module")
def captioner_transform():
    return load("caption", CHECKPOINTS["caption"], "cpu").transform


def test_texts_are_decoded_as_by_the_released_tokenizer():
    model, tokenizer, rng = OnnxModel.__new__(OnnxModel), init_tokenizer(), random.Random(0)
    from inference.onnx_export import tokenizer_of

    model.tokenizer, model.settings = tokenizer_of(tokenizer), {"special_ids": sorted(tokenizer.all_special_ids)}
    words = tokenizer("it's a dog's don't ' . , ! ? n't they've we're i'm unbelievable (x) 3.5 - do not").input_ids
    for _ in range(300):
        ids = [rng.choice(words) if rng.random() < 0.8 else rng.randrange(30524) for _ in range(rng.randrange(1, 14))]
        assert model.decode(ids) == decode(tokenizer, [torch.tensor(ids)])[0]


def test_questions_are_tokenized_as_by_the_answerer(folders):
    from data.text import pre_question
    from models.tokenizer import tokenize

    model, tokenizer = OnnxModel(folders / "vqa", 1), load("vqa", CHECKPOINTS["vqa"], "cpu").model.tokenizer
    for question in (*QUESTIONS, "What COLOR is: the (circle)?  ", "red circle " * 40, "café 東京?", "a " * 70):
        expected = tokenize(tokenizer, pre_question(question, 50), "enc", 35).input_ids[0].tolist()
        assert model.question_ids(question).tolist() == expected


def test_mistakes_of_the_runner(folders, tmp_path, images):
    with pytest.raises(ValueError, match="holds no captioner or VQA model"):
        OnnxModel(tmp_path)
    model = OnnxModel(folders / "vqa", 1)
    with pytest.raises(ValueError, match="--part caption"):
        model.caption(images[:1])
    with pytest.raises(ValueError, match="question is empty"):
        model.answer(images[:1], " ")
    with pytest.raises(ValueError, match="does-not-exist.png cannot be read"):
        model.answer(["does-not-exist.png"], QUESTIONS[0])
    images[0].save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        model.answer([tmp_path / "cut.png"], QUESTIONS[0])
    with pytest.raises(ValueError, match="8 bits a channel"):
        model.answer([Image.new("I;16", (8, 8))], QUESTIONS[0])
    with pytest.raises(ValueError, match="raise the lower"):
        model.answer(images[:1], QUESTIONS[0], max_length=1)
