"""Hard negatives, similarities under autocast, and prefix trees of answers."""

import numpy as np
import pytest
import torch

from formula import build, img
from models.losses import IGNORED, draw_negatives, labelled_positions, similarity
from models.prefix_tree import Trie
from models.tokenizer import tokenize
from utils import UserError


def test_17_5_negatives_have_the_distribution_of_their_weights():
    """Chi-square over 20,000 draws, at a limit that a true distribution exceeds once in 100,000 runs."""
    torch.manual_seed(0)
    scores = torch.tensor([0.3, 1.5, -0.5, 0.9, 2.0, 0.1])
    same = torch.tensor([False, False, True, False, False, False])
    weights = (scores.softmax(dim=0) + 0.01).masked_fill(same, 0)
    count = 20_000
    drawn = draw_negatives(scores.expand(count, -1), same.expand(count, -1), floor=0.01)
    found = torch.bincount(drawn, minlength=6).double()
    expected = count * (weights / weights.sum()).double()
    assert found[2] == 0
    others = ~same
    assert ((found - expected)[others].square() / expected[others]).sum() < 28.5  # 4 degrees of freedom


def test_17_5_negatives_of_rows_with_one_or_no_choice_and_nan():
    scores, same = torch.randn(50, 4), torch.ones(50, 4, dtype=torch.bool)
    same[torch.arange(50), torch.arange(50) % 4] = False
    assert torch.equal(draw_negatives(scores, same), torch.arange(50) % 4)
    assert len(draw_negatives(scores, torch.ones_like(same)).unique()) > 1
    broken = draw_negatives(torch.full((3, 4), torch.nan), same[:3])
    assert ((broken >= 0) & (broken < 4)).all()
    with pytest.raises(UserError, match="a batch of one pair"):
        draw_negatives(torch.zeros(1, 1), same[:1, :1])


def test_17_10_similarities_are_float32_under_autocast():
    """At a temperature of 0.07, products in bfloat16 are off by more than 0.01."""
    torch.manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(40, 256), dim=-1) for _ in range(2))
    exact = a.double() @ b.double().T
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b.T - exact).abs().max() / 0.07 > 0.01
        assert (similarity(a, b) - exact).abs().max() / 0.07 < 1e-5


def test_17_10_contrast_under_autocast_is_that_of_the_same_features_in_float32():
    model = build("pretrain")
    with torch.autocast("cpu", torch.bfloat16):
        text = tokenize(model.tokenizer, ["a red ring", "two stars"])
        feats = model.image_feat(model.visual_encoder(img("precise"))), model.text_feat(text)
        candidates = model.candidates([(img("precise"), text, None)])[0]
        hard = torch.eye(2, 2 + model.queue_size)
        found = model.contrast(feats, candidates, hard, 0.4)
    assert all(x.dtype == torch.float32 for x in (*feats, candidates.image, candidates.text))
    for value, expected in zip(found, model.contrast(feats, candidates, hard, 0.4), strict=True):
        assert torch.equal(value, expected)


def test_labelled_positions():
    labels = torch.tensor([[IGNORED, 5, 7], [3, IGNORED, IGNORED]])
    assert labelled_positions(labels).tolist() == [1, 2, 3]


@pytest.mark.parametrize("keep_padding", [True, False])
def test_17_13_every_node_attends_to_its_own_prefix(keep_padding):
    rng = np.random.default_rng(0)
    texts, lengths = rng.integers(1, 4, (60, 6)), rng.integers(2, 7, 60)
    texts[:, 0] = 9
    texts[np.arange(6) >= lengths[:, None]] = 0
    chosen = np.stack([rng.permutation(60)[:20] for _ in range(3)])
    tree = Trie(texts, 0, keep_padding).select(chosen)
    prefixes = [{tuple(t[: i + 1]) for t in texts[row] for i in range(6) if t[i] or keep_padding} for row in chosen]
    assert tree.input_ids.shape[1] == max(map(len, prefixes))  # every shared prefix stands once
    assert not tree.attends.triu(1).any()
    for row in range(3):
        for text, nodes in zip(texts[chosen[row]], tree.node[row].tolist()):
            for position, node in enumerate(nodes):
                if text[position] == 0 and not keep_padding:
                    assert node == nodes[position - 1]
                    continue
                assert (tree.input_ids[row, node], tree.positions[row, node]) == (text[position], position)
                attended = tree.attends[row, node].nonzero()[:, 0].tolist()
                prefix = [nodes[i] for i in range(position + 1) if text[i] != 0]
                assert sorted(attended) == sorted(prefix)

