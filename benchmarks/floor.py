"""The least that must be done, counted by hand: products of matrices, two operations a multiplication, and bytes.

Bytes are those of parameters, read once in each pass that uses them: what a perfect cache would still have to fetch.
"""

from dataclasses import dataclass

from models.med import MedConfig

TRAINING = 3  # forward, and backward by inputs and by weights
TRAINING_PASSES = 10  # reads in forward, backward and AdamW (with two moments), the gradient, and what AdamW writes
TWIN_PASSES = 4  # the momentum twin is read and written, its original read, and then it is used


@dataclass(frozen=True)
class Part:
    """A stage of work: what it must compute, and what it must fetch meanwhile.

    Attributes:
        gflop: operations, in thousand millions.
        weights: parameters fetched, in thousand millions, each as often as it must be.
    """

    gflop: float
    weights: float

    def gigabytes(self, width: int = 4) -> float:
        """What is fetched, for parameters of `width` bytes."""
        return self.weights * width

    def seconds(self, rate: float, bandwidth: float, width: int = 4) -> float:
        """Return the time it takes at a rate (GFLOP/s) and a bandwidth (GB/s), whichever keeps it waiting."""
        return max(self.gflop / rate, self.gigabytes(width) / bandwidth)


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


def vit_weights(width: int = 768, depth: int = 12, patch: int = 16) -> float:
    """Parameters of the ViT's matrices, in thousand millions."""
    return (12 * depth * width**2 + 3 * patch**2 * width) / 1e9


def projection_weights(config: MedConfig) -> float:
    """Parameters that project an image, in thousand millions."""
    return config.num_hidden_layers * 2 * config.encoder_width * config.hidden_size / 1e9


def text_weights(config: MedConfig, reads: bool) -> float:
    """Parameters of the text's layers, with what reads an image or without, in thousand millions."""
    maps = (6 if reads else 4) * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * maps / 1e9


def head_weights(config: MedConfig) -> float:
    """Parameters of the language-modelling head, in thousand millions."""
    return config.hidden_size * (config.vocab_size + config.hidden_size) / 1e9
