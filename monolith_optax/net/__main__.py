"""The node checker's command line: `monolith-net --help`."""

import argparse
import asyncio
import contextlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import monolith_optax
from monolith_optax import _console
from monolith_optax.net import _output
from monolith_optax.net._cluster import (
    coordinator_addresses,
    read_addresses,
    tf_config_addresses,
)
from monolith_optax.net._report import NodesDownError
from monolith_optax.net._round import check_nodes
from monolith_optax.net._watch import wait_for_nodes, watch_nodes

ALL_UP, SOME_DOWN = 0, 1  # the others are those of all command lines
EXIT_STATUS = (
    "Exit status: 0 all nodes are up, 1 some are down, 2 bad usage, 3 the checker "
    "itself failed, 130 interrupted, 143 terminated."
)


def program() -> NoReturn:
    """Runs the command line as a program."""
    _console.program(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _parser()
    return _console.status_of(parser.prog, lambda: _run(parser, argv))


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    try:
        addresses = _addresses(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    command = _watch if args.command == "watch" else _check
    return asyncio.run(command(addresses, args))


def _parser() -> argparse.ArgumentParser:
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
        type=_seconds,
        default=1.0,
        metavar="SECONDS",
        help="how long a probe may take (default: 1)",
    )
    common.add_argument(
        "--json", action="store_true", help="print one JSON object on each line"
    )

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
        "check", parents=[common], help="probe every node", epilog=EXIT_STATUS
    )
    check.add_argument(
        "--wait",
        type=_seconds,
        metavar="SECONDS",
        help="probe until all nodes are up, but no longer than this",
    )
    check.add_argument(
        "--quiet", action="store_true", help="print nothing: the exit status tells"
    )
    watch = commands.add_parser(
        "watch",
        parents=[common],
        help="say when a node goes up or down",
        epilog=EXIT_STATUS,
    )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="from one round of probes to the next (default: 5)",
    )
    watch.add_argument(
        "--failure-threshold",
        type=_count,
        default=3,
        metavar="N",
        help="a node is down after N failed probes in a row (default: 3)",
    )
    watch.add_argument(
        "--success-threshold",
        type=_count,
        default=1,
        metavar="N",
        help="a node is up after N successful probes in a row (default: 1)",
    )
    return parser


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} must be a positive number of seconds")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (count := int(text)) >= 1:
            return count
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")


def _addresses(args: argparse.Namespace) -> list[str]:
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
    return addresses


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


async def _check(addresses: list[str], args: argparse.Namespace) -> int:
    if args.wait is None:
        report = await check_nodes(addresses, timeout=args.timeout)
    else:
        with contextlib.ExitStack() as stack:
            show = None if args.quiet else stack.enter_context(_output.progress())
            try:
                report = await wait_for_nodes(
                    addresses,
                    deadline=args.wait,
                    timeout=args.timeout,
                    on_progress=show,
                )
            except NodesDownError as error:
                report = error.report
    if not args.quiet:
        _output.print_report(report, as_json=args.json)
    return ALL_UP if report.all_alive else SOME_DOWN


async def _watch(addresses: list[str], args: argparse.Namespace) -> int:
    transitions = watch_nodes(
        addresses,
        interval=args.interval,
        failure_threshold=args.failure_threshold,
        success_threshold=args.success_threshold,
        timeout=args.timeout,
    )
    async with contextlib.aclosing(transitions):
        async for transition in transitions:
            _output.print_transition(transition, as_json=args.json)
    return ALL_UP


if __name__ == "__main__":
    program()
