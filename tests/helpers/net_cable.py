"""Two hosts on one cable, in network namespaces: nothing leaves the machine.

The checker runs on the host 'here'; the host 'there' has a server on port 2222.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE, THERE = f"mo{os.getpid()}h", f"mo{os.getpid()}t"
BLACK_HOLE, BLACK_HOLE6 = "10.99.0.77", "fd00:99::77"
CABLE = f"""
netns add {HERE}
netns add {THERE}
-n {HERE} link set lo up
-n {HERE} link add cable type veth peer name cable netns {THERE}
-n {HERE} address add 10.99.0.1/24 dev cable
-n {HERE} address add fd00:99::1/64 dev cable nodad
-n {THERE} address add 10.99.0.2/24 dev cable
-n {THERE} address add fd00:99::2/64 dev cable nodad
-n {HERE} link set cable up
-n {THERE} link set cable up
-n {HERE} neighbour add {BLACK_HOLE} lladdr 02:00:00:00:00:77 dev cable nud permanent
-n {HERE} neighbour add {BLACK_HOLE6} lladdr 02:00:00:00:00:77 dev cable nud permanent
-n {HERE} route add unreachable 10.98.0.0/16
"""
SERVER = """
import socket
address = "::", 2222
with socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True) as up:
    print("up", flush=True)
    while True:  # a server whose queue is full is silent
        up.accept()[0].close()
"""
NEIGHBOURS_MET = """
import asyncio
from monolith_optax.net import wait_for_nodes
asyncio.run(wait_for_nodes(["10.99.0.2:2222", "[fd00:99::2]:2222"], deadline=90))
"""


class NoNamespacesError(Exception):
    """Namespaces cannot be made here."""


@contextlib.contextmanager
def two_hosts(hosts, name_servers):
    """Makes both; yields the folder with the network settings of 'here'."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoNamespacesError("making network namespaces needs root and ip")
    with contextlib.ExitStack() as stack:
        try:
            settings = stack.enter_context(_laid_cable(hosts, name_servers))
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoNamespacesError(f"namespaces cannot be made: {error}") from error
        server = stack.enter_context(start(THERE, SERVER))
        stack.callback(server.kill)
        assert server.stdout.readline() == "up\n"
        with start(HERE, NEIGHBOURS_MET) as neighbours:
            output, _ = neighbours.communicate(timeout=100)
        assert neighbours.returncode == 0, output
        yield settings


@contextlib.contextmanager
def _laid_cable(hosts, name_servers):
    settings = Path("/etc/netns", HERE)
    try:
        for line in CABLE.strip().splitlines():
            ip(*line.split())
        settings.mkdir(parents=True)
        (settings / "hosts").write_text(hosts)
        (settings / "resolv.conf").write_text(name_servers)
        yield settings
    finally:
        for name in (HERE, THERE):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
        shutil.rmtree(settings, ignore_errors=True)
        with contextlib.suppress(OSError):
            settings.parent.rmdir()


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def set_cable(state, there=THERE):
    ip("-n", there, "link", "set", "cable", state)


def start(host, code, *arguments):
    """Starts Python on a host."""
    command = ["ip", "netns", "exec", host, sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
