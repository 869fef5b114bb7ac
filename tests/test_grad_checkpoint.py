"""Recomputed ViT blocks, by PyTorch and by fairscale: losses and gradients of stored ones, and what is refused."""

import sys

import pytest
import torch

from formula import build, img
from launch.config import CaptionConfig
from training.grad_checkpoint import set_grad_checkpointing
from utils import UserError

CAPTIONS = ["a picture of a red ring", "a picture of two stars"]


def loss_and_gradients(model):
    torch.manual_seed(3)  # of dropout, whose states a recomputation restores
    loss = model.train()(img("checkpointed"), CAPTIONS)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("grad_ckpt", ["torch", "fairscale"])
@pytest.mark.parametrize("num_blocks", [1, 2, 9])
def test_recomputed_blocks_give_the_same_losses_and_gradients(grad_ckpt, num_blocks):
    if grad_ckpt == "fairscale":
        pytest.importorskip("fairscale")
    stored, recomputed = build("decoder"), build("decoder", vit_grad_ckpt=True, vit_ckpt_layer=num_blocks)
    set_grad_checkpointing(recomputed, CaptionConfig(grad_ckpt=grad_ckpt))
    blocks = recomputed.visual_encoder.blocks
    calls = []
    for block in blocks:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    loss, gradients = loss_and_gradients(stored)
    assert loss_and_gradients(recomputed)[0] == pytest.approx(loss, abs=1e-6)
    assert len(calls) == len(blocks) + min(num_blocks, len(blocks)), "every checkpointed block runs twice"
    for name, parameter in recomputed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-6, msg=name)
    calls.clear()
    with torch.no_grad():
        recomputed(img("checkpointed"), CAPTIONS)
    assert len(calls) == len(blocks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parallel": "fsdp"}, "grad_ckpt: fairscale does not go with parallel: fsdp"),
        ({"compile": True}, "grad_ckpt: fairscale does not go with compile: True"),
        ({"amp": "bf16"}, "grad_ckpt: fairscale does not go with amp: bf16"),
    ],
)
def test_what_fairscale_does_not_go_with(values, message):
    with pytest.raises(UserError, match=message):
        set_grad_checkpointing(build("decoder"), CaptionConfig(**{"grad_ckpt": "fairscale", **values}))


def test_fairscale_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairscale.nn.checkpoint", None)
    with pytest.raises(UserError, match="pip install fairscale, or use torch"):
        set_grad_checkpointing(build("decoder"), CaptionConfig(grad_ckpt="fairscale"))
