"""The node checker on a virtual clock, with made-up nodes."""

import asyncio
import contextlib
import errno
import itertools
import logging
import pickle
import random
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_doubles import REFUSED, Addresses, Late, Nodes, run_virtually

from monolith_optax.net import (
    NodeAliveChecker,
    NodesDownError,
    Reason,
    TcpConnector,
    _connect,
    _round,
    check_nodes,
    tf_config_addresses,
    wait_for_nodes,
    watch_nodes,
)

SILENT = None


def addresses(nodes):
    return [f"{host}:1" for host in nodes.behaviours]


def check(nodes, addrs=None, **options):
    """The report, and the virtual seconds that it took."""
    addrs = addresses(nodes) if addrs is None else addrs
    return run_virtually(check_nodes(addrs, connector=nodes, **options))


def test_every_distinct_address_is_probed_once_in_the_order_given():
    nodes = Nodes(a=0.3, b=REFUSED, c=0.1)
    report, _ = check(nodes, ["c:1", "b:1", "c:1", "a:1", "b:1"])
    assert [status.address for status in report.results] == ["c:1", "b:1", "a:1"]
    assert sorted(host for host, _ in nodes.probes) == ["a", "b", "c"]
    assert (report.alive, report.dead) == (["c:1", "a:1"], ["b:1"])
    assert not report.all_alive
    assert report["a:1"].latency == pytest.approx(0.3)
    assert report["a:1"].reason is None
    with pytest.raises(KeyError):
        report["d:1"]


def test_an_empty_list_is_all_alive():
    report, _ = check(Nodes())
    assert report.all_alive
    assert report.results == ()


REASONS = [
    (errno.ECONNREFUSED, Reason.REFUSED),
    (errno.ECONNRESET, Reason.REFUSED),
    (errno.ETIMEDOUT, Reason.TIMEOUT),
    (SILENT, Reason.TIMEOUT),
    (errno.EHOSTUNREACH, Reason.UNREACHABLE),
    (errno.ENETUNREACH, Reason.UNREACHABLE),
    (errno.EINVAL, Reason.INVALID_ADDRESS),
    (errno.EMFILE, Reason.LOCAL_FAULT),
    (errno.ENFILE, Reason.LOCAL_FAULT),
    (errno.EACCES, Reason.LOCAL_FAULT),
    (errno.EPERM, Reason.LOCAL_FAULT),
    (errno.ENOBUFS, Reason.LOCAL_FAULT),
    (errno.EADDRNOTAVAIL, Reason.LOCAL_FAULT),
    (socket.gaierror(socket.EAI_NONAME, "unknown"), Reason.NAME_NOT_RESOLVED),
    (socket.gaierror(socket.EAI_AGAIN, "later"), Reason.NO_NAME_SERVER),
    (socket.gaierror(socket.EAI_MEMORY, "no memory"), Reason.LOCAL_FAULT),
]


@pytest.mark.parametrize(("failure", "reason"), REASONS, ids=repr)
def test_reasons(failure, reason):
    report, _ = check(Nodes(a=failure))
    status = report["a:1"]
    assert (status.alive, status.reason) == (False, reason)
    assert status.message
    assert f"a:1: {reason} ({status.message})" in str(report)


def test_local_faults_are_said_to_be_local(caplog):
    with caplog.at_level(logging.WARNING, "monolith_optax.net"):
        report, _ = check(Nodes(a=errno.EMFILE, b=0.1, c=REFUSED))
    assert report.local_faults == ["a:1"]
    assert report.dead == ["a:1", "c:1"]
    assert "1 of 3 nodes could not be checked" in caplog.text
    assert "a:1: Too many open files" in caplog.text


def test_an_error_that_is_no_oserror_is_not_hidden():
    with pytest.raises(ExceptionGroup) as caught:
        check(Nodes(a=ZeroDivisionError("a bug"), b=SILENT))
    assert isinstance(caught.value.exceptions[0], ZeroDivisionError)


