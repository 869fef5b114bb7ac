"""The floor: the least operations and bytes of a piece of work, counted by hand.

Operations are those of matrix products, two per multiplication. Bytes are those of the parameters, read once in each
pass that uses them.
"""

from dataclasses import dataclass

from models.med_config import MedConfig

TRAINING = 3  # forward, and backward by inputs and by weights
TRAINING_PASSES = 10  # reads in forward, backward and AdamW (with two moments), the gradient, and what AdamW writes
MOMENTUM_PASSES = 4  # the momentum encoders are read, written and used, and their originals read


@dataclass(frozen=True)
class Part:
    """The least work of a stage.

    Attributes:
        gflop: operations, in thousand millions.
        weights: parameters read, in thousand millions, each as often as it must be.
    """

    gflop: float
    weights: float

    def gigabytes(self, width: int = 4) -> float:
        """Return the GB read, for parameters of `width` bytes."""
        return self.weights * width

    def seconds(self, rate: float, bandwidth: float, width: int = 4) -> float:
        """Return the seconds at a rate (GFLOP/s) and a bandwidth (GB/s): those of the slower."""
        return max(self.gflop / rate, self.gigabytes(width) / bandwidth)


def vit(tokens: int, width: int = 768, depth: int = 12, patch: int = 16) -> float:
    """Return GFLOP of an image in the ViT: 12 width x width maps per block, attention, patch embedding."""
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    return (depth * block + 2 * (tokens - 1) * 3 * patch**2 * width) / 1e9


def projection(tokens: int, config: MedConfig) -> float:
    """Return GFLOP of the keys and values of an image's tokens in all layers."""
    return config.num_hidden_layers * 2 * tokens * 2 * config.encoder_width * config.hidden_size / 1e9


def text(tokens: int, config: MedConfig, states: int = 0, context: int = 0) -> float:
    """Return GFLOP of text tokens in the transformer.

    Args:
        tokens: number of tokens computed.
        config: shape of the transformer.
        states: image tokens that each attends to; 0 without cross-attention and its two maps.
        context: text tokens that each attends to; 0 for `tokens`.
    """
    width, read = config.hidden_size, context or tokens
    maps = (6 if states else 4) * width**2 + 2 * width * config.intermediate_size
    attention = 2 * width * (read + states)
    return config.num_hidden_layers * 2 * tokens * (maps + attention) / 1e9


def head(tokens: int, config: MedConfig) -> float:
    """Return GFLOP of the language-modelling head."""
    return 2 * tokens * config.hidden_size * (config.vocab_size + config.hidden_size) / 1e9


def vit_weights(width: int = 768, depth: int = 12, patch: int = 16) -> float:
    """Return the parameters of the ViT's matrices, in thousand millions."""
    return (12 * depth * width**2 + 3 * patch**2 * width) / 1e9


def projection_weights(config: MedConfig) -> float:
    """Return the parameters of the image's keys and values, in thousand millions."""
    return config.num_hidden_layers * 2 * config.encoder_width * config.hidden_size / 1e9


def text_weights(config: MedConfig, cross_attention: bool) -> float:
    """Return the parameters of the text layers, in thousand millions, without keys and values of the image."""
    maps = (6 if cross_attention else 4) * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * maps / 1e9


def head_weights(config: MedConfig) -> float:
    """Return the parameters of the language-modelling head, in thousand millions."""
    return config.hidden_size * (config.vocab_size + config.hidden_size) / 1e9
