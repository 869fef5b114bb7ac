"""predict.py and `models.load` on the model that ships with the project: what people get for their own images."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save as to_safetensors

import inference.search
import predict
from inference import load
from inference.explain import explain, sheet
from inference.inputs import find_images
from inference.search import Index, encode
from miniature.scene import draw_scene, render
from miniature.text import caption_is_exact
from models.generation import GenerationConfig, draw
from utils import UserError

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
VQA = str(ROOT / "configs" / "miniature" / "vqa.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of ten images, one of them in a subfolder, and one file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    rng, scenes = random.Random(5), []
    for number in range(10):
        scenes.append(draw_scene(rng, 1))
        render(scenes[-1]).save(folder / ("more" if number == 9 else "") / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder, scenes


@pytest.fixture(scope="module")
def captioner():
    return load("caption", MODEL)


@pytest.fixture(scope="module")
def matcher():
    return load("match", MODEL)


@pytest.fixture(scope="module")
def answerer():
    return load("vqa", VQA)


def command(monkeypatch, *words):
    """Run predict.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words)])
    return predict.main()


def lines(path):
    """Return the rows of a result file, without its record."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "made_by" not in row]


def image(world, number=0):
    return world[0] / f"{number}.png"


# Captions.


def test_captions_of_a_folder(world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "captions.jsonl"
    assert command(monkeypatch, "caption", world[0], "--checkpoint", MODEL, "--output", output, "--batch_size", 4) == 0
    rows = lines(output)
    names = [str(world[0] / f"{i}.png") for i in range(9)] + [
        str(world[0] / "broken.png"),
        str(world[0] / "more/9.png"),
    ]
    assert [row["image"] for row in rows] == names
    assert [row["image"] for row in rows if "error" in row] == [str(world[0] / "broken.png")]
    good = [row for row in rows if "error" not in row]
    exact = [
        caption_is_exact(row["captions"][0]["caption"], [(item.color, item.shape) for item in scene.items])
        for row, scene in zip(good, world[1], strict=True)
    ]
    assert sum(exact) >= 6
    assert "1 of 11 images could not be used" in capsys.readouterr().err


def test_resume_goes_on_after_the_last_whole_row(world, tmp_path, monkeypatch):
    output = tmp_path / "captions.jsonl"
    words = ("caption", world[0], "--checkpoint", MODEL, "--output", output)
    assert command(monkeypatch, *words) == 0
    whole = output.read_text()
    cut = whole.splitlines(keepends=True)
    output.write_text("".join(cut[:4]) + cut[4][:20])
    assert command(monkeypatch, *words, "--resume") == 0
    assert output.read_text() == whole


def test_resume_of_another_file_is_refused(world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "notes.txt"
    output.write_text("my notes\n")
    assert command(monkeypatch, "caption", world[0], "--checkpoint", MODEL, "--output", output, "--resume") == 2
    assert "choose another --output" in capsys.readouterr().err and output.read_text() == "my notes\n"


def test_several_captions_are_different_and_in_order(captioner, world):
    found = captioner.caption(image(world), num_captions=3)[0]["captions"]
    assert len({row["caption"] for row in found}) == 3
    assert found[0]["caption"] == captioner.caption(image(world))[0]["captions"][0]["caption"]
    with pytest.raises(UserError, match="widen the search"):
        captioner.caption(image(world), num_captions=4, num_beams=3)


def test_log_probability_is_the_models_own(captioner, world):
    """Teacher forcing over the caption's own tokens gives the log-probability that the search reported."""
    net = captioner.model
    for settings in ({"num_beams": 3}, {"num_beams": 1}, {"sample": True}):
        row = captioner.caption(image(world), min_length=1, **settings)[0]["captions"][0]
        ids = net.tokenizer(net.prompt + row["caption"], return_tensors="pt").input_ids
        ids[:, 0] = net.tokenizer.bos_token_id
        pixels = captioner.transform(Image.open(image(world)).convert("RGB"))[None]
        with torch.no_grad():
            projection = net.text_decoder.bert.project(net.visual_encoder(pixels))
            hidden = net.text_decoder.hidden_states(ids, projection=projection)
            log_probs = net.text_decoder.logits(hidden[0, :-1]).log_softmax(-1).gather(1, ids[0, 1:, None])
        assert row["log_prob"] == pytest.approx(log_probs.sum().item(), abs=2e-4)


