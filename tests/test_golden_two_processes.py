"""Golden values of two processes whose gradients are averaged."""

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from formula import arr, assert_close, build, expected, golden, train
from processes import run_in_processes

NUM_STEPS = 4


def captions(step, suffix=""):
    return [f"{caption} {step}{suffix}" for caption in golden()["itm/captions"]]


def retrieval_losses(rank, world_size, smooth_padding):
    model = build("retrieval", negative_all_rank=True)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)

    def losses(step):
        image = arr(f"a:w2ret{step}", (2, 3, 48, 48))[rank : rank + 1]
        idx = torch.tensor([2 * step + rank])
        return parallel(image, captions(step)[rank : rank + 1], alpha=0.4 * min(1, step / 4), idx=idx)

    return train(model, NUM_STEPS, losses), model.state_dict()


def pretraining_losses(rank, world_size, smooth_padding):
    model = build("pretrain", smooth_padding=smooth_padding)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)

    def losses(step):
        image = arr(f"a:w2pre{step}", (4, 3, 48, 48))[2 * rank : 2 * rank + 2]
        return parallel(image, captions(step, f" {rank}"), alpha=0.4 * min(1, step / 4))

    return train(model, NUM_STEPS, losses), model.state_dict()


@pytest.mark.parametrize(
    ("entry", "losses", "smooth_padding", "state"),
    [
        ("retrieval", retrieval_losses, True, ("image_queue", "idx_queue", "vision_proj")),
        ("pretrain", pretraining_losses, True, ("text_queue", "vision_proj")),
        ("pretrain", pretraining_losses, False, ()),
    ],
)
def test_losses_of_two_processes(entry, losses, smooth_padding, state):
    (rows0, state0), (rows1, state1) = run_in_processes(losses, 2, smooth_padding)
    rows = np.stack([rows0, rows1])  # (rank, step, loss)
    right = expected(f"world2/{entry}/losses", smooth_padding)
    assert_close(rows[:, 0], right[:, 0])
    assert_close(rows, right, rtol=1e-3)
    for name in state:
        key = name if name in state0 else f"{name}.weight"
        assert torch.equal(state0[key], state1[key])
        assert_close(state0[key], expected(f"world2/{entry}/{name}"), rtol=1e-3, atol=1e-3)
