"""Captions of many images as their owners use them: text files beside images, tables, and the best of several."""

import csv
import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import ROOT

import predict
from inference import load
from inference.sidecars import Sidecars
from miniature.scene import draw_scene, render
from models.generation import GenerationConfig, Stepper
from utils import UserError

MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    root, rng = tmp_path / "images", random.Random(1)
    root.mkdir()
    for number in range(4):
        render(draw_scene(rng, 1)).save(root / f"{number}.png")
    return root


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words), "--checkpoint", MODEL])
    return predict.main()


def texts(folder, ending=".txt"):
    return {path.stem: path.read_text() for path in sorted(folder.glob(f"*{ending}"))}


def test_sidecars(folder, monkeypatch, capsys):
    assert command(monkeypatch, "caption", folder, "--sidecar") == 0
    captions = [row["captions"][0]["caption"] for row in load("caption", MODEL).caption(sorted(folder.glob("*.png")))]
    assert list(texts(folder).values()) == [f"{caption}\n" for caption in captions]
    assert "{" not in capsys.readouterr().out  # the text files are the output


def test_sidecars_that_exist(folder, monkeypatch):
    (folder / "0.txt").write_text("mine\n")
    assert command(monkeypatch, "caption", folder, "--sidecar") == 0
    first = texts(folder)
    assert first["0"] == "mine\n" and len(first) == 4
    (folder / "3.txt").unlink()
    assert command(monkeypatch, "caption", folder, "--sidecar", "--sidecar_mode", "append") == 0
    second = texts(folder)
    assert second["0"].startswith("mine\n") and len(second["0"].splitlines()) == 2
    assert second["1"] == first["1"] * 2 and second["3"] == first["3"]
    assert command(monkeypatch, "caption", folder, "--sidecar", "--sidecar_mode", "overwrite") == 0
    third = texts(folder)
    assert third["0"] != "mine\n" and third["1"] == first["1"]


def test_prefix_suffix_prompt_and_ending(folder, monkeypatch):
    words = ("--sidecar", "--sidecar_ending", "caption", "--prefix", "shapes, ", "--suffix", ", flat", "--keep_prompt")
    assert command(monkeypatch, "caption", folder, *words, "--prompt", "a picture of ") == 0
    found = texts(folder, ".caption")
    assert len(found) == 4
    assert all(text.startswith("shapes, a picture of ") and text.endswith(", flat\n") for text in found.values())


def test_several_captions_are_lines(folder, monkeypatch):
    assert command(monkeypatch, "caption", folder, "--sidecar", "--num_captions", 3) == 0
    assert all(len(set(text.splitlines())) == 3 for text in texts(folder).values())


def test_two_images_with_one_text_file_are_refused(folder, monkeypatch, capsys):
    Image.open(folder / "0.png").save(folder / "0.jpg")
    assert command(monkeypatch, "caption", folder, "--sidecar") == 2
    assert "have the same text file" in capsys.readouterr().err and not texts(folder)
    with pytest.raises(UserError, match="no folder for a text file"):
        Sidecars().left(["https://example.org/a.jpg"])