def test_samples_depend_on_seed_and_image_only(captioner, world):
    paths = [image(world, i) for i in range(4)]
    settings = {"sample": True, "num_captions": 2}
    together = captioner.caption(paths, batch_size=4, **settings)
    alone = [captioner.caption(path, **settings)[0] for path in reversed(paths)]
    texts = [[c["caption"] for c in row["captions"]] for row in together]
    assert texts == [[c["caption"] for c in row["captions"]] for row in reversed(alone)]
    other = captioner.caption(paths, seed=1, **settings)
    assert texts != [[c["caption"] for c in row["captions"]] for row in other]


def test_draws_follow_the_nucleus():
    """Of probabilities .5 .3 .15 .05 and top_p .7, the first two stay; numbers in [0, 1) choose among 5/8 and 3/8."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log().expand(5, -1)
    uniform = torch.tensor([0.0, 0.62, 0.63, 0.9999999, 0.3])
    assert draw(logits, uniform, GenerationConfig(sample=True, top_p=0.7)).tolist() == [1, 1, 3, 3, 1]


# Answers.


def test_answers_to_questions(answerer, world):
    counts = [len(scene.items) for scene in world[1]]
    paths = [image(world, i) for i in range(9)]
    rows = answerer.answer(paths, ["how many objects are there?", "is there a circle?"])
    found = [row["answers"][0]["answer"] for row in rows]
    assert sum(answer == str(count) for answer, count in zip(found, counts)) >= 8
    assert all(row["answers"][1]["answer"] in ("yes", "no") for row in rows)


def test_chosen_answers_have_probabilities(answerer, world):
    row = answerer.answer(image(world), "how many objects are there?", answers=["1", "2", "3", "red"])[0]["answers"][
        0
    ]
    assert sum(c["probability"] for c in row["candidates"]) == pytest.approx(1, abs=1e-3)
    assert row["answer"] == row["candidates"][0]["answer"]
    values = [c["probability"] for c in row["candidates"]]
    assert values == sorted(values, reverse=True)


def test_a_question_is_answered_alike_alone_and_among_others(answerer, world):
    questions = ["is there a circle?", "how many objects are there in this image?"]
    together = answerer.answer(image(world), questions)[0]["answers"]
    assert together == [answerer.answer(image(world), q)[0]["answers"][0] for q in questions]


def test_an_empty_question_is_refused(answerer, world):
    with pytest.raises(UserError, match="question is empty"):
        answerer.answer(image(world), "  ")


# Matches and search.


def test_right_texts_match_better_than_wrong_ones(matcher, world):
    right = 0
    for number in range(9):
        items = world[1][number].items
        texts = [f"a {items[0].color} {items[0].shape}", "a small brown elephant"]
        found = matcher.match(image(world, number), texts)[0]["matches"]
        right += found[0]["probability"] > found[1]["probability"]
    assert right >= 8


def test_match_equals_the_models_own_forward(matcher, world):
    text = "a red circle"
    row = matcher.match(image(world), [text, "three objects, a small red circle and two blue squares"])[0]["matches"][
        0
    ]
    pixels = matcher.transform(Image.open(image(world)).convert("RGB"))[None]
    with torch.no_grad():
        probability = matcher.model(pixels, [text]).softmax(1)[0, 1].item()
        cosine = matcher.model(pixels, [text], match_head="itc").item()
    assert (row["probability"], row["cosine"]) == (
        pytest.approx(probability, abs=1e-4),
        pytest.approx(cosine, abs=1e-4),
    )


def test_search_builds_an_index_and_uses_it_again(world, tmp_path, monkeypatch, capsys):
    index, output = tmp_path / "index.safetensors", tmp_path / "found.jsonl"
    item = world[1][0].items[0]
    words = ("search", "--text", f"a {item.color} {item.shape}", "--checkpoint", MODEL, "--index", index)
    assert command(monkeypatch, *words, world[0], "--output", output) == 0
    found = lines(output)[0]
    assert len(found["images"]) == 5
    assert command(monkeypatch, *words) == 0  # from the index alone
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert command(monkeypatch, "search", "--text", "a", "--checkpoint", MODEL, "--index", tmp_path / "none") == 2
    assert "nothing to search" in capsys.readouterr().err
    assert command(monkeypatch, *words, image(world)) == 0  # one image only; the index keeps the others
    assert len(json.loads(capsys.readouterr().out)["images"]) == 1
    assert command(monkeypatch, *words, "--top", 9) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 9


def test_e_a_search_halves_batches_that_do_not_fit(world, tmp_path, monkeypatch, capsys):
    def found():
        assert command(monkeypatch, "search", world[0], "--text", "a red circle", "--checkpoint", MODEL) == 0
        told = capsys.readouterr()
        return json.loads(told.out), told.err

    expected, _ = found()
    whole = inference.search.encode

    def encode_few(matcher, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(matcher, batch)

    monkeypatch.setattr(inference.search, "encode", encode_few)
    again, told = found()
    assert again == expected and "going on with 2" in told


def test_an_index_is_never_taken_for_another(world, tmp_path, monkeypatch, capsys):
    features, index = tmp_path / "features.safetensors", tmp_path / "index.safetensors"
    assert command(monkeypatch, "features", world[0], "--checkpoint", MODEL, "--output", features) == 0
    words = ("search", world[0], "--text", "a circle", "--checkpoint")
    assert command(monkeypatch, *words, MODEL, "--index", features) == 2
    assert "is no index of images" in capsys.readouterr().err
    assert command(monkeypatch, *words, MODEL, "--index", index) == 0


def changed_copy(path):
    """Write the model with one weight changed."""
    state = load_torch(MODEL)
    state["vision_proj.bias"] = state["vision_proj.bias"] + 1
    with safe_open(MODEL, "pt") as file:
        path.write_bytes(to_safetensors(state, file.metadata()))


def test_d6_content_decides_whose_index_it_is(world, tmp_path, monkeypatch, capsys):
    """An identical copy of the checkpoint is the same model; other weights at the same path are not."""
    index, model = tmp_path / "index.safetensors", tmp_path / "model.safetensors"
    model.write_bytes(Path(MODEL).read_bytes())
    words = ("search", world[0], "--text", "a circle", "--index", index, "--checkpoint")
    assert command(monkeypatch, *words, MODEL) == 0
    first = capsys.readouterr().out
    assert command(monkeypatch, *words, model) == 0 and capsys.readouterr().out == first
    changed_copy(model)
    assert command(monkeypatch, *words, model) == 2
    assert "made with another checkpoint" in capsys.readouterr().err


def test_d6_content_decides_which_images_are_encoded(world, tmp_path, matcher, monkeypatch):
    """A copy, a renamed or a touched image is not encoded again; one that changed within its size and time is."""
    folder = tmp_path / "images"
    shutil.copytree(world[0], folder, ignore=shutil.ignore_patterns("broken.png"))
    encoded = []
    counted = lambda model, image: encoded.append(len(image)) or encode(model, image)  # noqa: E731
    monkeypatch.setattr("inference.search.encode", counted)
    index = Index(tmp_path / "index", "model")
    index.add(matcher, find_images([folder]))
    assert sum(encoded) == 10
    (folder / "0.png").rename(folder / "renamed.png")
    (folder / "1.png").touch()
    shutil.copy(folder / "2.png", folder / "copy.png")
    index = Index(tmp_path / "index", "model")
    index.add(matcher, find_images([folder]))
    assert sum(encoded) == 10
    for number, color in enumerate(("red", "blue")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{number}.bmp")
    index.add(matcher, [tmp_path / "0.bmp"])
    before, old = (tmp_path / "0.bmp").stat(), index.known[str(tmp_path / "0.bmp")][2]
    shutil.copyfile(tmp_path / "1.bmp", tmp_path / "0.bmp")
    os.utime(tmp_path / "0.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    index.add(matcher, [tmp_path / "0.bmp"])
    assert sum(encoded) == 12 and not torch.equal(index.known[str(tmp_path / "0.bmp")][2], old)


def test_d6_images_that_are_gone_take_no_place(world, tmp_path, monkeypatch, capsys):
    folder, index = tmp_path / "images", tmp_path / "index.safetensors"
    shutil.copytree(world[0], folder, ignore=shutil.ignore_patterns("broken.png"))
    words = ("search", "--text", "a circle", "--checkpoint", MODEL, "--index", index, "--top", 5, "--k_test", 1)
    assert command(monkeypatch, *words, folder) == 0
    found = [row["image"] for row in json.loads(capsys.readouterr().out)["images"]]
    Path(found[0]).unlink()
    Path(found[1]).write_bytes(b"damaged since")
    assert command(monkeypatch, *words) == 0
    captured = capsys.readouterr()
    assert "1 images of index" in captured.err and "no longer exist" in captured.err
    rows = [json.loads(line) for line in captured.out.splitlines()]
    names = [row["image"] for row in rows[0]["images"]]
    assert len(names) == 5 and not set(found[:2]) & set(names)
    assert [row["image"] for row in rows[1:]] == [found[1]] and "error" in rows[1]


def test_d5_resume_needs_the_same_settings(world, tmp_path, monkeypatch, capsys):
    output, model = tmp_path / "captions.jsonl", tmp_path / "model.safetensors"
    model.write_bytes(Path(MODEL).read_bytes())
    words = ("caption", world[0], "--output", output, "--resume", "--checkpoint")
    assert command(monkeypatch, *words, MODEL) == 0
    record = json.loads(output.read_text().splitlines()[0])["made_by"]
    assert record["command"] == "caption" and record["num_beams"] == 3
    whole = output.read_text()
    assert command(monkeypatch, *words, model, "--batch_size", 3) == 0  # a copy of the weights, another batch size
    for more, told in (
        (("--num_beams", 1), "num_beams"), (("--prompt", "a photo of "), "prompt"), (("--amp", "bf16"), "amp"),
    ):  # fmt: skip
        capsys.readouterr()
        assert command(monkeypatch, *words, MODEL, *more) == 2
        assert f"was made with other settings ({told})" in capsys.readouterr().err
    changed_copy(model)
    assert command(monkeypatch, *words, model) == 0  # no part of the captioner
    ask = ("match", world[0], "--text", "a circle", "--output", output, "--resume", "--checkpoint", MODEL)
    assert command(monkeypatch, *ask) == 2 and "(amp" not in capsys.readouterr().err
    assert output.read_text() == whole


def test_d5_questions_and_their_answers_are_settings(world, tmp_path, monkeypatch, capsys):
    output, answers = tmp_path / "answers.jsonl", tmp_path / "answers.txt"
    answers.write_text("1\n2\n")
    words = ("vqa", image(world), "--answers", answers, "--checkpoint", VQA, "--output", output, "--resume")
    words = (*words, "--question")
    assert command(monkeypatch, *words, "how many?") == 0 == command(monkeypatch, *words, "how many?")
    assert command(monkeypatch, *words, "how much?") == 2 and "(question)" in capsys.readouterr().err
    answers.write_text("1\n3\n")
    assert command(monkeypatch, *words, "how many?") == 2 and "(answers)" in capsys.readouterr().err


def test_d5_what_failed_is_tried_again_on_request(world, tmp_path, monkeypatch, capsys):
    folder, output = tmp_path / "images", tmp_path / "captions.jsonl"
    shutil.copytree(world[0], folder)
    words = ("caption", folder, "--checkpoint", MODEL, "--output", output)
    assert command(monkeypatch, *words) == 0
    good = [row for row in lines(output) if "error" not in row]
    shutil.copy(folder / "0.png", folder / "broken.png")
    assert command(monkeypatch, *words, "--resume") == 0 and len([r for r in lines(output) if "error" in r]) == 1
    assert command(monkeypatch, *words, "--resume", "--retry_failed") == 0
    rows = lines(output)
    assert rows[:-1] == good and rows[-1]["image"] == str(folder / "broken.png") and "captions" in rows[-1]


def test_d5_files_from_before_the_record_go_on(world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "captions.jsonl"
    words = ("caption", world[0], "--checkpoint", MODEL, "--output", output)
    assert command(monkeypatch, *words) == 0
    rows = output.read_text().splitlines(keepends=True)[1:]
    output.write_text("".join(rows[:4]))
    assert command(monkeypatch, *words, "--resume") == 0
    assert output.read_text() == "".join(rows) and "has no record of its settings" in capsys.readouterr().err
    ask = ("match", world[0], "--text", "a", "--checkpoint", MODEL, "--output", output, "--resume")
    assert command(monkeypatch, *ask) == 2 and "results of another command" in capsys.readouterr().err


def test_results_are_not_written_over(world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "captions.jsonl"
    output.write_text("precious\n")
    words = ("caption", image(world), "--checkpoint", MODEL, "--output", output)
    assert command(monkeypatch, *words) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err and output.read_text() == "precious\n"
    assert command(monkeypatch, *words, "--overwrite") == 0 and len(lines(output)) == 1


def test_images_are_read_upright_and_whole(tmp_path):
    from data.images import as_rgb

    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    Image.new("RGB", (40, 20), "red").save(tmp_path / "phone.jpg", exif=exif)
    assert as_rgb(tmp_path / "phone.jpg").size == (20, 40)
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(tmp_path / "grey.png")
    assert np.asarray(as_rgb(tmp_path / "grey.png")).mean() == 116
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(UserError, match="open image cannot be read"):
        as_rgb(Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize("content", ['[{"image": 5}]', '{"images": []}', "[", '[{"file": "a.jpg"}]'])
def test_a_list_of_something_else_is_refused(tmp_path, monkeypatch, capsys, content):
    (tmp_path / "list.json").write_text(content)
    assert command(monkeypatch, "caption", tmp_path / "list.json", "--checkpoint", MODEL) == 2
    assert "list.json" in capsys.readouterr().err.splitlines()[-1]


def test_a_prompt_is_never_part_of_a_caption(captioner, world):
    from models.generation import GenerationConfig

    captioner.model.prompt, old = "a picture of: ", captioner.model.prompt
    try:
        pixels = captioner.transform(Image.open(image(world)).convert("RGB"))[None]
        texts, _ = captioner.model.caption(pixels, GenerationConfig(max_length=20, min_length=1))
        assert not texts[0].startswith(("f", ":", "of")) and texts[0] == texts[0].strip()
    finally:
        captioner.model.prompt = old


def test_search_of_texts_for_a_image(world, tmp_path, monkeypatch, capsys):
    item = world[1][0].items[0]
    right = f"a {item.color} {item.shape}"
    texts = tmp_path / "texts.txt"
    texts.write_text(f"a brown elephant\n{right}\nnothing at all\n")
    assert command(monkeypatch, "search", image(world), "--texts", texts, "--checkpoint", MODEL) == 0
    found = json.loads(capsys.readouterr().out)["texts"]
    assert len(found) == 3 and found[0]["text"] == right


# Features.


@pytest.mark.parametrize("ending", [".safetensors", ".npy"])
def test_features_with_names(world, tmp_path, monkeypatch, ending):
    output = tmp_path / f"features{ending}"
    assert command(monkeypatch, "features", world[0], "--checkpoint", MODEL, "--output", output) == 0
    rows = np.load(output) if ending == ".npy" else load_file(output)["features"]
    assert rows.shape == (10, 128) and rows.dtype == np.float32
    if ending == ".npy":
        assert len(json.loads(output.with_suffix(".names.json").read_text())) == 10


# Maps.


@pytest.mark.parametrize("method", ["gradcam", "attention"])
@pytest.mark.parametrize("size", [(64, 64), (200, 90), (33, 121)])
def test_maps_fit_every_image_size(captioner, matcher, answerer, method, size):
    image = render(draw_scene(random.Random(3), 1), 128).resize(size)
    for model, text, answer in (
        (captioner, "a red circle", ""),
        (matcher, "a red circle", ""),
        (answerer, "is it red?", "yes"),
    ):
        maps = explain(model, image, text, answer, method)
        assert [word for word, _ in maps][:2] == ["(all)", text.split()[0]]
        assert all(grid.shape == (4, 4) and (grid >= 0).all() for _, grid in maps)
        assert max(grid.max() for _, grid in maps) > 0
        drawn = sheet(image, text, maps)
        assert drawn.width > 200 and drawn.height > 60


def test_recording_does_not_change_what_is_computed(matcher, world):
    pixels = matcher.transform(Image.open(image(world)).convert("RGB"))[None]
    from inference.explain import recorded

    with torch.no_grad():
        plain = matcher.model(pixels, ["a red circle"])
        with recorded(matcher.model.text_encoder, 0) as recording:
            seen = matcher.model(pixels, ["a red circle"])
    torch.testing.assert_close(plain, seen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recording[0].sum(-1), torch.ones_like(recording[0].sum(-1)))


def test_maps_are_on_the_object(matcher):
    """The word of a shape looks at the half of the image that holds the only object."""
    right = 0
    for seed in range(8):
        scene = draw_scene(random.Random(seed), 1)
        item = scene.items[0]
        grid = dict(explain(matcher, render(scene), f"a {item.color} {item.shape}", method="attention"))[item.shape]
        row, column = int(item.y * 4 - 1e-6), int(item.x * 4 - 1e-6)
        near = grid[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        right += near.mean() > grid.mean()
    assert right >= 6


def test_explain_writes_sheets(world, tmp_path, monkeypatch, capsys):
    words = ("match", image(world), "--text", "a red circle", "--checkpoint", MODEL, "--explain", tmp_path / "maps")
    assert command(monkeypatch, *words) == 0
    (path,) = json.loads(capsys.readouterr().out)["maps"]
    assert Image.open(path).width > 600


def test_a_layer_that_is_not_there(matcher, world):
    with pytest.raises(UserError, match="layers 0 to 1"):
        explain(matcher, image(world), "a red circle", layer=7)


# Mistakes.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["caption", "nowhere.jpg", "--checkpoint", MODEL], "does not exist"),
        (["caption", "tests", "--checkpoint", MODEL], "no image"),
        (["caption", "{broken}", "--checkpoint", MODEL], "no image could be used"),
        (["caption", "{good}", "--checkpoint", "absent.pth"], "absent.pth do"),
        (["match", "{good}", "--text", "a", "--checkpoint", VQA], "lacks what the task"),
        (["match", "{good}", "--text", "", "--checkpoint", MODEL], "a text is empty"),
        (["search", "{good}", "--checkpoint", MODEL], "give either --text"),
        (["features", "{good}", "--checkpoint", MODEL], "expected a file ending in"),
        (["search", "{good}", "--texts", "absent.txt", "--checkpoint", MODEL], "list absent.txt cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(world, monkeypatch, capsys, words, said):
    monkeypatch.chdir(ROOT)
    names = {"{good}": str(image(world)), "{broken}": str(world[0] / "broken.png")}
    assert command(monkeypatch, *[names.get(word, word) for word in words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and (said in last)


def test_a_pretraining_checkpoint_is_distinguished_from_a_vqa_checkpoint(world, monkeypatch, capsys):
    assert command(monkeypatch, "vqa", image(world), "--question", "why?", "--checkpoint", MODEL) == 0
    assert "it has not learned to answer" in capsys.readouterr().err


def test_results_have_standard_output_to_themselves(world):
    words = [sys.executable, "predict.py", "caption", str(image(world)), "--checkpoint", MODEL]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["image"] == str(image(world))


@pytest.mark.parametrize("name", ["caption", "vqa", "match", "search", "features"])
def test_help_has_an_example(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, name, "--help")
    assert stop.value.code == 0 and f"python predict.py {name}" in capsys.readouterr().out


def test_encoded_images_are_read_as_files_are(world, captioner):
    path = world[0] / "0.png"
    (of_file,), (of_bytes, broken) = captioner.caption(path), captioner.caption([path.read_bytes(), b"no image"])
    assert of_bytes["captions"] == of_file["captions"] and of_bytes["image"] == ""
    assert "cannot be read" in broken["error"]
    assert captioner.caption(path.read_bytes())[0]["captions"] == of_file["captions"]


@pytest.mark.parametrize("words", ["--help", "caption --help", "captoin a.jpg", "caption --beams 3"])
def test_help_and_wrong_options_do_not_wait_for_pytorch(words):
    script = "import runpy, sys\ntry: runpy.run_path('predict.py', run_name='__main__')\nexcept SystemExit: pass\n"
    script += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *words.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