def test_a_thousand_silent_nodes_cost_one_timeout():
    nodes = Nodes(**{f"n{i}": SILENT for i in range(1000)})
    report, seconds = check(nodes, timeout=2.0)
    assert seconds == pytest.approx(2.0)
    assert len(report.dead) == nodes.most_running == 1000


def test_max_concurrency_bounds_the_probes():
    nodes = Nodes(**{f"n{i}": SILENT for i in range(100)})
    _, seconds = check(nodes, max_concurrency=10)
    assert seconds == pytest.approx(10.0)
    assert nodes.most_running == 10


@pytest.mark.parametrize("heal", [0.0, 0.05, 1.0, 30.0, 59.5])
def test_waiting_for_a_node_that_comes_up(heal):
    nodes = Nodes(a=0.01, b=lambda now: 0.01 if now >= heal else REFUSED)
    reports = []
    report, seconds = run_virtually(
        wait_for_nodes(
            addresses(nodes), deadline=60.0, connector=nodes, on_progress=reports.append
        )
    )
    assert report.all_alive
    assert reports[-1] == report
    # A pause is at most twice the time that has passed, and five seconds.
    assert heal <= seconds <= min(3 * heal + 0.2, heal + 5.1, 60.0)
    assert [host for host, _ in nodes.probes].count("a") == 1
    assert all(len(report.results) == 2 for report in reports)
    assert all("a:1" in report.alive for report in reports)


def test_pauses_grow_with_jitter_up_to_a_bound(monkeypatch):
    fractions = iter([0.5, 1.0] * 100)
    monkeypatch.setattr(random, "uniform", lambda a, b: a + (b - a) * next(fractions))
    nodes = Nodes(a=REFUSED)
    with pytest.raises(NodesDownError):
        run_virtually(wait_for_nodes(["a:1"], deadline=60.0, connector=nodes))
    times = [time for _, time in nodes.probes]
    pauses = [b - a for a, b in itertools.pairwise(times)]
    # A pause is its bound times the fraction that chance made of [0.5, 1].
    assert pauses[:8] == pytest.approx(
        [0.1 * 0.75, 0.2, 0.4 * 0.75, 0.8, 1.6 * 0.75, 3.2, 5 * 0.75, 5.0]
    )
    assert max(pauses) <= 5.0
    assert 59.9 <= times[-1] < 60.0
    assert len(times) < 40


@pytest.mark.parametrize("behaviour", [REFUSED, SILENT, 0.7])
@pytest.mark.parametrize("deadline", [0.005, 0.5, 10.0])
def test_waiting_ends_with_the_deadline(behaviour, deadline):
    nodes = Nodes(up=0.001, down=behaviour)
    if behaviour == 0.7 and deadline > 1:
        report, _ = run_virtually(
            wait_for_nodes(addresses(nodes), deadline=deadline, connector=nodes)
        )
        assert report.all_alive
        return

    async def measured():
        with pytest.raises(NodesDownError) as caught:
            await wait_for_nodes(addresses(nodes), deadline=deadline, connector=nodes)
        return caught.value

    error, seconds = run_virtually(measured())
    assert deadline * 0.9 - 0.01 <= seconds <= deadline + 0.01
    assert error.report.dead == ["down:1"]
    assert "1 of 2 up\n  down:1: " in str(error)
    assert isinstance(error, TimeoutError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.report) == (str(error), error.report)


def test_the_deadline_holds_for_nodes_that_wait_for_their_turn():
    nodes = Nodes(**{f"n{i}": SILENT for i in range(1000)})

    async def wait():
        with pytest.raises(NodesDownError) as caught:
            await wait_for_nodes(
                addresses(nodes), deadline=2.5, max_concurrency=10, connector=nodes
            )
        return caught.value.report

    report, seconds = run_virtually(wait())
    assert seconds == pytest.approx(2.5)
    assert len(report.dead) == 1000


def test_the_last_report_keeps_the_reason_of_a_whole_probe():
    def refuses_late(_):
        return Late(0.03, REFUSED)

    nodes = Nodes(a=refuses_late)
    with pytest.raises(NodesDownError, match="a:1: refused"):
        run_virtually(wait_for_nodes(["a:1"], deadline=2.0, connector=nodes))


