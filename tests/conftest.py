"""Puts the project and its test helpers on the path; one thread, as in the processes that the tests start."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; small tensors gain nothing from threads
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
