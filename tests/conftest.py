"""Outside CI, the contracts run only on the samples of the registry."""

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


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    for item in items:
        rare = IN_FOLDER.get(item.path.parent.name, set())
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(x, str) and x in rare for x in params):
            item.add_marker("slow")