def test_nobody_waits_for_malformed_addresses_alone():
    nodes = Nodes(late=lambda now: 0.1 if now > 3 else REFUSED)

    async def measured():
        with pytest.raises(NodesDownError, match="no port: invalid address"):
            await wait_for_nodes(["no port", "late:1"], deadline=60.0, connector=nodes)

    _, seconds = run_virtually(measured())
    assert 3 < seconds < 10


def test_an_exception_in_the_callback_ends_the_wait():
    def callback(report):
        raise ZeroDivisionError(report)

    async def wait():
        with pytest.raises(ZeroDivisionError):
            await wait_for_nodes(
                ["a:1"], deadline=60.0, connector=Nodes(a=REFUSED), on_progress=callback
            )
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtually(wait())


@pytest.mark.parametrize("function", [check_nodes, wait_for_nodes])
@pytest.mark.parametrize("moment", [0.0, 0.01, 0.3, 0.999])
def test_cancellation_leaves_no_task(function, moment):
    nodes = Nodes(a=SILENT, b=0.01, c=REFUSED)
    options = {} if function is check_nodes else {"deadline": 60.0}

    async def cancelled():
        task = asyncio.create_task(
            function(addresses(nodes), connector=nodes, **options)
        )
        await asyncio.sleep(moment)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert nodes.running == []

    run_virtually(cancelled())


def watch(nodes, seconds, **options):
    """The transitions of that many seconds, as (time, host, alive)."""
    seen = []

    async def watching():
        clock = asyncio.get_running_loop().time
        transitions = watch_nodes(addresses(nodes), connector=nodes, **options)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), contextlib.aclosing(transitions):
                async for transition in transitions:
                    host = transition.address.partition(":")[0]
                    assert transition.alive == transition.status.alive
                    seen.append((round(clock(), 2), host, transition.alive))
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtually(watching())
    return seen


def test_watching_tells_each_transition_once():
    nodes = Nodes(
        steady=0.0,
        comes=lambda now: 0.0 if now >= 25 else REFUSED,
        goes=lambda now: 0.0 if now < 25 else REFUSED,
        flickers=lambda now: 0.0 if now % 30 else REFUSED,
    )
    seen = watch(nodes, 100, interval=10.0)
    assert seen == [
        (0.0, "steady", True),
        (0.0, "goes", True),
        (10.0, "flickers", True),
        (20.0, "comes", False),
        (30.0, "comes", True),
        (50.0, "goes", False),
    ]


def test_watching_keeps_its_interval_and_never_overlaps_probes():
    # Nodes() itself asserts that no two probes of one node run at a time.
    nodes = Nodes(a=SILENT, b=0.0)
    assert watch(nodes, 21, interval=0.25, timeout=1.0)[0] == (1.0, "b", True)
    assert [time for host, time in nodes.probes if host == "b"] == list(range(21))
    nodes = Nodes(b=0.0)
    watch(nodes, 1.0, interval=0.25)
    assert [time for _, time in nodes.probes] == pytest.approx([0, 0.25, 0.5, 0.75])


def test_local_faults_count_neither_way_when_watching():
    nodes = Nodes(a=lambda now: errno.EMFILE if 5 < now < 55 else 0.0)
    assert watch(nodes, 100, interval=10.0) == [(0.0, "a", True)]


@settings(suppress_health_check=[HealthCheck.too_slow])  # it looks at the clock
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_thresholds_against_a_model(history, failures, successes):
    nodes = Nodes(a=lambda now: 0.0 if history[round(now)] else REFUSED)
    seen = (
        watch(
            nodes,
            len(history) - 0.5,
            interval=1.0,
            failure_threshold=failures,
            success_threshold=successes,
        )
        if history
        else []
    )
    expected, state = [], None
    for time in range(len(history)):
        for alive, threshold in ((True, successes), (False, failures)):
            recent = history[max(0, time + 1 - threshold) : time + 1]
            settled = len(recent) == threshold and set(recent) == {alive}
            if settled and state != alive:
                expected.append((float(time), "a", alive))
                state = alive
    assert seen == expected


