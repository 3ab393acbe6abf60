"""The options of `monolith-net`."""

import argparse
import contextlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import monolith_optax
from monolith_optax.net._address import parse_address
from monolith_optax.net._cluster import (
    coordinator_addresses,
    read_addresses,
    tf_config_addresses,
)
from monolith_optax.net._http import HttpConnector

EXIT_STATUS = (
    "Exit status: 0 all nodes are up, 1 some are down, 2 bad usage, 3 the checker "
    "itself failed, 130 interrupted, 143 terminated."
)
WAIT_STATUS = (
    "Exit status: COMMAND's own, or 0 without one; 1 too few nodes by the deadline, "
    "2 bad usage, 3 the checker itself failed, 130 interrupted, 143 terminated."
)
_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def parser() -> argparse.ArgumentParser:
    """Parses everything but the command that follows `--`."""
    common = _common()
    parser = argparse.ArgumentParser(
        prog="monolith-net",
        description="Says which nodes of a cluster are up, and why the others are not.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"monolith_optax {monolith_optax.__version__}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", parents=[common], help="probe every node once", epilog=EXIT_STATUS
    )
    _add_quiet(check)
    wait = commands.add_parser(
        "wait",
        parents=[common],
        help="wait until nodes are up, then run a command",
        usage="%(prog)s [OPTION ...] [ADDR ...] [-- COMMAND ...]",
        description="Waits until all nodes are up. Standard error says who is missing "
        "whenever that changes. Then COMMAND, if any, takes the place of this program.",
        epilog=WAIT_STATUS,
    )
    _add_quiet(wait)
    _add_wait(wait)
    watch = commands.add_parser(
        "watch",
        parents=[common],
        help="say when a node goes up or down",
        epilog=EXIT_STATUS,
    )
    _add_watch(watch)
    return parser


def split_command(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What is before `--`, and what is to be run afterwards."""
    if argv[:1] == ["wait"] and "--" in argv:
        at = argv.index("--")
        return argv[:at], argv[at + 1 :]
    return argv, []


def addresses_of(args: argparse.Namespace) -> list[str]:
    """The addresses from all sources that were given.

    Raises:
      ValueError: there are none, or they can never be up because one is malformed.
      OSError: a file cannot be read.
    """
    addresses = list(args.addresses)
    if args.file:
        addresses += read_addresses(_text_of(args.file).splitlines())
    if args.roles and not args.tf_config:
        raise ValueError("--roles chooses from --tf-config, which is not given.")
    if args.tf_config:
        roles = args.roles.replace(",", " ").split() if args.roles else None
        addresses += tf_config_addresses(roles=roles)
    if args.coordinator:
        addresses += coordinator_addresses()
    if not addresses:
        raise ValueError(
            "no addresses: give ADDR, --file, --tf-config or --coordinator"
        )
    if args.command != "check":  # which reports them
        for address in addresses:
            parse_address(address)
    return addresses


def _common() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_argument_group("addresses, from all of these together")
    where.add_argument("addresses", metavar="ADDR", nargs="*", help="host:port")
    where.add_argument(
        "--file", help="a file with one address on each line; - is standard input"
    )
    where.add_argument(
        "--tf-config",
        action="store_true",
        help="all nodes of the cluster in $TF_CONFIG",
    )
    where.add_argument(
        "--roles", metavar="ROLE,...", help="only the nodes with these roles"
    )
    where.add_argument(
        "--coordinator", action="store_true", help="$JAX_COORDINATOR_ADDRESS"
    )
    common.add_argument(
        "--timeout",
        type=_time,
        default=1.0,
        metavar="TIME",
        help="how long a probe may take, such as 0.5, 500ms or 1m (default: 1s)",
    )
    common.add_argument(
        "--http",
        type=_http,
        metavar="PATH",
        help="a node is up if it answers HTTP's GET PATH with a status of 2xx "
        "(default: if its port is open)",
    )
    common.add_argument(
        "--json", action="store_true", help="print one JSON object on each line"
    )
    return common


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing: only set the exit status"
    )


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deadline",
        type=_deadline,
        default=300.0,
        metavar="TIME",
        help="give up after this time; inf: never; 0: after one probe of each node "
        "(default: 5m)",
    )
    parser.add_argument(
        "--interval",
        type=_time,
        metavar="TIME",
        help="from one round of probes to the next (default: grows from 0.1s to 5s)",
    )
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument(
        "--any",
        action="store_const",
        const=1,
        dest="count",
        help="wait for one node only",
    )
    how_many.add_argument(
        "-n", type=_count, metavar="K", dest="count", help="wait for K nodes only"
    )
    parser.add_argument(
        "--down",
        action="store_true",
        help="wait until nothing answers at these addresses any more",
    )


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--interval",
        type=_time,
        default=5.0,
        metavar="TIME",
        help="from one round of probes to the next (default: 5s)",
    )
    parser.add_argument(
        "--failure-threshold",
        type=_count,
        default=3,
        metavar="N",
        help="a node is down after N failed probes in a row (default: 3)",
    )
    parser.add_argument(
        "--success-threshold",
        type=_count,
        default=1,
        metavar="N",
        help="a node is up after N successful probes in a row (default: 1)",
    )


def _time(text: str) -> float:
    seconds = _seconds(text)
    if 0 < seconds < math.inf:
        return seconds
    raise argparse.ArgumentTypeError(
        f"{text!r} must be a positive time, such as 30, 0.5s or 5m"
    )


def _deadline(text: str) -> float:
    seconds = math.inf if text == "inf" else _seconds(text)
    if seconds >= 0:
        return seconds
    raise argparse.ArgumentTypeError(
        f"{text!r} must be a time, such as 30, 0.5s, 5m, 0 or inf"
    )


def _seconds(text: str) -> float:
    """The seconds in a number with a unit; not a number if it is not one."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+|[0-9]+\.)(ms|s|m|h|)", text)
    return float(match[1]) * _UNITS[match[2]] if match else math.nan


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (count := int(text)) >= 1:
            return count
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")


def _http(text: str) -> HttpConnector:
    try:
        return HttpConnector(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _text_of(file: str) -> str:
    # Standard input may be a socket, which has no name that could be opened.
    with (
        os.fdopen(0, "rb", closefd=False) if file == "-" else Path(file).open("rb")
    ) as opened:
        content = opened.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8: {error}") from error
