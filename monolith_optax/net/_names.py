"""Host names to IP addresses, in a separate process.

`getaddrinfo` cannot be interrupted. In a thread, a name server that hangs would keep
the thread and its sockets long after the caller has given up, and delay the end of the
program. A process can be killed.
"""

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self, TypeAlias

# What `socket.connect` takes, with the family that it belongs to.
SocketAddress: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]

# Seconds that the process may take to start.
START_TIMEOUT = 10.0
# The longest answer, in bytes. Name servers send 64 KiB at most.
LONGEST_ANSWER = 2**24
_WORKER = Path(__file__).with_name("_names_worker.py")
_STARTED = ""  # the process says so by answering a name that was not asked for


def numeric_addresses(host: str, port: int = 0) -> list[SocketAddress]:
    """The socket address of an IP address in any notation; nothing for a name."""
    for family, rest in ((socket.AF_INET, ()), (socket.AF_INET6, (0, 0))):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)  # knows the usual notations only, but fast
            return [(family, (host, port, *rest))]
    try:
        found = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        return []
    return [(family, sockaddr) for family, *_, sockaddr in found]


class NameLookup:
    """An asynchronous `getaddrinfo`; leaving its context ends lookups that hang."""

    def __init__(self) -> None:
        self._starting = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        # Each ends in an answer, or in the error that prevented one.
        self._answers: dict[str, asyncio.Future[dict[str, Any] | Exception]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._reading is not None:
            await self._reading
            self._reading = None

    async def __call__(self, name: str) -> list[SocketAddress]:
        """The addresses of a name, in the order in which to try them.

        Raises:
          OSError: there are none (`socket.gaierror`), or the lookup failed.
        """
        if self._failure is not None:
            raise self._failure
        if self._writer is None:
            await self.start()
        answer = await self._ask(name)
        if "gaierror" in answer:
            raise socket.gaierror(*answer["gaierror"])
        if "fault" in answer:
            raise RuntimeError(f"Looking up {name!r} failed: {answer['fault']}")
        return [
            (socket.AddressFamily(family), tuple(sockaddr))
            for family, sockaddr in answer["found"]
        ]

    async def start(self) -> None:
        """Waits until the process is up, so that its start counts in no timeout.

        Where it fails, so does every lookup until the next call.

        Raises:
          OSError: the process cannot be started.
        """
        async with self._starting:
            if self._writer is not None:
                return
            self._failure = None
            try:
                await self._start()
            except Exception as error:
                self._failure = error
                raise

    async def _start(self) -> None:
        await self.__aexit__()  # a process that ended by itself
        if not sys.executable:
            raise FileNotFoundError(errno.ENOENT, "there is no Python to look up names")
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", os.fspath(_WORKER)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                reader, self._writer = await asyncio.open_unix_connection(
                    sock=ours, limit=LONGEST_ANSWER
                )
            except BaseException:
                ours.close()
                raise
        self._reading = asyncio.create_task(self._read(reader, self._writer))
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._ask(_STARTED)
        except TimeoutError as error:
            await self.__aexit__()
            raise ChildProcessError(
                errno.ECHILD, "the process that looks up names did not start"
            ) from error

    async def _ask(self, name: str) -> dict[str, Any]:
        if self._writer is None:
            raise _ended()
        if name not in self._answers:
            self._answers[name] = asyncio.get_running_loop().create_future()
            if name != _STARTED:
                self._writer.write(json.dumps(name).encode() + b"\n")
        # Whoever gives up must not end the lookup for others who wait for it.
        answer = await asyncio.shield(self._answers[name])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Hands out answers until the process ends; whoever still waits learns why."""
        end: Exception = _ended()
        try:
            async for line in reader:
                answer = json.loads(line)
                self._answers.pop(answer["name"]).set_result(answer)
        except OSError:
            pass  # it was killed before it had read everything
        except Exception as fault:  # our own, which must not pass for an answer
            end = self._failure = fault
        self._writer = None
        for waiting in self._answers.values():
            waiting.set_result(end)
        self._answers.clear()
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _ended() -> OSError:
    return BrokenPipeError(errno.EPIPE, "the process that looks up names has ended")
