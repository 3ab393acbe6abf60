"""Spread tables over processes: the bits of one process with as many devices."""

import socket
import subprocess
import sys

import numpy as np
import pytest
import spread_worker as worker


def run(count, file):
    """Trains in so many processes, with eight devices in all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, worker.__file__, address, str(count)]
    started = [
        subprocess.Popen([*command, str(number), str(file)]) for number in range(count)
    ]
    try:
        assert [process.wait(240) for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()
    return [*np.load(file).values()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_have_the_bits_of_one(tmp_path):
    one, two = (run(count, tmp_path / f"{count}.npz") for count in (1, 2))
    *exact, values = zip(one, two, strict=True)
    for actual, expected in exact:
        np.testing.assert_array_equal(actual, expected)
    # Gloo sums the loss over devices in another order.
    np.testing.assert_allclose(*values, rtol=1e-6)
