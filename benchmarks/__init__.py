"""Compares each part with its alternatives: `python -m benchmarks --help`."""

import sys
from pathlib import Path

# The registry of the tests also lists the optimizers to measure.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
