"""The node checker across real networks, in namespaces that the tests make."""

import textwrap

import pytest
from net_cable import (
    BLACK_HOLE,
    BLACK_HOLE6,
    HERE,
    NoNamespacesError,
    set_cable,
    start,
    two_hosts,
)

HOSTS = f"""
127.0.0.1 localhost
fd00:99::2 only-six
{BLACK_HOLE} dual-a
fd00:99::2 dual-a
10.99.0.2 dual-b
{BLACK_HOLE6} dual-b
"""
HUNG_NAME_SERVER = f"""
nameserver {BLACK_HOLE}
options timeout:30 attempts:5
"""
PRELUDE = """
import asyncio, os, threading
from monolith_optax.net import *
"""


@pytest.fixture(scope="module", autouse=True)
def network():
    try:
        with two_hosts(HOSTS, HUNG_NAME_SERVER) as settings:
            yield settings
    except NoNamespacesError as error:
        pytest.skip(str(error))


def start_here(code):
    """Starts code on the host 'here'."""
    return start(HERE, PRELUDE + textwrap.dedent(code))


def run_here(code):
    with start_here(code) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output


def test_reasons():
    run_here(f"""
        addrs = ["10.99.0.2:2222", "[fd00:99::2]:2222", "10.99.0.2:2223",
                 "{BLACK_HOLE}:1", "[{BLACK_HOLE6}]:1", "10.98.0.1:1", "10.97.0.1:1"]
        report = asyncio.run(check_nodes(addrs, timeout=0.5))
        reasons = [status.reason and status.reason.value for status in report.results]
        assert reasons == [None, None, "refused", "timeout", "timeout", "unreachable",
                           "unreachable"], report
        assert report["10.98.0.1:1"].message == "No route to host", report
        assert report["10.97.0.1:1"].message == "Network is unreachable", report
    """)


def test_names_of_one_family_and_of_two():
    run_here("""
        names = ["only-six:2222", "dual-a:2222", "dual-b:2222"]
        report = asyncio.run(check_nodes(names, timeout=60.0))
        assert report.all_alive, report
        # The silent address came first for one of the two.
        assert max(status.latency for status in report.results) >= 0.25, report.results
    """)


def test_a_hung_name_server_costs_one_timeout_also_at_exit():
    # A lookup lasts 150 s, see HUNG_NAME_SERVER; run_here does not wait that long.
    run_here("""
        names = [f"host{i}.example:1" for i in range(50)]
        before = len(os.listdir("/proc/self/fd"))
        report = asyncio.run(check_nodes([*names, "10.99.0.2:2222"], timeout=0.5))
        assert report.alive == ["10.99.0.2:2222"], report
        assert {report[name].reason for name in names} == {Reason.NO_NAME_SERVER}
        assert len(os.listdir("/proc/self/fd")) == before
        assert threading.active_count() == 1
        checker = NodeAliveChecker(names, timeout=0.5)
        assert checker.get_dead_nodes() == names
    """)


def test_names_that_no_server_knows(network):
    (network / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # refuses
    try:
        run_here("""
            names = ["no-such-name:1", "only-six:2222"]
            report = asyncio.run(check_nodes(names, timeout=60.0))
            status = report["no-such-name:1"]
            assert status.reason is Reason.NO_NAME_SERVER and status.message, report
            assert report.alive == ["only-six:2222"], report
        """)
    finally:
        (network / "resolv.conf").write_text(HUNG_NAME_SERVER)


def test_hundreds_of_hung_names_hold_up_no_other():
    run_here("""
        async def run():
            async with TcpConnector() as connector:
                names = (f"host{i}.example" for i in range(400))
                hung = [asyncio.create_task(connector(name, 1)) for name in names]
                await asyncio.sleep(0)
                await connector("only-six", 2222)
                assert not any(task.done() for task in hung)
                for task in hung:
                    task.cancel()
                await asyncio.wait(hung)
        asyncio.run(run())
    """)


def test_a_partition_that_heals_while_waiting():
    set_cable("down")
    try:
        with start_here("""
            report = asyncio.run(wait_for_nodes(
                ["10.99.0.2:2222"], deadline=90.0, timeout=0.3,
                on_progress=lambda report: print(report.dead, flush=True)))
            assert report.all_alive
        """) as process:
            assert process.stdout.readline() == "['10.99.0.2:2222']\n"
            set_cable("up")
            output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    finally:
        set_cable("up")


def test_watching_a_partition_come_and_go():
    try:
        with start_here("""
            async def watch():
                async for transition in watch_nodes(
                        ["10.99.0.2:2222"], interval=0.05, timeout=0.3):
                    print(transition.alive, flush=True)
            asyncio.run(watch())
        """) as process:
            for seen, state in (("True", "down"), ("False", "up"), ("True", "up")):
                assert process.stdout.readline() == f"{seen}\n"
                set_cable(state)
            process.kill()
    finally:
        set_cable("up")
