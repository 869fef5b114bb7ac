"""Many texts as one sequence in which every shared prefix stands once.

Answers such as "red" and "red and white" share their beginning, and all texts start with [DEC]. Tokens of texts form a
tree, laid out as one sequence; each token attends to its ancestors only, so that its state equals that in each text.
The tree of all candidates is built once; each batch takes the parts that it needs.
"""

from typing import NamedTuple

import numpy as np
import torch


class PrefixTree(NamedTuple):
    """Trees for several rows of texts, padded to the largest."""

    input_ids: torch.Tensor  # int64 (rows, nodes)
    positions: torch.Tensor  # int64 (rows, nodes)
    attends: torch.Tensor  # bool (rows, nodes, nodes), from a node to another; ancestors come before descendants
    node: torch.Tensor  # int64 (rows, texts, length), the node at each position of each text

    def to(self, device: torch.device) -> "PrefixTree":
        """Return the trees on `device`."""
        return PrefixTree(*(tensor.to(device, non_blocking=True) for tensor in self))


class Trie:
    """The tree of all texts.

    Args:
        texts: int64 (texts, length), padded on the right.
        pad_token_id: marks padding, to which nothing attends.
        keep_padding: padded positions are nodes too, which attend to their text and not to each other; otherwise they
            share the node of the last token of their text.
    """

    def __init__(self, texts: np.ndarray, pad_token_id: int, keep_padding: bool):
        self.node = np.full_like(texts, -1)
        tokens, depths, paths = [], [], [np.full((1, texts.shape[1]), -1)]  # the path of "no parent" comes first
        parent, size, num_tokens = np.full(len(texts), -1), 0, texts.max() + 1
        for depth, token in enumerate(texts.T):
            kept = keep_padding | (token != pad_token_id)
            keys, inverse = np.unique((parent[kept] + 1) * num_tokens + token[kept], return_inverse=True)
            parents, new = np.divmod(keys, num_tokens)  # counted from 1: 0 is no parent
            parent = np.where(kept, 0, parent)
            parent[kept] = size + inverse
            path = np.concatenate(paths)[parents]
            path[:, depth] = np.where(new == pad_token_id, -1, size + np.arange(len(new)))
            tokens, depths, paths = [*tokens, new], [*depths, np.full(len(new), depth)], [*paths, path]
            self.node[:, depth], size = parent, size + len(new)
        self.tokens, self.depths, self.paths = np.concatenate(tokens), np.concatenate(depths), np.concatenate(paths)[1:]

    def select(self, chosen: np.ndarray) -> PrefixTree:
        """Return the trees of the texts `chosen`, int64 (rows, texts)."""
        node = self.node[chosen]
        rows = [np.unique(row, return_inverse=True) for row in node.reshape(len(node), -1)]
        size = max(len(nodes) for nodes, _ in rows)
        input_ids, positions = (np.zeros((len(rows), size), np.int64) for _ in range(2))
        attends = np.tile(np.eye(size, dtype=bool), (len(rows), 1, 1))  # filler attends to itself, against NaN
        place = np.empty(len(self.tokens), np.int64)
        for row, (nodes, _) in enumerate(rows):
            count, place[nodes] = len(nodes), np.arange(len(nodes))
            input_ids[row, :count], positions[row, :count] = self.tokens[nodes], self.depths[nodes]
            attends[row, :count, :count] = False
            descendant, depth = np.nonzero(self.paths[nodes] >= 0)
            attends[row, descendant, place[self.paths[nodes[descendant], depth]]] = True
        local = np.stack([inverse.reshape(node.shape[1:]) for _, inverse in rows])
        return PrefixTree(*(torch.from_numpy(x) for x in (input_ids, positions, attends, local)))
