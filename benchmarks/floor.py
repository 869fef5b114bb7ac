"""The least that must be computed, counted by hand: products of matrices, two operations for each multiplication."""

from models.med import MedConfig

TRAINING = 3  # forward, and backward by inputs and by weights


def vit(tokens: int, width: int = 768, depth: int = 12, patch: int = 16) -> float:
    """GFLOP of an image through the ViT: four maps and the MLP's eight a block, attention, the patches' map."""
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    return (depth * block + 2 * (tokens - 1) * 3 * patch**2 * width) / 1e9


def projection(tokens: int, config: MedConfig) -> float:
    """GFLOP of keys and values of an image's tokens for every layer."""
    return config.num_hidden_layers * 2 * tokens * 2 * config.encoder_width * config.hidden_size / 1e9


def text(tokens: int, config: MedConfig, states: int = 0, context: int = 0) -> float:
    """GFLOP of text tokens through the transformer.

    Args:
        tokens: how many are computed.
        config: the transformer's shape.
        states: image tokens each reads, 0 without cross-attention (then its two maps are not computed).
        context: text tokens each looks at; 0 for `tokens`.
    """
    width, read = config.hidden_size, context or tokens
    maps = (6 if states else 4) * width**2 + 2 * width * config.intermediate_size
    attention = 2 * width * (read + states)
    return config.num_hidden_layers * 2 * tokens * (maps + attention) / 1e9


def head(tokens: int, config: MedConfig) -> float:
    """GFLOP of the language-modelling head."""
    return 2 * tokens * config.hidden_size * (config.vocab_size + config.hidden_size) / 1e9
