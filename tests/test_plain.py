"""What is computed once equals what the released algorithm computes again and again."""

import copy
from functools import partial

import pytest
import torch

from inference.ranking import two_stage_scores
from models import blip_pretrain
from models.med import TextTransformer
from models.tokenizer import tokenize
from tests import plain
from tests.formula import arr, img
from tests.formula import build as build_formula
from utils import UserError

build = partial(build_formula, num_layers=2)
TEXTS = ["a red ring", "two rings left of a large green star", "a heart", "a small blue cross above a pink square"]


def argmax_row(weights):
    return weights.argmax(dim=1)


def gradients(losses, model):
    model.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert torch.allclose(grad, theirs[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("smooth_padding", [True, False])
def test_pretraining_step(smooth_padding, monkeypatch):
    """Losses, gradients, momentum encoders and queues of one step."""
    ours = build("pretrain", smooth_padding=smooth_padding)
    theirs = copy.deepcopy(ours)

    def likeliest(similarity, same, floor=0.0):
        return (similarity.softmax(dim=1) + floor).masked_fill(same, 0).argmax(dim=1)

    monkeypatch.setattr(blip_pretrain, "draw_negatives", likeliest)
    image = img("plain", 4)
    found = ours(image, TEXTS, 0.4)
    expected = plain.pretraining_losses(theirs, image, TEXTS, 0.4, draw=argmax_row)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert_same_gradients(gradients(found, ours), gradients(expected, theirs))
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smooth_padding", [True, False])
def test_captioning_step(smooth_padding):
    """Loss and gradients."""
    model = build("decoder", smooth_padding=smooth_padding)
    captions = [f"a picture of {text}" for text in TEXTS]
    found, expected = model(img("plain", 4), captions), plain.caption_loss(model, img("plain", 4), captions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients([found], model), gradients([expected], model))


def test_retrieval_evaluation():
    """Both matrices, of more texts than candidates."""
    model = build("retrieval")
    images, texts = img("plain", 6), [*TEXTS, "a star", "one large ring", "three small green hearts"]

    def encode(batch):
        states = model.visual_encoder(batch["image"])
        return states, model.image_feat(states)

    loader = [{"image": images[:4]}, {"image": images[4:]}]
    found = two_stage_scores(model, encode, loader, texts, k_test=3, batch_size=4)
    to_texts, to_images = plain.retrieval_scores(model, images, texts, 3)
    torch.testing.assert_close(torch.from_numpy(found.i2t), to_texts, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(found.t2i), to_images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smooth_padding", [True, False])
def test_answer_ranking(smooth_padding):
    """Losses and ranks of candidates of many lengths that share beginnings."""
    model = build("vqa", smooth_padding=smooth_padding)
    answers = ["red", "red and white", "red and blue", "a ring", "a ring and a star", "yes", "no", "two"]
    candidates = tokenize(model.tokenizer, answers, "dec")
    questions = tokenize(model.tokenizer, ["what is this ?", "how many rings are left of the star ?"], "enc")
    states = arr("plain:states", (2, questions.input_ids.shape[1], model.text_decoder.config.encoder_width))
    mask = questions.attention_mask
    best, losses = plain.rank_answers(model, states, mask, *candidates, k=6)
    found, _ = model.rank_losses(states, mask, candidates.input_ids, 6)
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.rank_answer(states, mask, *candidates, 6), best)
    with pytest.raises(UserError, match="not numbers"):  # the first candidate was the best of NaN
        model.rank_answer(states * torch.tensor([1.0, torch.nan])[:, None, None], mask, *candidates, 6)


@pytest.mark.parametrize(("kind", "amp"), [("pretrain", False), ("decoder", False), ("decoder", True)])
def test_checkpointing_changes_neither_losses_nor_gradients(kind, amp):
    """Of the ViT's blocks and of the text's layers, dropout included; in bfloat16 it is that which is recomputed."""

    def losses(model):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            found = model(img("plain", 4), TEXTS, 0.4) if kind == "pretrain" else [model(img("plain", 4), TEXTS)]
        return torch.stack(list(found))

    whole = build(kind, vit_grad_ckpt=False).train()
    again = build(kind, vit_grad_ckpt=True, vit_ckpt_layer=1).train()
    again.load_state_dict(dict(zip(again.state_dict(), whole.state_dict().values(), strict=True)))
    for part in again.modules():
        if isinstance(part, TextTransformer):
            part.grad_checkpointing = True
    calls = []
    text = again.text_encoder if kind == "pretrain" else again.text_decoder.bert
    text.encoder.layer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found, expected = losses(again), losses(whole)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    before = len(calls)
    ours, theirs = gradients(found, again), gradients(expected, whole)
    assert len(calls) == 2 * before  # once more in the backward pass
    for one, other in zip(ours.values(), theirs.values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