def test_closing_a_watch_ends_it():
    nodes = Nodes(a=0.0, b=SILENT)

    async def watching():
        transitions = watch_nodes(addresses(nodes), interval=1.0, connector=nodes)
        assert (await anext(transitions)).address == "a:1"
        await transitions.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(transitions)

    run_virtually(watching())
    assert nodes.running == []


@pytest.fixture
def check_name(monkeypatch):
    """Checks a name of made-up addresses: returns its status."""

    def check_name(addresses, *, timeout=1.0, sockets=None, lateness=0.0):
        monkeypatch.setattr(_connect, "attempt", addresses.attempt)
        if sockets is not None:
            monkeypatch.setattr(_round, "_descriptors_left", lambda: sockets)

        async def run():
            async with TcpConnector(addresses.lookup) as connector:
                return await check_nodes(
                    ["name:80"], timeout=timeout, connector=connector
                )

        [status] = run_virtually(run(), lateness)[0].results
        assert addresses.running == 0
        assert {address[1] for address, _ in addresses.attempts} <= {80}
        return status

    return check_name


def test_a_silent_name_server_is_not_a_silent_node(check_name):
    status = check_name(Addresses({"10.0.0.1": 0.0}, lookup_seconds=60.0))
    assert status.reason is Reason.NO_NAME_SERVER
    assert status.message == "no answer from a name server within 1 s"
    assert check_name(Addresses({"10.0.0.1": SILENT})).reason is Reason.TIMEOUT
    late = check_name(Addresses({"10.0.0.1": SILENT}, lookup_seconds=0.9))
    assert late.reason is Reason.TIMEOUT


def test_a_silent_address_costs_a_head_start(check_name):
    name = Addresses({"10.0.0.1": SILENT, "10.0.0.2": 0.01})
    assert check_name(name, timeout=30.0).latency == pytest.approx(0.26)


def test_a_refusing_address_costs_nothing(check_name):
    name = Addresses({"10.0.0.1": REFUSED, "::1": Late(0.01, REFUSED), "10.0.0.2": 0.0})
    assert check_name(name).latency == pytest.approx(0.01)


def test_the_families_of_a_name_take_turns(check_name):
    name = Addresses(dict.fromkeys(["10.0.0.1", "10.0.0.2", "::1", "::2"], REFUSED))
    assert check_name(name).reason is Reason.REFUSED
    tried = [address[0] for address, _ in name.attempts]
    assert tried == ["10.0.0.1", "::1", "10.0.0.2", "::2"]


@pytest.mark.parametrize("sockets", [1, 2, 1000])
@pytest.mark.parametrize("silent", [1, 8, 100])
@pytest.mark.parametrize("lookup_seconds", [0.0, 0.9])
def test_any_number_of_silent_addresses_hides_no_live_one(
    check_name, sockets, silent, lookup_seconds
):
    # The same share of the timeout is left to the last address, however many there are.
    left = (1.0 - lookup_seconds) / (silent + 2)
    behaviours = dict.fromkeys((f"10.0.1.{i}" for i in range(silent)), SILENT)
    name = Addresses(behaviours | {"10.0.0.1": 0.9 * left}, lookup_seconds)
    assert check_name(name, sockets=sockets).alive
    assert name.most_running <= sockets


def test_head_starts_that_last_too_long_hide_no_live_address(check_name):
    silent = dict.fromkeys((f"10.0.1.{i}" for i in range(8)), SILENT)
    assert check_name(Addresses(silent | {"10.0.0.1": 0.01}), lateness=0.03).alive


def test_a_slow_address_beside_silent_ones_is_waited_for(check_name):
    silent = dict.fromkeys((f"10.0.1.{i}" for i in range(8)), SILENT)
    assert check_name(Addresses({"10.0.0.1": 0.9} | silent)).alive


