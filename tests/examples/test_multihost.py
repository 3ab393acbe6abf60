"""Training across real processes: the same numbers, and what happens when one is lost.

Longer by hand, with so many processes killed at random moments:

TRAIN_KILLS=20 pytest -m slow -n 0 THIS_FILE

All of them run on this machine and talk only over loopback. How long that takes depends
on what else the machine does, so nothing here is asked to be quick.
"""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import multihost_worker as worker
import numpy as np
import pytest
from choosing import sampled

example = worker.example

PATIENCE = 240  # seconds until something has gone wrong
STEPS = 20
KILLS = int(os.environ.get("TRAIN_KILLS", "4"))
SIZES = ["--dim", worker.DIM, "--batch-size", worker.BATCH, "--checkpoint-every", 4]
# What a process says that lost another one: JAX's coordination service and its
# client, which ask for signs of life, or Gloo, which lost a connection.
LOST = r"heartbeat|unhealthy|coordination service|Connection (?:closed|reset)"
# What Gloo or JAX says when processes run different programs; a traceback may show
# the line of JAX that would say so, which says nothing.
DIFFER = r"collective mismatch|Error: .*mismatch"

pytestmark = pytest.mark.timeout(3 * PATIENCE)


@pytest.fixture(scope="module")
def addresses():
    """Addresses for three processes; nobody else is given their ports."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(example.reserved_address()) for _ in range(3)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, addresses):
    """Runs the example and all cases; gives the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pair(worker.__file__, addresses, folder, STEPS) as (first, other):
        end_well(first, other)
        assert "loss=" in first.said()
        assert "loss=" not in other.said()
    return folder


@contextlib.contextmanager
def pair(script, addresses, folder, steps, *, late=False):
    """Process 0 and 1 of a cluster; process 0 may be late."""
    options = [*SIZES, "--steps", steps, "--checkpoint-dir", folder, "--cpu-devices", 4]
    options += ["--heartbeat-timeout", 5, "--addresses", ",".join(addresses[:2])]
    with contextlib.ExitStack() as stack:
        started = {}
        for number in 1, 0:
            output = folder.with_suffix(f".{number}")
            command = [script, *options, "--process-id", number]
            started[number] = stack.enter_context(start(command, output))
            if late and number:
                wait_until(lambda: "waits for" in started[1].said())
        yield started[0], started[1]


@contextlib.contextmanager
def start(command, output):
    """A Python program, killed at the end of the block; its output goes to a file."""
    command = [sys.executable, *command, "--plot", output.with_suffix(".png")]
    with output.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT
        )
    process.said = output.read_text
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def end_well(*processes):
    for process in processes:
        assert process.wait(PATIENCE) == 0, process.said()


def wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_are_as_one_and_as_one_device(whole):
    results = np.load(whole.with_suffix(".npz"))
    for case in worker.CASES:
        eight, one = (
            worker.whole(worker.train(*case, jax.devices()[:n])) for n in (8, 1)
        )
        both = [results[f"{case}-{i}"] for i in range(len(eight))]
        print(case, off(both, eight), off(both, one))
        chex.assert_trees_all_close(both, eight, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(both, one, rtol=1e-5, atol=1e-5)


def off(actual, expected):
    """The greatest difference of any two numbers."""
    pairs = zip(actual, expected, strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("dense", sampled([False, True], False))
def test_a_scalar_c_is_on_every_device(dense):
    worker.train("compact_c", dense, jax.devices())


def test_processes_that_wait_for_nothing_end_and_say_for_whom(tmp_path, addresses):
    """Process 0 waits for 1, which is up, and 2; in another cluster 1 waits for 0."""
    command = [worker.PATH, "--deadline", 2, "--cpu-devices", 1, "--addresses"]
    clusters = [",".join(addresses), ",".join(addresses[:2])]
    host, port = addresses[1].split(":")
    with contextlib.ExitStack() as stack:
        stack.enter_context(socket.create_server((host, int(port)), reuse_port=True))
        processes = [
            stack.enter_context(
                start([*command, cluster, "--process-id", i], tmp_path / f"{i}.txt")
            )
            for i, cluster in enumerate(clusters)
        ]
        assert [process.wait(PATIENCE) for process in processes] == [1, 1]
    first, other = (process.said().splitlines()[-1] for process in processes)
    assert first.startswith(
        "Process 0 waited 2 s for the others, but process 2 at "
        f"{addresses[2]} is not up: refused (Connection refused)."
    )
    assert other.startswith(
        f"Process 1 waited 2 s for the coordinator (process 0) at {addresses[0]}, but "
        "it is not up: refused (Connection refused)."
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(1, STEPS), (KILLS, 15 * KILLS)])
@pytest.mark.timeout((2 + KILLS) * PATIENCE)
def test_a_run_that_loses_processes_ends_as_if_it_had_not(
    tmp_path, addresses, whole, kills, steps
):
    if steps != STEPS:
        whole = tmp_path / "whole"
        with pair(worker.PATH, addresses, whole, steps) as processes:
            end_well(*processes)
    folder = tmp_path / "cut"
    chance = random.Random(kills)
    for _ in range(kills):
        moment = last_step(folder) + chance.choice([0, 4, 8] if kills > 1 else [4])
        pause = chance.uniform(0, 0.5) if kills > 1 else 0
        lose_a_process(addresses, folder, steps, chance.randrange(2), moment, pause)
        assert last_step(folder) < steps

    done = last_step(folder)
    with pair(worker.PATH, addresses, folder, steps, late=True) as (first, other):
        end_well(first, other)
        assert f"Continuing after step {done}." in first.said()
    expected, actual = (worker.restore(run) for run in (whole, folder))
    assert expected[0] == actual[0] == steps
    chex.assert_trees_all_equal(expected[1], actual[1])
    on_four = worker.restore(folder, jax.devices()[:4])
    chex.assert_trees_all_equal(*map(jax.device_get, (on_four[1], actual[1])))


def lose_a_process(addresses, folder, steps, number, moment, pause):
    """Kills one of two processes some time after a step; the other must end too."""
    with pair(worker.PATH, addresses, folder, steps) as processes:
        wait_until(lambda: re.search("(?m)^(Starting|Continuing)", processes[0].said()))
        wait_until(lambda: last_step(folder) >= moment)
        time.sleep(pause)
        lost, other = processes[number], processes[1 - number]
        assert lost.poll() is other.poll() is None
        lost.send_signal(signal.SIGKILL)
        assert other.wait(PATIENCE) != 0
    print(number, last_step(folder), *re.findall(f".*(?:{LOST}).*", other.said())[:1])
    assert re.search(LOST, other.said()), other.said()
    # It must not blame the program for the loss.
    assert not re.search(DIFFER, other.said()), other.said()


def last_step(folder):
    """That of the last complete checkpoint, or 0."""
    complete = (path.name for path in folder.glob("*") if path.name.isdigit())
    return max(map(int, complete), default=0)


def test_the_example_says_how_its_processes_ended(monkeypatch, capfd):
    program = "import os, sys; sys.argv[-1] == '1' and os.kill(os.getpid(), 9)"
    monkeypatch.setattr(sys, "argv", ["-c", program])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert example.start_processes(2) == 1
    assert capfd.readouterr().err == "Process 1 ended with SIGKILL.\n"
