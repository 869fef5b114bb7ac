"""Many texts as one sequence in which every shared prefix stands once.

Answers such as "red", "red and white" begin alike, and all begin with [DEC]. A row of texts becomes a tree
of tokens, laid out as one sequence; each token sees its ancestors only, so that its state equals the one it
has in each text by itself.
"""

from dataclasses import dataclass

import torch


@dataclass
class PrefixTree:
    """Trees for several rows of texts, padded to the largest.

    Attributes:
        input_ids, positions: int64 (rows, nodes).
        sees: bool (rows, nodes, nodes), whether a node sees another; ancestors come before descendants.
        node: int64 (rows, texts, length), the node at each position of each text.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    sees: torch.Tensor
    node: torch.Tensor

    def to(self, device: torch.device) -> "PrefixTree":
        """Return the trees on `device`."""
        return PrefixTree(*(tensor.to(device) for tensor in (self.input_ids, self.positions, self.sees, self.node)))


def build_prefix_trees(texts: torch.Tensor, pad_token_id: int, keep_padding: bool) -> PrefixTree:
    """Merge the shared prefixes of each row's texts.

    Args:
        texts: int64 (rows, texts, length) on the CPU, padded on the right.
        pad_token_id: marks padding, which nothing sees.
        keep_padding: give padded positions nodes too (they see their text, not each other); otherwise they
            point to their text's last token.
    """
    rows = [_Tree(pad_token_id) for _ in texts]
    node = torch.tensor([[tree.add(text, keep_padding) for text in row] for tree, row in zip(rows, texts.tolist())])
    num_nodes = max(len(tree.tokens) for tree in rows)
    input_ids, positions = (torch.zeros(len(rows), num_nodes, dtype=torch.long) for _ in range(2))
    sees = torch.eye(num_nodes, dtype=torch.bool).repeat(len(rows), 1, 1)  # filler nodes see themselves: no NaN
    for row, tree in enumerate(rows):
        size = len(tree.tokens)
        input_ids[row, :size], positions[row, :size] = torch.tensor(tree.tokens), torch.tensor(tree.depths)
        sees[row, :size, :size] = tree.visibility()
    return PrefixTree(input_ids, positions, sees, node)


class _Tree:
    """One row's tree while it grows."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self.parents: list[int] = []
        self.children: dict[tuple[int, int], int] = {}

    def add(self, text: list[int], keep_padding: bool) -> list[int]:
        """Add a text and return the node of each of its positions."""
        nodes, parent = [], -1
        for depth, token in enumerate(text):
            if token != self.pad_token_id or keep_padding:
                parent = self._child(parent, token, depth)
            nodes.append(parent)
        return nodes

    def _child(self, parent: int, token: int, depth: int) -> int:
        node = self.children.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.depths.append(depth)
            self.parents.append(parent)
        return node

    def visibility(self) -> torch.Tensor:
        """Return bool (nodes, nodes): a node sees what its parent sees, and itself unless it is padding."""
        sees = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if parent >= 0:
                sees[node] = sees[parent]
            sees[node, node] = token != self.pad_token_id
        return sees
