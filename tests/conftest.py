"""Puts the project and its test helpers on the path; small tensors gain nothing from many threads."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
