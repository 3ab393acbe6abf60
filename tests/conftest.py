"""Fixtures of many tests; and outside CI, contracts run only on samples."""

import jax
import pytest
from registry import ROWS, VARIANTS

SAMPLES = {
    f"{name}_{variant}".strip("_")
    for name, row in ROWS.items()
    for variant in row.samples
}
RARE = {*VARIANTS} - SAMPLES | {name for name, row in ROWS.items() if not row.samples}
# The contracts of optax's own optimizers call ours so.
IN_FOLDER = {
    "checkpoint": RARE,
    "optimizers": RARE,
    "rows": {f"ours: {name}" for name in RARE},
}


@pytest.fixture
def float64():
    """So that tolerances are tight, whatever the order of a sum."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mixed_dtypes():
    """Some of optax's own optimizers mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def mixed_ranks():
    """Some optimizers mix ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        folders = item.nodeid.split("::")[0].split("/")
        rare = set().union(*(IN_FOLDER.get(folder, ()) for folder in folders))
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(x, str) and x in rare for x in params):
            item.add_marker("slow")
