"""A probe that also asks for a page over HTTP."""

import asyncio
import re
import socket

from monolith_optax._public import public
from monolith_optax.net._address import Address, concat_ip_and_port
from monolith_optax.net._connect import TcpConnector
from monolith_optax.net._names import SocketAddress
from monolith_optax.net._reason import UnhealthyError

# A status line, of any HTTP that runs over TCP in plain text.
_STATUS_LINE = re.compile(rb"HTTP/[0-9.]+ ([0-9]{3})(?: ([^\r\n]*))?\r?\n")
_LONGEST_LINE = 2**12


@public("monolith_optax.net")
class HttpConnector(TcpConnector):
    """Opens a TCP connection, closes it, and asks for a path over HTTP on a second one.

    A node is alive if the answer has a status of 2xx. Redirections are not followed.

    Args:
      path: what to ask for, such as `/healthz`.

    Raises:
      ValueError: path does not begin with `/`, or has other than printable ASCII
        characters.

    Example:
      >>> import asyncio
      >>> from monolith_optax.net import HttpConnector, check_nodes
      >>> async def healthy(addresses):
      ...     async with HttpConnector("/healthz") as connector:
      ...         return (await check_nodes(addresses, connector=connector)).alive
      >>> asyncio.run(healthy(["127.0.0.1:1"]))
      []
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        if not re.fullmatch("/[!-~]*", path):
            raise ValueError(
                "The path of an HTTP request must begin with / and have only "
                f"printable ASCII characters without spaces, but it is {path!r}."
            )
        self._path = path

    async def connect(
        self,
        address: Address,
        found: list[SocketAddress],
        end: float,
        sockets: asyncio.Semaphore,
    ) -> SocketAddress:
        """Connects, and raises an `UnhealthyError` unless the answer has status 2xx."""
        answered = await super().connect(address, found, end, sockets)
        line = await self._status_line(address, answered)
        if not (match := _STATUS_LINE.fullmatch(line)):
            raise UnhealthyError(f"what listens does not speak HTTP: {line[:40]!r}")
        if not match[1].startswith(b"2"):
            status = b" ".join(filter(None, match.groups())).decode("latin-1")
            raise UnhealthyError(f"HTTP status {status}")
        return answered

    async def _status_line(self, address: Address, answered: SocketAddress) -> bytes:
        host = address.host.partition("%")[0].encode("idna").decode()
        request = (
            f"GET {self._path} HTTP/1.1\r\n"
            f"Host: {concat_ip_and_port(host, address.port)}\r\n"
            "User-Agent: monolith-net\r\nAccept: */*\r\nConnection: close\r\n\r\n"
        )
        family, sockaddr = answered
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(connection, sockaddr)
            try:
                await loop.sock_sendall(connection, request.encode("ascii"))
                return await _line(connection)
            except ConnectionError as error:
                raise UnhealthyError("what listens closed the connection") from error


async def _line(connection: socket.socket) -> bytes:
    """The first line of what arrives, or what there is of it."""
    loop, line = asyncio.get_running_loop(), b""
    while b"\n" not in line and len(line) < _LONGEST_LINE:
        piece = await loop.sock_recv(connection, _LONGEST_LINE)
        if not piece:
            break
        line += piece
    return line[: line.find(b"\n") + 1] or line
