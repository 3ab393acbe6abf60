"""Addresses and TF_CONFIG that nobody would write: parsed rightly, or a ValueError.

Longer by hand: NET_FUZZ_INPUTS=1000000 pytest -m slow --timeout 0 THIS_FILE
"""

import ipaddress
import json
import os
import random

import pytest
from choosing import sampled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from monolith_optax.net import (
    concat_ip_and_port,
    parse_address,
    read_addresses,
    tf_config_addresses,
)

ADDRESSES = [
    "localhost:10", "worker-3.cluster.local:2222", "127.0.0.1:65535", "127.1:80",
    "[::1]:10", "2001:db8::7:443", "[fe80::1%eth0]:80", "bücher.example:80", "a..b:80",
    "[::ffff:10.0.0.1]:1", "xn--bcher-kva:80", "1:2:3:4:5:6:7:8:80", "0x7f.1:80", "",
]  # fmt: skip
CLUSTERS = [
    '{"cluster": {"ps": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"index": 0}}',
    '{"cluster": {"chief": []}}', '{"cluster": {"a": ["x"], "a": ["y"]}}',
    '{"cluster": {"worker": {"0": "a:1"}}}', '{"cluster": null}', "[" * 100_000,
    '{"cluster": {"ps": [1e999, NaN]}}', "1" * 5000, '"\\ud800"',
]  # fmt: skip
MANY = int(os.environ.get("NET_FUZZ_INPUTS", "100000"))
NASTY = [
    *"[]{}:%.,-_\"'\\/@ \n\r\t\0\x1b\x7f019afx", "::", "null", "\ud800", "\ufeff",
    "٣", "\uff11", "。", "é", "ß", "\u200b", "\u202e", "😀", "a" * 64, "1" * 300,
    ".a" * 130,
]  # fmt: skip


def check_address(text):
    try:
        host, port = parse_address(text)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert repr(text) in refusal
        return
    written, _, digits = text.rpartition(":")
    assert port == int(digits)
    assert 0 < port < 65536
    assert written in (host, f"[{host}]")
    if ":" in host or written != host:
        ipaddress.ip_address(host)
    assert len(host) <= 253
    assert not set(host) & set("[]/@ \n\r\t\0\x1b")
    assert parse_address(concat_ip_and_port(host, port)) == (host, port)


def check_cluster(text):
    try:
        addresses = tf_config_addresses(text)
    except ValueError:
        return
    config = json.loads(text)
    tasks = {}  # of each role, in the order of their numbers
    for key in "cluster", "sparseCluster":
        for role, listed in config.get(key, {}).items():
            numbered = enumerate(listed) if isinstance(listed, list) else listed.items()
            tasks.setdefault(role, {}).update((int(n), x) for n, x in numbered)
    assert addresses == [t[n] for t in tasks.values() for n in sorted(t)]
    assert all(type(address) is str for address in addresses)


def mutations(seeds, count, seed=0):
    """Texts made of others by cutting, doubling and inserting."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(seeds)
        for _ in range(rng.randrange(4)):
            a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
            middle = rng.choice([rng.choice(NASTY), text[a:b] * 2, ""])
            text = text[:a] + middle + text[b:]
        yield text


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.text(alphabet="[]:%.019afx-_é\0"))
def test_any_text_as_an_address(text):
    check_address(text)


@settings(suppress_health_check=[HealthCheck.too_slow])  # it looks at the clock
@given(
    st.text()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=10,
    ).map(lambda value: json.dumps({"cluster": value}))
)
def test_any_text_as_a_cluster(text):
    check_cluster(text)


@pytest.mark.parametrize("count", sampled([2000, MANY], 2000))
def test_mutated_addresses(count):
    for text in mutations(ADDRESSES, count):
        check_address(text)
        assert len(read_addresses([text])) <= 1


@pytest.mark.parametrize("count", sampled([500, MANY], 500))
def test_mutated_clusters(count):
    for text in mutations(CLUSTERS, count):
        check_cluster(text)


@pytest.mark.parametrize("text", ["a", "é.", "[", "1:"])
def test_huge_inputs_are_refused(text):
    for use in (parse_address, tf_config_addresses):
        with pytest.raises(ValueError, match="must"):
            use(text * 10**6 + ":80")
