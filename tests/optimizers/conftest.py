"""Tests that ask for `variant` run on every optimizer of the registry."""

import pytest
from choosing import chosen
from registry import VARIANTS


@pytest.fixture(params=chosen())
def variant(request):
    return VARIANTS[request.param]
