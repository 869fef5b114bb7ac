"""The released transform/randaugment.py."""

from released.augment import *  # noqa: F403
