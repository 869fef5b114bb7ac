"""LAVIS's interface: its outputs are those of our models with the same weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from formula import MED_CONFIG, MODELS
from inference.explain import explain
from inference.tasks import Matcher
from models.tokenizer import tokenize
from released.lavis import ZOO, compute_gradcam, load_model, load_model_and_preprocess, load_processor
from utils import UserError

VIT = dict(embed_dim=48, depth=3, num_heads=4, patch_size=16)
TEXTS = ["a dog on the grass", "two cats"]
PARTS = {  # name in LAVIS: our model, its settings, how its checkpoint is saved
    "blip_caption": ("decoder", dict(smooth_padding=False)),
    "blip_vqa": ("vqa", dict(smooth_padding=False, drop_path_rate=0.0)),
    "blip_feature_extractor": ("pretrain", dict(embed_dim=16, queue_size=8)),
    "blip_image_text_matching": ("itm", dict(embed_dim=16, first_token="enc")),
    "blip_retrieval": ("retrieval", dict(embed_dim=16, queue_size=8)),
    "blip_nlvr": ("nlvr", dict(drop_path_rate=0.0)),
    "blip_pretrain": ("pretrain", dict(embed_dim=16, queue_size=8, smooth_padding=False)),
}


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def pair(name, folder, changed=lambda state: state, **settings):
    """Our model, and LAVIS's with its weights."""
    kind, options = PARTS[name]
    torch.manual_seed(3)
    ours = MODELS[kind](med_config=MED_CONFIG, image_size=48, vit=VIT, **options).eval()
    config = {"model": {"prompt": "a photo of ", "arch": name}, "run": {}, "vit": VIT}
    config["med_config"] = json.loads(MED_CONFIG.read_text())
    path = folder / "model.pth"
    torch.save({"model": changed(ours.state_dict()), "config": config}, path)
    model_type = next(found for model, found in ZOO if model == name)
    return ours, load_model(name, model_type, is_eval=True, checkpoint=str(path), **settings)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_captions(tmp_path, images):
    ours, model = pair("blip_caption", tmp_path)
    assert model.prompt == "a photo of "  # read from the nested configuration
    model.prompt, model.prompt_length = ours.prompt, ours.prompt_length
    output = model({"image": images, "text_input": [f"a picture of {text}" for text in TEXTS]})
    close(output.loss, ours(images, [f"a picture of {text}" for text in TEXTS]))
    assert output["loss_lm"] is output.loss and output.loss_itc is None
    args = dict(num_beams=2, max_length=10, min_length=4, repetition_penalty=1.2)
    assert model.generate({"image": images}, **args) == ours.generate(images, **args)
    found = model.generate({"image": images}, use_nucleus_sampling=True, num_captions=3, max_length=8, min_length=5)
    assert len(found) == 6


def test_answers(tmp_path, images):
    ours, model = pair("blip_vqa", tmp_path)
    samples = {"image": images, "text_input": ["what is it", "how many cats are there"]}
    answers = ["dog", "two cats", "grass", "no"]
    candidates = tokenize(ours.tokenizer, answers, "dec")
    expected = ours(images, samples["text_input"], candidates, train=False, inference="rank", k_test=4)
    assert model.predict_answers(samples, answer_list=answers) == [answers[i] for i in expected]
    expected = ours(images, samples["text_input"], train=False, inference="generate")
    assert model.predict_answers(samples, inference_method="generate") == expected
    prompted = model.predict_answers({**samples, "text_input": ["it", "how"]}, answer_list=answers, prompt="what is {}")
    assert prompted[0] == model.predict_answers(samples, answer_list=answers)[0]
    training = {"answer": ["dog", "cat", "two"], "weight": torch.tensor([0.5, 0.5, 1.0]), "n_answers": [2, 1]}
    args = training["answer"], training["n_answers"], training["weight"]
    close(model({**samples, **training}).loss, ours(images, samples["text_input"], *args))
    with pytest.raises(UserError, match="expected 'generate', or 'rank' and answer_list"):
        model.predict_answers(samples)


def test_features(tmp_path, images):
    ours, model = pair("blip_feature_extractor", tmp_path)
    samples = {"image": images, "text_input": TEXTS}
    found = model.extract_features(samples, mode="image")
    close(found.image_embeds, ours.visual_encoder(images))
    close(found.image_embeds_proj[:, 0], ours.image_feat(found.image_embeds))
    assert found.image_embeds_proj.shape == (2, 10, 16) and found.text_embeds is None
    found = model.extract_features({"text_input": TEXTS}, mode="text")
    close(found.text_embeds_proj[:, 0], ours.text_feat(tokenize(ours.tokenizer, TEXTS)))
    found = model.extract_features(samples)
    text = tokenize(ours.tokenizer, TEXTS, "enc")
    close(found.multimodal_embeds, ours.text_encoder(*text, ours.text_encoder.project(ours.visual_encoder(images))))
    close(model.temp, ours.temp)