def test_attempts_take_no_socket_that_a_probe_waits_for(monkeypatch):
    name = Addresses({f"10.0.1.{i}": SILENT for i in range(5)})
    monkeypatch.setattr(_connect, "attempt", name.attempt)
    monkeypatch.setattr(_round, "_descriptors_left", lambda: 3)

    async def run():
        async with TcpConnector(name.lookup) as connector:
            names = [f"name{i}:80" for i in range(7)]
            return await check_nodes(names, connector=connector)

    report, seconds = run_virtually(run())
    assert len(report.dead) == 7
    assert seconds == pytest.approx(3.0)  # rounds of three
    assert name.most_running == 3


def test_what_other_addresses_said_is_the_cause(monkeypatch):
    behaviours = {"10.0.0.1": errno.EHOSTUNREACH, "10.0.0.2": REFUSED, "::1": REFUSED}
    name = Addresses(behaviours)
    monkeypatch.setattr(_connect, "attempt", name.attempt)

    async def run():
        async with TcpConnector(name.lookup) as connector:
            with pytest.raises(ConnectionRefusedError) as caught:
                await connector("name", 80)
        return caught.value.__cause__

    cause, _ = run_virtually(run())
    assert isinstance(cause, ExceptionGroup)
    assert {error.errno for error in cause.exceptions} == {errno.EHOSTUNREACH, REFUSED}


def test_a_subclass_with_its_own_way_to_connect_is_asked():
    class Closed(TcpConnector):
        async def __call__(self, host, port):
            raise ConnectionRefusedError(REFUSED, f"{host} {port}")

    async def run():
        async with Closed() as connector:
            return await check_nodes(["127.0.0.1:80"], connector=connector)

    report, _ = run_virtually(run())
    assert report["127.0.0.1:80"].message == "127.0.0.1 80"


BAD_USE = [
    (lambda: asyncio.run(check_nodes("a:1")), TypeError, "addrs must be a list"),
    (lambda: asyncio.run(check_nodes(7)), TypeError, "addrs must be a list"),
    (lambda: asyncio.run(check_nodes([], timeout=0)), ValueError, "timeout must be"),
    (lambda: asyncio.run(check_nodes([], timeout=-1)), ValueError, "timeout must be"),
    (
        lambda: asyncio.run(check_nodes([], timeout=float("nan"))),
        ValueError,
        "timeout must be",
    ),
    (
        lambda: asyncio.run(check_nodes([], max_concurrency=0)),
        ValueError,
        "max_concurrency must be",
    ),
    (
        lambda: asyncio.run(wait_for_nodes([], deadline=0)),
        ValueError,
        "deadline must be",
    ),
    (lambda: watch_nodes([], interval=0), ValueError, "interval must be"),
    (
        lambda: watch_nodes([], interval=1, failure_threshold=0),
        ValueError,
        "failure_threshold",
    ),
    (
        lambda: watch_nodes([], interval=1, success_threshold=0),
        ValueError,
        "success_threshold",
    ),
    (
        lambda: watch_nodes([], interval=1, success_threshold=None),
        ValueError,
        "success_threshold",
    ),
    (lambda: watch_nodes("a:1", interval=1), TypeError, "addrs must be a list"),
    (lambda: NodeAliveChecker(7), TypeError, "addrs must be a list"),
    (lambda: NodeAliveChecker("a:1"), TypeError, "addrs must be a list"),
    (lambda: NodeAliveChecker([], timeout=0), ValueError, "timeout must be"),
    (lambda: NodeAliveChecker([], num_thread=0), ValueError, "num_thread must be"),
    (lambda: NodeAliveChecker([["a", 1]]), TypeError, "Addresses must be strings"),
    (lambda: NodeAliveChecker([], timeout="1"), ValueError, "timeout must be"),
    (lambda: NodeAliveChecker([], timeout=None), ValueError, "timeout must be"),
    (lambda: watch_nodes([], interval=None), ValueError, "interval must be"),
    (lambda: tf_config_addresses("{}", roles="ps"), TypeError, "roles must be a list"),
]


@pytest.mark.parametrize(("use", "error", "message"), BAD_USE)
def test_bad_use(use, error, message):
    with pytest.raises(error, match=message):
        use()
