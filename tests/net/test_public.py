"""The public names of the node checker."""

import pickle

import pytest

from monolith_optax import net

STATUS = net.NodeStatus("a:1", False, 0.5, net.Reason.REFUSED, "Connection refused")
REPORT = net.NodeReport((STATUS,))
VALUES = [
    net.Address("a", 1),
    net.AddressFamily.IPV4,
    net.NodesDownError(REPORT),
    REPORT,
    STATUS,
    net.Transition("a:1", False, STATUS),
    net.check_nodes,
]


@pytest.mark.parametrize("name", net.__all__)
def test_names_are_documented_and_name_the_public_module(name):
    value = getattr(net, name)
    assert value.__doc__
    assert value.__module__ == "monolith_optax.net"


def test_all_names_are_listed():
    assert {name for name in dir(net) if not name.startswith("_")} == set(net.__all__)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_pickles_name_public_places(value):
    text = pickle.dumps(value, protocol=4)
    assert b"monolith_optax.net" in text
    assert b"monolith_optax.net._" not in text
    copy = pickle.loads(text)
    assert str(copy) == str(value)
    assert type(copy) is type(value)


def test_a_report_of_many_nodes_has_a_short_repr():
    assert repr(net.NodeReport((STATUS,) * 10_000)) == ("<NodeReport: 0 of 10000 up>")
