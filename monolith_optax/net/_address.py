"""Addresses: Monolith's helpers, and a strict parser of `host:port`."""

import enum
import ipaddress
import re
import socket
from typing import Any, NamedTuple

from monolith_optax._public import public


@public("monolith_optax.net")
class AddressFamily(enum.StrEnum):
    """The families of addresses, under Monolith's names."""

    IPV4 = "ipv4"
    IPV6 = "ipv6"


@public("monolith_optax.net")
class Address(NamedTuple):
    """A host, as a name or an IP address without brackets, and a port."""

    host: str
    port: int


def is_ipv6_address(ip: str) -> bool:
    """Whether `ip` is an IPv6 address; a scope such as `%eth0` may follow.

    Example:
      >>> is_ipv6_address("::1"), is_ipv6_address("127.0.0.1")
      (True, False)
    """
    try:
        return ipaddress.ip_address(ip).version == 6
    except ValueError:
        return False


def concat_ip_and_port(ip: str, port: int) -> str:
    """Joins a host and a port, with brackets around an IPv6 address.

    Example:
      >>> concat_ip_and_port("localhost", 10), concat_ip_and_port("::1", 10)
      ('localhost:10', '[::1]:10')
    """
    return f"[{ip}]:{port}" if is_ipv6_address(ip) else f"{ip}:{port}"


def get_local_ip() -> str:
    """The first IP address of this machine's own host name.

    Raises:
      OSError: the name has no address.
    """
    name = socket.gethostname()
    try:
        return str(socket.getaddrinfo(name, None)[0][4][0])
    except socket.gaierror:
        return str(socket.getaddrinfo(name, None, family=socket.AF_INET6)[0][4][0])


def is_ipv4_supported() -> bool:
    """Whether the first IP address of this machine's own host name is IPv4."""
    return not is_ipv6_address(get_local_ip())


def get_local_server_addr(port: int) -> str:
    """The address under which other nodes reach `port` of this machine."""
    return concat_ip_and_port(get_local_ip(), port)


def parse_address(text: Any) -> Address:
    """Splits `host:port`, `[v6]:port` or `[v6%scope]:port`.

    The host may be a name, an IPv4 address (also a short one such as `127.1`) or an
    IPv6 address. An IPv6 address must be in brackets, because `::1:8086` may be
    `[::1]:8086` or an address without a port. Any other IP address may be.

    Args:
      text: the address. Anything that is not a string is refused.

    Raises:
      ValueError: text is not of that form.

    Example:
      >>> parse_address("[fe80::1%eth0]:8476")
      Address(host='fe80::1%eth0', port=8476)
    """
    if not isinstance(text, str):
        raise ValueError(f"An address must be a string, but it is {text!r}.")
    host, colon, port = text.rpartition(":")
    if not colon or _is_bracketed_ip(text):
        written = "host" if not colon else text
        raise ValueError(f"{text!r} has no port: write {written}:port.")
    _refuse_without_brackets(text, host, port)
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} must end in a port from 1 to 65535, not {port!r}.")
    if _is_bracketed_ip(host):
        return Address(host[1:-1], int(port))
    if _is_name(host):
        return Address(host, int(port))
    raise ValueError(
        f"{text!r} must begin with a host name or IP address, not {host!r}."
    )


def _refuse_without_brackets(text: str, host: str, port: str) -> None:
    """Refuses IPv6 addresses without brackets."""
    meanings = []
    if ":" in host and _is_ip(host):
        meanings.append(f"[{host}]:{port}")
    if _is_ip(text):
        meanings.append(f"[{text}]:port")
    if meanings:
        raise ValueError(
            f"{text!r} has an IPv6 address that must be in brackets: write "
            f"{' or '.join(meanings)}."
        )


def _is_bracketed_ip(host: str) -> bool:
    return re.fullmatch(r"\[.*\]", host) is not None and _is_ip(host[1:-1])


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    _, percent, scope = host.partition("%")
    return not percent or re.fullmatch("[A-Za-z0-9_.-]{1,15}", scope) is not None


def _is_name(host: str) -> bool:
    """Whether `host` could be a host name or an IPv4 address in any notation."""
    if not re.fullmatch(r"[\w.-]{1,253}", host):
        return False
    try:
        host.encode("idna")  # refuses empty labels and labels that are too long
    except UnicodeError:
        return False
    return True
