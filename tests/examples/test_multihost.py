"""Training across real processes: the same numbers, and what happens when one is lost.

All of them run on this machine and talk over loopback alone.
"""

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

from monolith_optax import lazy_rows

HEARTBEAT = 5
# What the runtime may take beyond the heartbeat timeout, on a busy machine too.
SLACK = 15


@pytest.fixture
def address():
    """A coordinator's address: bound to the end, so that nobody else gets the port."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{reserved.getsockname()[1]}"


@pytest.fixture
def start(tmp_path, address):
    """Starts one process of a cluster; its output goes to a file."""
    processes = []

    def start_one(script, process_id, *options, num_processes=2):
        output = tmp_path / f"output-{len(processes)}.txt"
        command = [sys.executable, script, "--coordinator", address]
        command += ["--process-id", process_id, "--num-processes", num_processes]
        command += ["--cpu-devices", 8 // num_processes]
        command += ["--heartbeat-timeout", HEARTBEAT, *options]
        with output.open("w") as file:
            process = subprocess.Popen(
                list(map(str, command)), stdout=file, stderr=subprocess.STDOUT
            )
        process.output = output
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        process.kill()
        process.wait()


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def ended_well(process):
    assert process.wait(90) == 0, process.output.read_text()


def test_two_processes_are_as_one_and_as_one_device(tmp_path, start):
    pair = [start(worker.__file__, i, "--folder", tmp_path) for i in range(2)]
    here = {
        (*case, n): worker.whole(worker.train(*case, jax.devices()[:n]))
        for case in worker.CASES
        for n in (8, 1)
    }
    for process in pair:
        ended_well(process)
    results = np.load(tmp_path / "results.npz")
    for case in worker.CASES:
        expected = here[*case, 8]
        both = [results[f"{case}-{i}"] for i in range(len(expected))]
        print(case, off(both, expected), off(both, here[*case, 1]))
        chex.assert_trees_all_close(both, expected, rtol=1e-6, atol=1e-6)
        chex.assert_trees_all_close(both, here[*case, 1], rtol=1e-5, atol=1e-5)


def off(actual, expected):
    """The greatest difference of any two numbers."""
    pairs = zip(actual, expected, strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize("dense", [False, True])
def test_a_scalar_c_is_on_every_device(dense):
    worker.train("compact_c", dense, jax.devices())


def test_processes_whose_coordinator_is_down_end_and_say_so(start, address):
    deadline = 2
    options = ("--deadline", deadline)
    both = [start(worker.PATH, i, *options, num_processes=3) for i in (1, 2)]
    waiting = {}
    while len(waiting) < 2 or any(process.poll() is None for process in both):
        now = time.monotonic()
        for process in both:
            if process not in waiting and process.output.read_text():
                waiting[process] = now
            if process.poll() is None and process in waiting:
                assert now < waiting[process] + deadline + 2
        time.sleep(0.02)
    for number, process in enumerate(both, start=1):
        assert process.returncode == 1
        *_, message = process.output.read_text().splitlines()
        assert message.startswith(
            f"Process {number} waited 2 s for the coordinator (process 0) at "
            f"{address}, but it is not up: refused (Connection refused)."
        )


def test_a_run_that_lost_a_process_ends_where_it_would_have(tmp_path, start):
    options = ["--dim", "4", "--batch-size", "16", "--steps", "20"]
    options += ["--checkpoint-every", "4", "--plot", tmp_path / "loss.png"]

    def begin(process_id, folder):
        folder = tmp_path / folder
        return start(worker.PATH, process_id, *options, "--checkpoint-dir", folder)

    # The coordinator is late.
    other = begin(1, "whole")
    wait_until(lambda: "waits for" in other.output.read_text())
    time.sleep(1)
    first = begin(0, "whole")
    ended_well(first)
    ended_well(other)
    assert "loss=" in first.output.read_text()
    assert "loss=" not in other.output.read_text()

    # Killed in the middle.
    first, other = (begin(i, "cut") for i in range(2))
    wait_until((tmp_path / "cut" / "8").exists)
    other.send_signal(signal.SIGKILL)
    first.wait(HEARTBEAT + SLACK)
    assert first.returncode not in (0, None)
    output = first.output.read_text()
    assert re.search(r"(sending heartbeats\):\s+|Task )(/job:\S+/task:)?1\s", output)
    assert not (tmp_path / "cut" / "20").exists()

    again = [begin(i, "cut") for i in range(2)]
    for process in again:
        ended_well(process)
    assert "Going on after step" in again[0].output.read_text()
    chex.assert_trees_all_equal(final(tmp_path / "whole"), final(tmp_path / "cut"))


def final(folder):
    """The last checkpoint, read in this process: the shards go to other devices."""
    mesh = worker.mesh_of(jax.devices())
    make, rate = worker.example.OPTIMIZERS["adamom"]
    tx = lazy_rows(make(rate))
    like = worker.example.carry_like(tx, worker.init, mesh)
    saved = worker.example.open_checkpoints(folder, 1)
    done, carry = worker.example.first_carry(tx, worker.init, like, saved)
    saved.close()
    assert done == 20
    worker.check_shards(carry, 8)
    return worker.whole(carry)
