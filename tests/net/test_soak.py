"""Nodes that come and go for a while: see helpers/net_soak.py.

Longer by hand: NET_SOAK_SECONDS=600 NET_SOAK_NODES=1000 pytest -m slow -s ...
"""

import json
import os
import subprocess
import sys

import net_soak
import pytest
from net_cable import HERE, THERE, NoNamespacesError, two_hosts

SECONDS = float(os.environ.get("NET_SOAK_SECONDS", "60"))
NODES = int(os.environ.get("NET_SOAK_NODES", "200"))


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_watching_nodes_that_come_and_go():
    name_server = f"nameserver {net_soak.NAME_SERVER}\noptions timeout:5\n"
    command = ["ip", "netns", "exec", HERE, sys.executable, net_soak.__file__]
    arguments = [*command, str(SECONDS), str(NODES), THERE]
    try:
        with two_hosts("127.0.0.1 localhost\n", name_server):
            result = subprocess.run(
                arguments, check=True, capture_output=True, text=True
            )
    except NoNamespacesError as error:
        pytest.skip(str(error))
    found = json.loads(result.stdout)
    print({k: v[:9] if isinstance(v, list) else v for k, v in found.items()})
    assert result.stderr == ""
    assert found["changes"] > found["nodes"]  # each came up once
    assert found["transitions"] > found["nodes"]
    assert found["false transitions"][:9] == []
    assert found["wrong at the end"][:9] == []
    assert found["tasks gained"] == found["files gained"] == 0
    assert found["kilobytes gained"] < 1024
