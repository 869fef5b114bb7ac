"""Features of images and texts, on disk and in search: against the models' own, after kills, and approximately."""

import json
import os
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file
from scripts import ROOT, lines, run, run_and_signal

import predict
from inference import load
from inference.neighbours import Collection, build, recall
from inference.search import Index
from miniature.scene import draw_scene, render
from utils import UserError

MODEL = str(ROOT / "configs" / "miniature" / "model.safetensors")
TEXTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), random.Random(2)
    for number in range(12):
        render(draw_scene(rng, 2)).save(root / f"{number:02}.png")
    return root


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words), "--checkpoint", MODEL])
    return predict.main()


def pixels_of(model, folder):
    return torch.stack([model.transform(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))])


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5)


def test_every_kind_equals_the_networks_own(folder, tmp_path, monkeypatch):
    matcher = load("match", MODEL)
    net, paths = matcher.model, sorted(folder.glob("*.png"))
    pixels = pixels_of(matcher, folder)
    with torch.no_grad():
        tokens = net.visual_encoder(pixels)
        text = net.tokenizer(TEXTS, padding=True, return_tensors="pt")
        ids = text.input_ids.clone()
        ids[:, 0] = net.tokenizer.enc_token_id
        pairs = [net.text_encoder(ids, text.attention_mask, net.text_encoder.project(t[None].repeat(2, 1, 1)))[:, 0]
                 for t in tokens]  # fmt: skip
        expected = {
            "cls": tokens[:, 0],
            "tokens": tokens,
            "image": F.normalize(net.vision_proj(tokens[:, 0]), dim=-1),
            "multimodal": torch.stack(pairs),
        }
        texts = F.normalize(net.text_proj(net.text_encoder(text.input_ids, text.attention_mask)[:, 0]), dim=-1)
    extractor = load("features", MODEL)
    for kind, values in expected.items():
        more = {"texts": TEXTS} if kind == "multimodal" else {}
        rows = extractor.features(paths, kind=kind, batch_size=5, **more)
        close(np.stack([row["features"] for row in rows]), values)
        words = [word for text in more.get("texts", ()) for word in ("--text", text)]
        output = tmp_path / f"{kind}.safetensors"
        assert command(monkeypatch, "features", folder, "--kind", kind, *words, "--output", output) == 0
        close(load_file(output)["features"], values)
        with safe_open(output, "np") as file:
            assert json.loads(file.metadata()["names"]) == [str(path) for path in paths]
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    words = ("--kind", "text", "--texts", tmp_path / "texts.txt", "--output", tmp_path / "text.npy")
    assert command(monkeypatch, "features", *words) == 0
    close(np.load(tmp_path / "text.npy"), texts)
    assert json.loads((tmp_path / "text.names.json").read_text()) == TEXTS
    close(np.stack([row["features"] for row in extractor.each_text(TEXTS, batch_size=1)]), texts)
    (one,) = extractor.features(paths[0], kind="multimodal", texts=TEXTS[0])
    close(one["features"], pairs[0][0])


def test_any_checkpoint_that_has_the_parts(folder, tmp_path):
    """A captioner has the image encoder only; a model of LAVIS's or our VQA both encoders without projections."""
    captioner = {k: v for k, v in load_torch(MODEL).items() if k.startswith(("visual_encoder", "text_decoder"))}
    with safe_open(MODEL, "pt") as file:
        save_file(captioner, tmp_path / "captioner.safetensors", file.metadata())
    model = load("features", tmp_path / "captioner.safetensors")
    close(model.features(folder / "00.png")[0]["features"], torch.tensor(load("features", MODEL).features(
        folder / "00.png")[0]["features"]))  # fmt: skip
    for kind, lacking in (("image", "vision_proj"), ("multimodal", "text_encoder")):
        with pytest.raises(UserError, match=f"lacks {lacking}, which features of kind '{kind}' need"):
            model.features(folder / "00.png", kind=kind, texts="a circle")
    vqa = load("features", ROOT / "configs" / "miniature" / "vqa.safetensors")
    assert vqa.features(folder / "00.png", kind="multimodal", texts=TEXTS)[0]["features"].shape == (2, 128)
    with pytest.raises(UserError, match="lacks text_proj"):
        list(vqa.each_text(TEXTS))


