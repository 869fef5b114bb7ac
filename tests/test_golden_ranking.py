"""Two-stage ranking against the golden matrices, on one process and on several."""

import torch

from formula import arr, assert_close, build, expected, golden
from inference.ranking import two_stage_scores
from processes import run_in_processes

IMAGES = torch.stack([arr(f"a:eval{i}", (3, 48, 48)) for i in range(6)])


def scores(rank, world_size, k_test):
    model = build("retrieval")

    def encode(batch):
        embeds = model.visual_encoder(batch["image"])
        return embeds, model.image_feat(embeds)

    batches = [{"image": part} for part in IMAGES[rank::world_size].split(2)]
    return two_stage_scores(model, encode, batches, golden()["retrieval_eval/texts"], k_test, batch_size=5)


def check(found, k_test):
    assert_close(found.i2t, expected(f"retrieval_eval/i2t_k{k_test}"))
    assert_close(found.t2i, expected(f"retrieval_eval/t2i_k{k_test}"))


def test_matrices():
    for k_test in (3, 6):
        check(scores(0, 1, k_test), k_test)


def test_four_processes_score_as_one():
    found = run_in_processes(scores, 4, 3)
    check(found[0], 3)
    assert all(other.i2t.size == 0 for other in found[1:])
