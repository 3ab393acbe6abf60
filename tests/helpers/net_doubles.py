"""A clock that jumps, and nodes that need no network."""

import asyncio
import errno
import math
import os
import selectors
import socket
from typing import NamedTuple


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the clock to the next timer instead of waiting for it."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def select(self, timeout=None):
        events = super().select(0)
        if not events:
            assert timeout is not None, "everything waits for nothing"
            self.clock.now += timeout + self.clock.lateness if timeout > 0 else 0
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """`lateness`: seconds by which every wait lasts too long, as on a busy machine."""

    def __init__(self, lateness):
        self.now, self.lateness = 0.0, lateness
        super().__init__(_JumpingSelector(self))

    def time(self):
        return self.now


def run_virtually(coroutine, lateness=0.0):
    """Runs a coroutine on a virtual clock; returns its result and the seconds."""
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(lateness)) as runner:
        result = runner.run(coroutine)
        return result, runner.get_loop().time()


class Late(NamedTuple):
    """Fails, and not at once."""

    seconds: float
    number: int


class Nodes:
    """A connector to made-up nodes, named by host.

    Each host has a behaviour, or a function from the time to one: a number is the
    seconds after which it answers, an errno how it fails, None silence.
    """

    def __init__(self, **behaviours):
        self.behaviours = behaviours
        self.probes = []  # (host, time) of each
        self.running = []
        self.most_running = 0

    async def __call__(self, host, _):
        now = asyncio.get_running_loop().time()
        assert host not in self.running, "two probes of one node at a time"
        self.probes.append((host, now))
        self.running.append(host)
        self.most_running = max(self.most_running, len(self.running))
        try:
            await self.behave(self.behaviours[host], now)
        finally:
            self.running.remove(host)

    async def behave(self, behaviour, now):
        if callable(behaviour):
            behaviour = behaviour(now)
        match behaviour:
            case None:
                await asyncio.Event().wait()
            case float():
                await asyncio.sleep(behaviour)
            case Late(seconds, number):
                await asyncio.sleep(seconds)
                raise OSError(number, os.strerror(number))
            case int():
                raise OSError(behaviour, os.strerror(behaviour))
            case Exception():
                raise behaviour


class Addresses:
    """A name of made-up IP addresses: a stand-in for `_connect.attempt` and a lookup.

    Each address has a behaviour, as those of `Nodes`.
    """

    def __init__(self, behaviours, lookup_seconds=0.0):
        self.behaviours = behaviours
        self.lookup_seconds = lookup_seconds
        self.attempts = []  # (socket address, time) of each
        self.running = 0
        self.most_running = 0

    async def lookup(self, _):
        await asyncio.sleep(self.lookup_seconds)
        return [
            (socket.AF_INET6, (ip, 9, 0, 0)) if ":" in ip else (socket.AF_INET, (ip, 9))
            for ip in self.behaviours
        ]

    def attempt(self, address, timeout=math.inf):
        assert timeout == math.inf
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        outcome.add_done_callback(self.end)
        self.attempts.append((address[1], loop.time()))
        self.running += 1
        self.most_running = max(self.most_running, self.running)

        def settle(error=None):
            if not outcome.done():
                outcome.set_result(error)

        match self.behaviours[address[1][0]]:
            case float(seconds):
                loop.call_later(seconds, settle)
            case Late(seconds, number):
                loop.call_later(seconds, settle, OSError(number, os.strerror(number)))
            case int(number):
                settle(OSError(number, os.strerror(number)))
        return outcome

    def end(self, _):
        self.running -= 1


REFUSED = errno.ECONNREFUSED