def read(path):
    """Return the names and features of a file."""
    if path.suffix == ".npy":
        return json.loads(path.with_suffix(".names.json").read_text()), np.load(path)
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["names"]), file.get_tensor("features")


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_resume_after_any_cut_gives_the_same_file(folder, tmp_path, monkeypatch, ending):
    whole, output = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    words = ("features", folder, "--kind", "image", "--batch_size", 4, "--output")
    assert command(monkeypatch, *words, whole) == 0
    assert not list(tmp_path.glob("*.rows*"))
    monkeypatch.setattr("inference.feature_files.FeatureFile.finish", lambda self: None)
    assert command(monkeypatch, *words, output) == 0
    monkeypatch.undo()
    rows, log = tmp_path / f"{output.name}.rows", tmp_path / f"{output.name}.rows.jsonl"
    lines, values = log.read_bytes().splitlines(keepends=True), rows.read_bytes()
    for kept, cut, extra in ((6, 9, 0), (1, 0, 512), (3, 1, 100), (13, 0, 0)):
        log.write_bytes(b"".join(lines[:kept]) + (lines[kept][:cut] if cut else b""))
        rows.write_bytes(values[: (kept - 1) * len(values) // 12 + extra])
        assert command(monkeypatch, *words, output, "--resume") == 0
        (names, found), (expected_names, expected) = read(output), read(whole)
        assert names == expected_names
        close(found, torch.from_numpy(expected))  # the batches differ, and so do last bits
        output.unlink()


def test_a_killed_run_is_continued(folder, tmp_path):
    output = tmp_path / "features.npy"
    words = ["features", folder, "--checkpoint", MODEL, "--output", output]
    log = tmp_path / "features.npy.rows.jsonl"
    run_and_signal("predict.py", *words, "--batch_size", "1", when=lambda: lines(log) > 3 or output.exists())
    if not output.exists():  # else it was done before the kill
        again = run("predict.py", *words, check=False)
        assert again.returncode == 2 and "continue it with --resume" in again.stderr
        run("predict.py", *words, "--resume")
    assert np.load(output).shape == (12, 128) and not log.exists()


def test_failed_images_are_left_out_and_tried_again(folder, tmp_path, monkeypatch, capsys):
    root, output = tmp_path / "images", tmp_path / "features.npy"
    root.mkdir()
    for name in ("00.png", "01.png"):
        os.link(folder / name, root / name)
    (root / "02.png").write_bytes(b"no image")
    monkeypatch.setattr("inference.feature_files.FeatureFile.finish", lambda self: None)
    assert command(monkeypatch, "features", root, "--output", output) == 0
    monkeypatch.undo()
    assert "1 of 3 images could not be used" in capsys.readouterr().err
    (root / "02.png").unlink()
    os.link(folder / "02.png", root / "02.png")
    assert command(monkeypatch, "features", root, "--output", output, "--kind", "tokens", "--resume") == 2
    assert "made with other settings (kind)" in capsys.readouterr().err
    assert command(monkeypatch, "features", root, "--output", output, "--resume", "--retry_failed") == 0
    assert np.load(output).shape == (3, 128)
    assert command(monkeypatch, "features", root, "--output", output, "--resume") == 2
    assert "exists" in capsys.readouterr().err
    assert command(monkeypatch, "features", root, "--output", output, "--overwrite") == 0


@pytest.mark.parametrize("words", [("--kind", "text"), ("{}", "--kind", "multimodal"), ("{}", "--text", "a"),
                                   ("{}", "--kind", "text", "--text", "a"), ("--kind", "cls")])  # fmt: skip
def test_a_kind_without_what_it_reads(folder, tmp_path, monkeypatch, capsys, words):
    words = [str(folder) if word == "{}" else word for word in words]
    assert command(monkeypatch, "features", *words, "--output", tmp_path / "a.npy") == 2
    assert "--kind text needs texts alone" in capsys.readouterr().err


# Neighbours.


def test_images_like_an_image(folder, tmp_path, monkeypatch, capsys):
    index = tmp_path / "index.safetensors"
    Image.open(folder / "03.png").save(tmp_path / "copy.bmp")
    like = ("--like", folder / "03.png", "--like", tmp_path / "copy.bmp")
    assert command(monkeypatch, "search", folder, *like, "--index", index, "--top", 4) == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    extractor = load("features", MODEL)
    paths = sorted(folder.glob("*.png"))
    feats = np.stack([row["features"] for row in extractor.features(paths, kind="image")])
    order = np.argsort(-(feats @ feats[3]), kind="stable")
    nearest = [str(paths[i]) for i in order if i != 3][:4]
    assert [row["image"] for row in first["images"]] == nearest
    assert second["images"][0] == {"image": str(folder / "03.png"), "cosine": 1.0}
    assert [row["image"] for row in second["images"][1:]] == nearest[:3]
    assert command(monkeypatch, "search", *like, "--text", "a", "--index", index) == 2
    assert "give either --text or --like" in capsys.readouterr().err


def generated(count, width, seed=0):
    """Unit features in clusters of many sizes, as those of photographs, and queries apart from them, as of texts."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 50, width))
    values = centres[rng.zipf(1.5, count) % len(centres)] + 0.7 * rng.normal(size=(count, width))
    queries = values[:200] + 0.3 * rng.normal(size=(200, width)) + 0.5 * rng.normal(size=width)
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (values, queries)]


def test_recall_of_the_approximate_index():
    pytest.importorskip("faiss")
    values, queries = generated(20_000, 64)
    index = build(values)
    assert index.nprobe < index.nlist / 2
    assert recall(index, values, values[:500]) >= 0.97 and recall(index, values, queries) >= 0.95


def test_a_large_index_is_searched_approximately(folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    monkeypatch.setattr("inference.search.LARGE", 500)
    matcher, path = load("match", MODEL), tmp_path / "index.safetensors"
    index = Index(path, matcher.fingerprint())
    values, _ = generated(2000, index_width(matcher))
    for number, feat in enumerate(values):  # made images, as URLs, which are not looked for on the disk
        index.known[f"https://example.org/{number}.png"] = ("", f"{number:x}", torch.from_numpy(feat))
    index.add(matcher, sorted(folder.glob("*.png")))
    capsys.readouterr()
    words = ("search", "--like", folder / "05.png", "--index", path, "--top", 5)
    assert command(monkeypatch, *words) == 0
    captured = capsys.readouterr()
    assert "approximate index of 2012 images" in captured.err
    (file,) = tmp_path.glob("*.faiss")
    assert command(monkeypatch, *words) == 0  # the index is read again
    again = capsys.readouterr()
    assert again.out == captured.out and "approximate" not in again.err
    assert command(monkeypatch, *words, "--exact") == 0
    assert capsys.readouterr().out == captured.out
    index.known.pop("https://example.org/7.png")
    index.save()
    assert command(monkeypatch, *words) == 0
    assert "approximate index of 2011 images" in capsys.readouterr().err and not file.exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert command(monkeypatch, *words) == 0
    assert "pip install faiss-cpu" in capsys.readouterr().err


def index_width(matcher):
    return matcher.model.vision_proj.out_features


def test_too_few_probed_images_are_completed_exactly():
    faiss = pytest.importorskip("faiss")
    values, _ = generated(1000, 16)
    index = faiss.index_factory(16, "IVF100,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(values)
    index.add(values)
    index.nprobe = 1
    collection = Collection([str(i) for i in range(1000)], torch.from_numpy(values), index)
    assert (index.search(values[:3], 900)[1] < 0).any()
    cosine, number = collection.nearest(torch.from_numpy(values[:3]), 900)
    expected = torch.from_numpy(values[:3] @ values.T).topk(900, dim=1)
    torch.testing.assert_close(cosine, expected.values, rtol=1e-5, atol=1e-5)


def test_an_index_of_an_earlier_version_is_read(folder, tmp_path):
    matcher = load("match", MODEL)
    index = Index(tmp_path / "new", "model")
    index.add(matcher, sorted(folder.glob("*.png")))
    stamps, hashes, feats = zip(*index.known.values(), strict=True)
    lists = {"names": list(index.known), "stamps": stamps, "hashes": hashes}
    metadata = {key: json.dumps(value) for key, value in lists.items()} | {"model": "model"}
    save_file({"image_feat": torch.stack(feats)}, tmp_path / "old", metadata)
    for name in ("old", "new"):
        read = Index(tmp_path / name, "model").known
        assert read.keys() == index.known.keys()
        assert all(torch.equal(read[key][2], index.known[key][2]) for key in read)