def test_matches_and_their_explanation(tmp_path, images):
    ours, model = pair("blip_image_text_matching", tmp_path)
    samples = {"image": images, "text_input": TEXTS}
    for head in ("itm", "itc"):
        close(model(samples, match_head=head), ours(images, TEXTS, match_head=head))
    text = model.tokenizer(TEXTS, padding="longest", return_tensors="pt")
    maps, logits = compute_gradcam(model, images, TEXTS, text, block_num=5)
    close(logits, ours(images, TEXTS))
    assert [tuple(rows.shape) for rows in maps] == [(1 + text.input_ids.shape[1], 3, 3)] * 2
    close(maps[1][1], maps[1][2:4].mean(dim=0))  # the mean over the two words
    assert (maps[0][2:7] > 0).any() and not maps[1][6:].any()  # nothing at padding
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (48, 48, 3), np.uint8))
    matcher = Matcher(ours, 48)
    pixels = matcher.transform(image)[None]
    tokens = model.tokenizer(TEXTS[1:], return_tensors="pt")
    (found,), _ = compute_gradcam(model, pixels, TEXTS[1:], tokens, block_num=5)
    assert found.shape == (5, 3, 3) and len(explain(matcher, image, TEXTS[1], layer=5)) == 3


def test_statements(tmp_path, images):
    ours, model = pair("blip_nlvr", tmp_path)
    samples = {"image0": images, "image1": images.flip(0), "text_input": TEXTS, "label": torch.tensor([1, 0])}
    both = torch.cat((images, images.flip(0)))
    close(model.predict(samples)["predictions"], ours(both, TEXTS, samples["label"], train=False))
    close(model(samples).loss, ours(both, TEXTS, samples["label"]))


def test_training_by_contrast_from_a_file_of_its_runner(tmp_path, images):
    """Such a file holds trainable parameters and buffers, and calls the queue's pointer queue_ptr."""

    def trainable(state):
        state["ptr_queue"] += 4
        kept = {key: value for key, value in state.items() if "_m." not in key}
        return {("queue_ptr" if key == "ptr_queue" else key): value for key, value in kept.items()}

    ours, model = pair("blip_retrieval", tmp_path, changed=trainable, queue_size=8)
    assert model.ptr_queue.item() == 4
    close(model.vision_proj_m.weight, ours.vision_proj.weight)
    torch.manual_seed(0)
    samples = {"image": images, "text_input": TEXTS, "image_id": torch.tensor([0, 1])}
    output = model({**samples, "epoch": 0, "iters": 5, "num_iters_per_epoch": 10})
    torch.manual_seed(0)
    loss_itc, loss_itm = ours(images, TEXTS, alpha=0.4 * 0.25, idx=samples["image_id"])
    close(output.loss_itc, loss_itc), close(output.loss_itm, loss_itm), close(output.loss, loss_itc + loss_itm)


def test_pretraining(tmp_path, images):
    ours, model = pair("blip_pretrain", tmp_path, queue_size=8)
    output = model({"image": images, "text_input": TEXTS, "epoch": 3, "iters": 0, "num_iters_per_epoch": 10})
    for found, expected in zip((output.loss_itc, output.loss_itm, output.loss_lm), ours(images, TEXTS, 0.4)):
        close(found, expected)


def test_classification_from_a_feature_checkpoint(tmp_path, images):
    pair("blip_image_text_matching", tmp_path)
    model = load_model("blip_classification", "base", checkpoint=str(tmp_path / "model.pth"), num_classes=3)
    samples = {"image": images, "text_input": TEXTS, "label": torch.tensor([1, 2])}
    output = model(samples)
    close(output.loss, torch.nn.functional.cross_entropy(output.logits, samples["label"]))
    assert model.predict(samples).predictions.shape == (2, 3)


def test_processors(tmp_path):
    pair("blip_caption", tmp_path)
    model, images, texts = load_model_and_preprocess(
        "blip_caption", "base_coco", is_eval=True, checkpoint=str(tmp_path / "model.pth")
    )
    assert not model.training
    image = Image.new("RGB", (60, 40))
    assert images["eval"](image).shape == images["train"](image).shape == (3, 48, 48)
    assert (texts["train"]("A Dog!"), texts["eval"]("A Dog!")) == ("a photo of a dog", "a dog")
    assert load_processor("blip_question")("What's  it?") == "what's  it?"
    assert load_processor("blip_image_eval", image_size=32)(image).shape == (3, 32, 32)


def test_unknown_names():
    with pytest.raises(UserError, match="model blip_caption tiny is not known; expected one of blip_caption base_coco"):
        load_model("blip_caption", "tiny")
    with pytest.raises(UserError, match="processor 'x' is not known"):
        load_processor("x")
