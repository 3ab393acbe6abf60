"""Tests that ask for `variant` run on every optimizer of the registry."""

import pytest
from registry import VARIANTS


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]
