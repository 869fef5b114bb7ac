"""The released models/nlvr_encoder.py."""

from models.attention import TwoImageOutput
from released.networks import PARTS, BertPooler
from released.networks import TwoImageBertModel as BertModel

__all__ = ["BertModel", "BertPooler", *PARTS]
globals().update(PARTS | {"BertSelfOutput": TwoImageOutput})
