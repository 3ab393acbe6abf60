"""Addresses and where they are written down."""

import io
import json
import re
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monolith_optax import net

GOOD = {
    "localhost:10": ("localhost", 10),
    "worker-3.cluster.local:2222": ("worker-3.cluster.local", 2222),
    "under_score:1": ("under_score", 1),
    "127.0.0.1:65535": ("127.0.0.1", 65535),
    "127.1:80": ("127.1", 80),
    "[127.0.0.1]:80": ("127.0.0.1", 80),
    "[::1]:10": ("::1", 10),
    "[2001:db8::7]:443": ("2001:db8::7", 443),
    "[fe80::1%eth0]:80": ("fe80::1%eth0", 80),
    "bücher.example:80": ("bücher.example", 80),
}
BAD = [
    "", ":", ":80", "localhost", "localhost:", "localhost:65536", "localhost:0",
    "localhost:-1", "localhost:text", "localhost:+1", "localhost: 80", "localhost:8_0",
    "localhost:٣", "localhost:000080", " localhost:80", "local host:80", "tcp://x:1",
    "x/y:1", "user@x:1", "[localhost]:80", "[::1:80", "::1]:80", "[]:80", "[[::1]]:80",
    "::zz:80", "1:2:3", "a..b:80", "a" * 64 + ":80", "x\n:80", None, 80, b"x:80",
    ("x", 80), "[fe80::1%]:80", "[fe80::1%a b]:80", "[fe80::1%\ud800]:80",
    "fe80::1%" + "a" * 64 + ":80", "[fe80::1%a\0b]:80", "[127.0.0.1%lo]:80",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_addresses(text):
    assert net.parse_address(text) == GOOD[text]


@pytest.mark.parametrize("text", BAD, ids=repr)
def test_bad_addresses_are_named(text):
    with pytest.raises(ValueError, match=r"must|port") as error:
        net.parse_address(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("[::1]", "has no port: write [::1]:port."),
        ("[fe80::1%eth0]", "has no port: write [fe80::1%eth0]:port."),
        ("localhost", "has no port: write host:port."),
        ("::1", "in brackets: write [::1]:port."),
        ("::1:18086", "in brackets: write [::1]:18086."),
        ("::1:8086", "in brackets: write [::1]:8086 or [::1:8086]:port."),
        ("fe80::1%eth0:80", "in brackets: write [fe80::1%eth0]:80."),
    ],
)
def test_addresses_that_lack_something_say_how_to_write_it(text, advice):
    with pytest.raises(ValueError, match=re.escape(advice)) as error:
        net.parse_address(text)
    assert repr(text) in str(error.value)


@settings(suppress_health_check=[HealthCheck.too_slow])  # it looks at the clock
@given(st.ip_addresses(), st.integers(1, 65535))
def test_joining_and_parsing_are_inverse(ip, port):
    assert net.parse_address(net.concat_ip_and_port(str(ip), port)) == (str(ip), port)


def test_monoliths_helpers():
    assert net.concat_ip_and_port("localhost", 10) == "localhost:10"
    assert net.concat_ip_and_port("127.0.0.1", 10) == "127.0.0.1:10"
    assert net.concat_ip_and_port("::1", 10) == "[::1]:10"
    assert net.is_ipv6_address("::1")
    assert net.is_ipv6_address("fe80::1%eth0")
    for other in ("127.0.0.1", "localhost", "[::1]", "", "::1:80:zz"):
        assert not net.is_ipv6_address(other)
    assert (net.AddressFamily.IPV4, net.AddressFamily.IPV6) == ("ipv4", "ipv6")


@pytest.mark.parametrize(
    ("found", "ip", "address", "ipv4"),
    [
        ({0: "10.0.0.7"}, "10.0.0.7", "10.0.0.7:80", True),
        ({socket.AF_INET6: "fd00::7"}, "fd00::7", "[fd00::7]:80", False),
    ],
)
def test_the_local_machine(monkeypatch, found, ip, address, ipv4):
    def getaddrinfo(host, port, family=0):
        assert (host, port) == (socket.gethostname(), None)
        if family not in found:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(family, 0, 0, "", (found[family], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert net.get_local_ip() == ip
    assert net.get_local_server_addr(80) == address
    assert net.is_ipv4_supported() == ipv4


CLUSTER = {"worker": ["w0:1", "w1:1"], "chief": ["c:1"], "ps": ["p:1"], "evaluator": []}


def test_tf_config(monkeypatch):
    text = json.dumps({"cluster": CLUSTER, "task": {"type": "worker", "index": 0}})
    everyone = ["w0:1", "w1:1", "c:1", "p:1"]
    assert net.tf_config_addresses(text) == everyone
    assert net.tf_config_addresses(text, roles=["worker", "ps"]) == [
        "w0:1",
        "w1:1",
        "p:1",
    ]
    monkeypatch.setenv("TF_CONFIG", text)
    assert net.tf_config_addresses() == everyone
    with pytest.raises(ValueError, match=r"'evaluator'\], but \['boss'\] are not"):
        net.tf_config_addresses(roles=["chief", "boss"])


@pytest.mark.parametrize(
    ("config", "addresses"),
    [
        ({"cluster": {"worker": {"10": "k:1", "2": "c:1"}}}, ["c:1", "k:1"]),
        ({"sparseCluster": {"worker": {"3": "d:1"}, "ps": ["p:1"]}}, ["d:1", "p:1"]),
        (
            {"cluster": {"ps": ["p:1"]}, "sparseCluster": {"worker": {"3": "d:1"}}},
            ["p:1", "d:1"],
        ),
        ({"cluster": {"worker": {}}}, []),
    ],
)
def test_tf_config_with_numbered_tasks(config, addresses):
    assert net.tf_config_addresses(json.dumps(config)) == addresses


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"cluster": []}', '{"cluster": {"ps": "a:1"}}',
     '{"cluster": {"ps": [1]}}', '{"cluster": {"ps": {"0": 1}}}', '{"cluster": null}',
     '{"cluster": {"ps": {"first": "a:1"}}}', '{"cluster": {"ps": {"01": "a:1"}}}',
     '{"cluster": {"ps": ["a:1"]}, "sparseCluster": {"ps": {"0": "b:1"}}}',
     '{"sparseCluster": []}'],
)  # fmt: skip
def test_tf_config_that_is_none(text):
    with pytest.raises(ValueError, match="TF_CONFIG must be JSON"):
        net.tf_config_addresses(text)


def test_missing_environment_variables(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="TF_CONFIG is not set"):
        net.tf_config_addresses()
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is not set"):
        net.coordinator_addresses()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:8476")
    assert net.coordinator_addresses() == ["10.0.0.1:8476"]
    assert net.coordinator_addresses("x:1") == ["x:1"]
    with pytest.raises(ValueError, match="is not set"):
        net.coordinator_addresses("")


def test_addresses_in_a_file():
    text = "# the cluster\na:1\n\n  b:2  # second\n[::1]:3\n"
    assert net.read_addresses(io.StringIO(text)) == ["a:1", "b:2", "[::1]:3"]
