"""run_ahead: order, depth, errors, and an end in every case."""

import subprocess
import sys
import threading
import time

import pytest

from monolith_optax._ids.run_ahead import run_ahead


def threads():
    return [t for t in threading.enumerate() if t.name == "run_ahead"]


@pytest.mark.parametrize("depth", [1, 2, 7, 100])
def test_order_and_depth(depth):
    made = []

    def source():
        for number in range(50):
            made.append(number)
            yield number

    for number, item in enumerate(run_ahead(source(), depth)):
        assert item == number
        assert len(made) <= number + 1 + depth
        if number % 10 == 0:  # it does run ahead
            ready = min(50, number + 1 + depth)
            until = time.monotonic() + 60
            while len(made) < ready and time.monotonic() < until:
                time.sleep(0.001)
            assert len(made) == ready
    assert number == 49
    assert not threads()


def test_an_error_comes_in_the_place_of_its_item():
    def source():
        yield 1
        yield 2
        raise KeyError("three")

    items = run_ahead(source(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(items)
    assert not threads()


def test_stops_and_closes_with_the_loop():
    closed = threading.Event()

    def source():
        try:
            yield from range(1_000)
        finally:
            closed.set()

    for item in run_ahead(source(), 3):
        if item == 4:
            break
    assert closed.is_set()
    assert not threads()


CTRL_C = """
import os, signal, threading, time
from monolith_optax._ids.run_ahead import run_ahead

trained = threading.Event()

def source():
    try:
        yield 1
        trained.wait()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # while the loop waits
        yield 2
    finally:
        print("closed")

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    for item in run_ahead(source(), 3):
        print(item)
        trained.set()
except KeyboardInterrupt:
    print(threading.active_count(), "thread")
"""


def test_ctrl_c_ends_the_thread():
    command = [sys.executable, "-c", CTRL_C]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == ["1", "closed", "1 thread", ""]
    assert result.stderr == ""
