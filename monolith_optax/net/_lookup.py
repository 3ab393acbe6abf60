"""Host names to addresses, in a process of its own.

`getaddrinfo` cannot be interrupted. In a thread, a hung name server would hold on to
the thread and its sockets long after the caller has given up, and hold up the end of
the program. A process can be ended.
"""

import asyncio
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TypeAlias

SocketAddress: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]

# Seconds that the process may take to come up.
START_TIMEOUT = 10.0
_WORKER = Path(__file__).with_name("_lookup_worker.py")


def numeric_addresses(host: str) -> list[SocketAddress]:
    """What an IP address in any notation stands for; nothing for a name."""
    try:
        found = socket.getaddrinfo(
            host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        return []
    return [(family, place) for family, *_, place in found]


class NameLookup(asyncio.Protocol):
    """An asynchronous `getaddrinfo`; leaving its context ends lookups that hang."""

    def __init__(self) -> None:
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.Transport | None = None
        self._lost = asyncio.Event()
        self._unread = b""
        self._answers: dict[str, asyncio.Future[dict[str, Any]]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._end_process()
        if self._transport is not None:
            self._transport.abort()
            await self._lost.wait()

    async def __call__(self, name: str) -> list[SocketAddress]:
        """The addresses of a name, in the order in which to try them.

        Raises:
          OSError: there are none (`socket.gaierror`), or looking up failed.
        """
        if self._transport is None:
            await self.start()
        answer = await self._ask(name)
        return [
            (socket.AddressFamily(family), tuple(place))
            for family, place in answer["found"]
        ]

    async def start(self) -> None:
        """Waits until the process is up, so that its start counts in no timeout.

        Raises:
          OSError: the process cannot be started.
        """
        async with self._starting:
            if self._transport is None:
                await self._start()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def _start(self) -> None:
        self._end_process()  # one that ended by itself is still to be waited for
        if not sys.executable:
            raise FileNotFoundError(errno.ENOENT, "there is no Python to look up names")
        loop = asyncio.get_running_loop()
        up = self._answers[""] = loop.create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", os.fspath(_WORKER)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                await loop.create_unix_connection(lambda: self, sock=ours)
            except BaseException:
                ours.close()
                raise
        try:
            async with asyncio.timeout(START_TIMEOUT):
                _raise_error(await asyncio.shield(up))
        except TimeoutError:
            self._end_process()  # whoever asks it is told that it has ended

    async def _ask(self, name: str) -> dict[str, Any]:
        if name not in self._answers:
            self._answers[name] = asyncio.get_running_loop().create_future()
            if self._transport is not None:
                self._transport.write(json.dumps(name).encode() + b"\n")
        # Whoever gives up must not end the lookup for others who wait for it.
        answer = await asyncio.shield(self._answers[name])
        _raise_error(answer)
        return answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._lost.clear()

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for answer in map(json.loads, lines):
            self._answers.pop(answer.get("name", "")).set_result(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._unread = b""
        lost = {"oserror": [errno.EPIPE, "the process that looks up names has ended"]}
        for answer in self._answers.values():
            answer.set_result(lost)
        self._answers.clear()
        self._lost.set()


def _raise_error(answer: dict[str, Any]) -> None:
    if "gaierror" in answer:
        raise socket.gaierror(*answer["gaierror"])
    if "oserror" in answer:
        raise OSError(*answer["oserror"])