def test_a_table(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "new" / "captions.csv"
    (folder / "broken.png").write_bytes(b"no image")
    output.parent.mkdir()
    assert command(monkeypatch, "caption", folder, "--output", output, "--prefix", 'a "quoted", prefix ') == 0
    with open(output, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [str(folder / f"{number}.png") for number in range(4)]
    assert all(row["caption"].startswith('a "quoted", prefix ') for row in rows)
    for other in ("match", "search"):
        assert command(monkeypatch, other, folder, "--text", "a", "--output", tmp_path / "other.csv") == 2
        assert "only captions are written as .csv" in capsys.readouterr().err
    assert command(monkeypatch, "caption", folder, "--output", output, "--resume") == 2
    assert "needs an --output of JSON lines" in capsys.readouterr().err


def test_the_best_of_several_as_the_matching_model_ranks_them(folder, monkeypatch):
    captioner, matcher = load("caption", MODEL), load("match", MODEL)
    paths = sorted(folder.glob("*.png"))
    encoded = []
    matcher.model.visual_encoder.register_forward_hook(lambda module, args, output: encoded.append(len(output)))
    plain = captioner.caption(paths, sample=True, num_captions=4)
    ranked = captioner.caption(paths, sample=True, num_captions=4, rank_by=matcher)
    assert sum(encoded) == len(paths)  # once for all captions of an image
    for path, one, other in zip(paths, plain, ranked, strict=True):
        assert {row["caption"] for row in one["captions"]} == {row["caption"] for row in other["captions"]}
        probabilities = [row["probability"] for row in other["captions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        alone = matcher.match(path, [row["caption"] for row in other["captions"]])[0]["matches"]
        assert [row["probability"] for row in alone] == pytest.approx(probabilities, abs=2e-4)
    words = ("--sidecar", "--sample", "--num_captions", 4, "--rank_by", MODEL)
    assert command(monkeypatch, "caption", folder, *words) == 0
    assert list(texts(folder).values()) == [row["captions"][0]["caption"] + "\n" for row in ranked]


def test_a_ranking_model_of_another_size_is_refused(folder):
    with pytest.raises(UserError, match="load it with image_size=64"):
        load("caption", MODEL).caption(folder / "0.png", rank_by=load("match", MODEL, image_size=96))


def test_temperature_and_top_k(folder):
    captioner = load("caption", MODEL)
    greedy = captioner.caption(folder / "0.png", num_beams=1)[0]["captions"][0]["caption"]
    settings = {"sample": True, "repetition_penalty": 1.0}
    for more in ({"top_k": 1}, {"temperature": 1e-4}):
        assert captioner.caption(folder / "0.png", **settings, **more)[0]["captions"][0]["caption"] == greedy


SEARCHES = [{"num_beams": 3}, {"num_beams": 1}, {"sample": True, "repetition_penalty": 1.0}]


@pytest.mark.parametrize("settings", SEARCHES, ids=["beams", "greedy", "sampling"])
def test_banned_words_and_phrases(folder, settings):
    captioner = load("caption", MODEL)
    paths = sorted(folder.glob("*.png"))
    for row in captioner.caption(paths, **settings):
        words = row["captions"][0]["caption"].split()
        for banned in (words[-1], " ".join(words[1:3])):
            (again,) = captioner.caption([row["image"]], banned=[banned, "elephant"], **settings)
            caption = again["captions"][0]["caption"]
            assert caption and f" {banned} " not in f" {caption} "
    with pytest.raises(UserError, match="banned phrase is empty"):
        captioner.caption(paths, banned=[" "])


@pytest.mark.parametrize("settings", SEARCHES, ids=["beams", "greedy", "sampling"])
def test_no_ngram_is_repeated(folder, settings):
    captioner = load("caption", MODEL)
    long = {"min_length": 30, "max_length": 34} | settings

    def repeats(size, **more):
        found = 0
        for row in captioner.caption(sorted(folder.glob("*.png")), **long, **more):
            ids = captioner.model.tokenizer(row["captions"][0]["caption"]).input_ids[1:-1]
            grams = [tuple(ids[i : i + size]) for i in range(len(ids) - size + 1)]
            found += len(grams) - len(set(grams))
        return found

    assert repeats(2) > 0 and repeats(2, no_repeat_ngram_size=2) == 0


def test_constraints_are_those_of_transformers(folder):
    """The same tokens are blocked as by transformers' processors, for any texts."""
    from transformers import NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor

    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(6) for _ in range(rng.randrange(1, 12))]
        banned = tuple(tuple(rng.randrange(6) for _ in range(rng.randrange(1, 4))) for _ in range(3))
        size = rng.randrange(1, 4)
        config = GenerationConfig(banned=banned, no_repeat_ngram_size=size)
        ours = Stepper.blocked(SimpleNamespace(config=config), tokens)
        scores = torch.zeros(1, 7)
        for process in (NoBadWordsLogitsProcessor([*map(list, banned)], 6), NoRepeatNGramLogitsProcessor(size)):
            scores = process(torch.tensor([tokens]), scores)
        assert ours == {i for i, value in enumerate(scores[0].tolist()) if value == -float("inf")}


def test_19_rows_of_a_list_have_their_own_prompts(folder, monkeypatch):
    own = {"0.png": "a red", "2.png": "two"}
    rows = [{"image": f"{i}.png"} | ({"prompt": own[f"{i}.png"]} if f"{i}.png" in own else {}) for i in range(4)]
    (folder / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output = folder / "found.jsonl"
    words = "caption", folder / "list.jsonl", "--output", output, "--prompt", "a picture of ", "--min_length", 8
    assert command(monkeypatch, *words, "--sidecar", "--keep_prompt") == 0
    record, *found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row.get("prompt") for row in found] == ["a red", None, "two", None] and "prompts" in record["made_by"]
    kept = texts(folder)
    assert kept["0"].startswith("a red ") and kept["1"].startswith("a picture of ") and kept["2"].startswith("two ")
    model = load("caption", MODEL, prompt="a red")
    alone = model.caption(folder / "0.png", min_length=8)[0]["captions"]
    assert [row["caption"] for row in found[0]["captions"]] == [row["caption"] for row in alone]
    (folder / "list.jsonl").write_text(json.dumps({"image": "0.png", "prompt": 3}))
    assert command(monkeypatch, "caption", folder / "list.jsonl") == 2
