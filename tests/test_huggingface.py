"""Hugging Face transformers' BLIP as a second witness: converted both ways on random weights, equal outputs."""

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from formula import arr
from models.blip import BLIP_Decoder
from models.blip_itm import BLIP_ITM
from models.blip_vqa import BLIP_VQA
from models.generation import GenerationConfig
from models.huggingface import from_huggingface, to_huggingface
from models.tokenizer import tokenize

WIDTH, HEADS, LAYERS = 64, 4, 3
VIT = dict(embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, patch_size=16)
MED = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=128)
IMAGES = arr("a:witness", (3, 3, 48, 48))
CAPTIONS = ["a picture of a dog", "a picture of two cats on a red sofa", "a picture of rain"]
QUESTIONS = ["what is it?", "how many cats are on the sofa?", "is it raining today?"]


def theirs(kind):
    text = dict(
        **MED,
        encoder_hidden_size=WIDTH,
        vocab_size=30524,
        layer_norm_eps=1e-12,
        hidden_act="gelu",
        bos_token_id=30522,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,
        label_smoothing=0.1,
    )
    vision = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                  image_size=48, patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu")  # fmt: skip
    return kind(BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256)).eval()


@torch.no_grad()
def shake(model):
    """Give a model weights large enough for its outputs to differ between inputs."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if "embed" in name else 0.08))
    return model.eval()


def pair(own_class, kind, direction, **kwargs):
    """Our model and theirs with the same weights, from ours or from theirs."""
    own = own_model(own_class, **kwargs)
    other = theirs(kind)
    if direction == "to":
        shake(own)
        missing, unexpected = other.load_state_dict(to_huggingface(own.state_dict()), strict=False)
        tied = ("cls.predictions.decoder", "cls.predictions.bias", "position_ids", "logit_scale")
        assert not unexpected and all(any(word in key for word in tied) for key in missing)
        other.tie_weights()
    else:
        shake(other)
        own.load_state_dict(from_huggingface(other.state_dict()), strict=True)
    return own.eval(), other.eval()


def own_model(own_class, **kwargs):
    return own_class(med_config=MED | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0},
                     image_size=48, vit=VIT, **kwargs)  # fmt: skip


DIRECTIONS = pytest.mark.parametrize("direction", ["to", "from"])


@DIRECTIONS
@torch.no_grad()
def test_captioner(direction):
    own, other = pair(BLIP_Decoder, BlipForConditionalGeneration, direction, smooth_padding=False)
    text = tokenize(own.tokenizer, CAPTIONS, "dec")
    labels = text.input_ids.masked_fill(text.attention_mask == 0, -100)
    labels[:, : own.prompt_length] = -100
    found = other(pixel_values=IMAGES, input_ids=text.input_ids, attention_mask=text.attention_mask, labels=labels)
    logits = own.text_decoder.logits(
        own.text_decoder.hidden_states(
            text.input_ids,
            attention_mask=text.attention_mask,
            projection=own.text_decoder.bert.project(own.visual_encoder(IMAGES)),
        )
    )
    real = text.attention_mask.bool()
    torch.testing.assert_close(logits[real], found.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own(IMAGES, CAPTIONS), found.loss, rtol=1e-5, atol=1e-5)
    for num_beams in (1, 3):
        prompt = tokenize(own.tokenizer, own.prompt, "dec").input_ids[:, :-1].expand(3, -1)
        # no penalty of length: theirs divides by the generated length, the released code by the whole
        settings = dict(max_length=16, min_length=7, num_beams=num_beams)
        ids = other.generate(pixel_values=IMAGES, input_ids=tokens_with_end(prompt), length_penalty=0.0, **settings)
        expected = [t[len(own.prompt) :] for t in own.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        assert own.caption(IMAGES, GenerationConfig(length_penalty=0.0, **settings))[0] == expected


def tokens_with_end(prompt):
    """Their captioner drops the last token of what it is given, as the end token of a tokenized prompt."""
    return torch.cat((prompt, torch.full((len(prompt), 1), 102)), dim=1)


@DIRECTIONS
@torch.no_grad()
def test_matching(direction):
    own, other = pair(BLIP_ITM, BlipForImageTextRetrieval, direction)
    text = tokenize(own.tokenizer, CAPTIONS)
    arguments = dict(pixel_values=IMAGES, input_ids=text.input_ids, attention_mask=text.attention_mask)
    for head, use in (("itm", True), ("itc", False)):
        score = other(**arguments, use_itm_head=use).itm_score
        torch.testing.assert_close(own(IMAGES, CAPTIONS, head), score, rtol=1e-5, atol=1e-5)


@DIRECTIONS
@torch.no_grad()
def test_vqa(direction):
    own, other = pair(BLIP_VQA, BlipForQuestionAnswering, direction, drop_path_rate=0.0)
    text = tokenize(own.tokenizer, QUESTIONS, "enc")  # which their own processor leaves at [CLS]
    ids = other.generate(
        pixel_values=IMAGES,
        input_ids=text.input_ids,
        attention_mask=text.attention_mask,
        num_beams=1,
        max_length=10,
        min_length=1,
    )
    expected = own.tokenizer.batch_decode(ids, skip_special_tokens=True)
    states = own.question_states(IMAGES, text)
    projection = own.text_decoder.bert.project(states)
    start = torch.full((3, 1), own.tokenizer.bos_token_id)
    hidden = own.text_decoder.hidden_states(start, projection=projection)
    seen = torch.ones(states.shape[:2])
    torch.testing.assert_close(
        own.text_decoder.logits(hidden),
        other.text_decoder(start, encoder_hidden_states=states, encoder_attention_mask=seen).logits,
        rtol=1e-5,
        atol=1e-5,
    )
    from models.generation import generate

    found = generate(own.text_decoder, projection, start, 102, GenerationConfig(10, 1, 1))[0]
    assert own.tokenizer.batch_decode(found, skip_special_tokens=True) == expected
