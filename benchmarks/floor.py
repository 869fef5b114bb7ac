"""The floor: the least operations and bytes of a piece of work, counted by hand.

Operations are those of matrix products, two per multiplication. Bytes are those of the parameters, read once in each
pass that uses them.
"""

from typing import NamedTuple

from models.med_config import MedConfig

TRAINING = 3  # forward, and backward by inputs and by weights
TRAINING_PASSES = 10  # reads in forward, backward and AdamW (with two moments), the gradient, and what AdamW writes
MOMENTUM_PASSES = 4  # the momentum encoders are read, written and used, and their originals read


class Part(NamedTuple):
    """The least work of a stage: operations, and parameters read, each as often as it must be, both in 10^9."""

    gflop: float
    weights: float

    def gigabytes(self, width: int = 4) -> float:
        """Return the GB read, for parameters of `width` bytes."""
        return self.weights * width

    def seconds(self, rate: float, bandwidth: float, width: int = 4) -> float:
        """Return the seconds at a rate (GFLOP/s) and a bandwidth (GB/s): those of the slower."""
        return max(self.gflop / rate, self.gigabytes(width) / bandwidth)


def vit(images: int, tokens: int, width: int = 768, depth: int = 12, patch: int = 16) -> Part:
    """Count the ViT: 12 width x width maps per block, attention, patch embedding."""
    patches, maps = 3 * patch**2 * width, 12 * depth * width**2
    attention = depth * 2 * tokens * width
    return Part(images * 2 * (tokens * (maps + attention) + (tokens - 1) * patches) / 1e9, (maps + patches) / 1e9)


def projection(tokens: int, config: MedConfig) -> Part:
    """Count the keys and values of image tokens in all layers."""
    maps = config.num_hidden_layers * 2 * config.encoder_width * config.hidden_size
    return Part(2 * tokens * maps / 1e9, maps / 1e9)


def text(tokens: int, config: MedConfig, states: int = 0, context: int = 0) -> Part:
    """Count text tokens in the transformer.

    Args:
        tokens: number of tokens computed.
        config: shape of the transformer.
        states: image tokens that each attends to; 0 without cross-attention and its two maps.
        context: text tokens that each attends to; 0 for `tokens`.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    maps = (6 if states else 4) * width**2 + 2 * width * config.intermediate_size
    attention = 2 * width * ((context or tokens) + states)
    return Part(layers * 2 * tokens * (maps + attention) / 1e9, layers * maps / 1e9)


def head(tokens: int, config: MedConfig) -> Part:
    """Count the language-modelling head."""
    maps = config.hidden_size * (config.vocab_size + config.hidden_size)
    return Part(2 * tokens * maps / 1e9, maps / 1e9)


def together(*parts: Part, weights: float | None = None) -> Part:
    """Return the sum of parts that are one stage; `weights` replaces the parameters that it reads."""
    return Part(sum(p.gflop for p in parts), sum(p.weights for p in parts) if weights is None else weights)
