"""Conversions: to Hugging Face and back through folders, to half precision, to torch.export and ONNX."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)

from formula import arr
from miniature.scene import draw_scene, render
from models.architecture import settings_of
from models.blip import blip_decoder
from models.blip_itm import blip_itm
from models.blip_vqa import blip_vqa
from models.export import export, select_part, write_checkpoint, write_huggingface
from models.generation import GenerationConfig
from models.tokenizer import tokenize
from models.weights import read_source
from utils import UserError

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "configs" / "miniature" / "model.safetensors"
SIZES = {
    "small": dict(
        vit=dict(embed_dim=64, depth=2, num_heads=4, patch_size=16),
        med_config=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
        image_size=32,
    ),
    "two widths": dict(
        vit=dict(embed_dim=128, depth=2, num_heads=2, patch_size=16),
        med_config=dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128),
        image_size=32,
    ),
    "base": dict(vit="base", image_size=32),
    "large": dict(vit="large", image_size=32),
}
SLOW = pytest.mark.skipif("BLIP_SLOW" not in os.environ, reason="gigabytes on disk; BLIP_SLOW=1 runs it")
EVERY_SIZE = pytest.mark.parametrize(
    "size", ["small", "two widths", pytest.param("base", marks=SLOW), pytest.param("large", marks=SLOW)]
)
TEXTS = ["a dog", "two cats on a red sofa"]


def checkpoint(folder, factory, size, **settings):
    """Save a random model as train_*.py would; returns it and the file."""
    torch.manual_seed(0)
    model = factory(**SIZES[size], **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    path = folder / "model.pth"
    torch.save({"model": model.state_dict(), "config": SIZES[size]}, path)
    return model, path


def images(size, count=2):
    side = SIZES[size]["image_size"]
    return arr("a:convert", (count, 3, side, side))


@EVERY_SIZE
@torch.no_grad()
def test_captioner_both_ways(tmp_path, size):
    own, path = checkpoint(tmp_path, blip_decoder, size)
    write_huggingface(str(path), tmp_path / "hub")
    other = BlipForConditionalGeneration.from_pretrained(tmp_path / "hub").eval()
    prompt = tokenize(own.tokenizer, [own.prompt] * 2, "dec").input_ids
    settings = dict(max_length=12, min_length=5, num_beams=3)
    ids = other.generate(pixel_values=images(size), input_ids=prompt, length_penalty=0.0, **settings)
    expected = [text[len(own.prompt) :] for text in own.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert own.caption(images(size), GenerationConfig(length_penalty=0.0, **settings))[0] == expected
    write_checkpoint(f"hf:{tmp_path / 'hub'}", tmp_path / "back.safetensors")
    back = blip_decoder(
        pretrained=str(tmp_path / "back.safetensors"), **settings_of(str(tmp_path / "back.safetensors"))[0]
    )
    assert all(torch.equal(value, back.state_dict()[key]) for key, value in own.state_dict().items())


@EVERY_SIZE
@torch.no_grad()
def test_matching_both_ways(tmp_path, size):
    own, path = checkpoint(tmp_path, blip_itm, size, embed_dim=32)
    write_huggingface(str(path), tmp_path / "hub")
    other = BlipForImageTextRetrieval.from_pretrained(tmp_path / "hub").eval()
    text = tokenize(own.tokenizer, TEXTS)
    arguments = dict(pixel_values=images(size), input_ids=text.input_ids, attention_mask=text.attention_mask)
    for head, use in (("itm", True), ("itc", False)):
        score = other(**arguments, use_itm_head=use).itm_score
        torch.testing.assert_close(own(images(size), TEXTS, head), score, rtol=1e-4, atol=1e-5)
    settings, _ = settings_of(f"hf:{tmp_path / 'hub'}")
    back = blip_itm(pretrained=f"hf:{tmp_path / 'hub'}", **settings).eval()
    assert torch.equal(back(images(size), TEXTS), own(images(size), TEXTS))


@pytest.mark.parametrize("size", ["small", pytest.param("base", marks=SLOW)])
@torch.no_grad()
def test_vqa_both_ways(tmp_path, size):
    own, path = checkpoint(tmp_path, blip_vqa, size)
    write_huggingface(str(path), tmp_path / "hub")
    other = BlipForQuestionAnswering.from_pretrained(tmp_path / "hub").eval()
    processor = BlipProcessor.from_pretrained(tmp_path / "hub")
    question = processor(text=["what is it?"] * 2, return_tensors="pt")
    assert question["input_ids"][0, 0] == processor.tokenizer.cls_token_id  # what the note of --to-hf is about
    question["input_ids"][:, 0] = processor.tokenizer.convert_tokens_to_ids("[ENC]")
    ids = other.generate(
        pixel_values=images(size), **question, num_beams=3, max_length=10, min_length=1, length_penalty=0.0
    )
    expected = own.tokenizer.batch_decode(ids, skip_special_tokens=True)
    text = tokenize(own.tokenizer, ["what is it?"] * 2, "enc")
    states = own.question_states(images(size), text)
    from models.generation import generate
    from models.tokenizer import decode

    start = torch.full((2, 1), own.tokenizer.bos_token_id)
    settings = GenerationConfig(max_length=10, min_length=1, num_beams=3, length_penalty=0.0)
    found = generate(
        own.text_decoder, own.text_decoder.bert.project(states), start, own.tokenizer.sep_token_id, settings
    )
    assert decode(own.tokenizer, found[0]) == expected


def test_vqa_of_two_widths_has_no_place_there(tmp_path):
    _, path = checkpoint(tmp_path, blip_vqa, "two widths")
    with pytest.raises(UserError, match="cannot be converted"):
        write_huggingface(str(path), tmp_path / "hub")


@torch.no_grad()
def test_their_processor_and_model_see_an_image_as_ours(tmp_path):
    """The shipped model and its vocabulary, through their processor: the same probability."""
    write_huggingface(str(MODEL), tmp_path / "hub", "match")
    other, processor = (
        BlipForImageTextRetrieval.from_pretrained(tmp_path / "hub"),
        BlipProcessor.from_pretrained(tmp_path / "hub"),
    )
    image = Image.fromarray(np.asarray(render(draw_scene(random.Random(1), 2), 100)))
    inputs = processor(images=image, text="a red circle", return_tensors="pt")
    theirs = other.eval()(**inputs).itm_score.softmax(1)[0, 1].item()
    from inference import load

    ours = load("match", f"hf:{tmp_path / 'hub'}", first_token="cls").match(image, "a red circle")[0]["matches"][0]
    assert ours["probability"] == pytest.approx(theirs, abs=2e-3)  # their processor resizes by torchvision's kernels


def test_old_configurations_of_the_hub_are_mended_where_asked(tmp_path):
    shape = dict(num_hidden_layers=1, hidden_size=768)
    torch.save({"model": blip_itm(vit=SIZES["small"]["vit"], image_size=32, med_config=shape).state_dict(),
                "config": {"vit": SIZES["small"]["vit"]}}, tmp_path / "m.pth")  # fmt: skip
    write_huggingface(str(tmp_path / "m.pth"), tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["text_config"]["num_attention_heads"] == 12 and config["vision_config"]["layer_norm_eps"] == 1e-6
    config["text_config"]["num_attention_heads"] = 8
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    for prefix, heads in (("hf", 8), ("hf-released", 12)):
        settings, _ = settings_of(f"{prefix}:{tmp_path / 'hub'}")
        assert settings["vit"] == SIZES["small"]["vit"] and settings["med_config"]["num_attention_heads"] == heads


def test_half_precision(tmp_path):
    own, path = checkpoint(tmp_path, blip_decoder, "small")
    write_checkpoint(str(path), tmp_path / "half.safetensors", half=True)
    state = read_source(str(tmp_path / "half.safetensors"))
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * path.stat().st_size
    settings, _ = settings_of(str(tmp_path / "half.safetensors"))
    blip_decoder(pretrained=str(tmp_path / "half.safetensors"), **settings)


@pytest.mark.parametrize("part", ["image", "match"])
@torch.no_grad()
def test_export_gives_equal_outputs(tmp_path, part):
    _, path = checkpoint(tmp_path, blip_itm, "two widths", embed_dim=32)
    export(str(path), part, tmp_path / "part.pt2", onnx=False)
    module, inputs, _ = select_part(str(path), part)
    inputs = other_inputs(module, part)
    found = torch.export.load(tmp_path / "part.pt2").module()(*inputs)
    torch.testing.assert_close(found, module(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["image", "match"])
@torch.no_grad()
def test_onnx_gives_equal_outputs(tmp_path, part):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    _, path = checkpoint(tmp_path, blip_itm, "two widths", embed_dim=32)
    export(str(path), part, tmp_path / "part.onnx", onnx=True)
    module, _, _ = select_part(str(path), part)
    inputs = other_inputs(module, part)
    session = onnxruntime.InferenceSession(tmp_path / "part.onnx")
    names = [found.name for found in session.get_inputs()]
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(found), module(*inputs), rtol=1e-3, atol=1e-4)


def other_inputs(module, part):
    """Inputs of another batch size and text length than the export's examples."""
    image = arr("a:export", (3, 3, 32, 32))
    if part == "image":
        return (image,)
    text = tokenize(module.model.tokenizer, ["a red circle", "a blue square above it", "a star"], "enc")
    return image, text.input_ids, text.attention_mask


def test_command_line(tmp_path):
    words = [sys.executable, "convert.py", "--to-half", str(MODEL), "--output", str(tmp_path / "a" / "m.safetensors")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "a" / "m.safetensors").is_file(), done.stderr
    done = run("convert.py", "--to-hf", MODEL, "--output", tmp_path / "b", check=False)
    assert done.returncode == 2 and "choose the model with --task" in done.stderr and done.stderr.count("\n") == 1
