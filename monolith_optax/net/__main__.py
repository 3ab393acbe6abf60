"""The node checker's command line: `python -m monolith_optax.net --help`."""

import argparse
import asyncio
import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monolith_optax.net._check import check_nodes
from monolith_optax.net._cluster import (
    coordinator_addresses,
    read_addresses,
    tf_config_addresses,
)
from monolith_optax.net._probe import NodeStatus
from monolith_optax.net._report import NodeReport, NodesDownError, Transition
from monolith_optax.net._watch import wait_for_nodes, watch_nodes

ALL_UP, SOME_DOWN, BAD_USAGE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        addresses = _addresses(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not addresses:
        parser.error("no addresses: give ADDR, --file, --tf-config or --coordinator")
    command = _watch if args.command == "watch" else _check
    try:
        return asyncio.run(command(addresses, args))
    except ValueError as error:  # an option out of its range
        parser.error(str(error))
    except BrokenPipeError:
        # Nobody reads on: end quietly, also when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    where = common.add_argument_group("addresses, from all of these together")
    where.add_argument("addresses", metavar="ADDR", nargs="*", help="host:port")
    where.add_argument("--file", help="a file with one address a line; - is stdin")
    where.add_argument(
        "--tf-config", action="store_true", help="the cluster in $TF_CONFIG"
    )
    where.add_argument(
        "--roles", metavar="ROLE,...", help="its roles; default: chief,ps,worker"
    )
    where.add_argument(
        "--coordinator", action="store_true", help="$JAX_COORDINATOR_ADDRESS"
    )
    common.add_argument(
        "--timeout",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="for each probe (default: 1)",
    )
    common.add_argument(
        "--json", action="store_true", help="print a JSON object a line"
    )

    parser = argparse.ArgumentParser(
        prog="python -m monolith_optax.net",
        description="Tells which nodes of a cluster are up, and why others are not.",
        epilog="Exit status: 0 all are up, 1 some are down, 2 bad usage, 3 failure.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", parents=[common], help="probe every node", epilog=parser.epilog
    )
    check.add_argument(
        "--wait",
        type=float,
        metavar="SECONDS",
        help="until all are up, so long at most",
    )
    watch = commands.add_parser(
        "watch", parents=[common], help="tell when a node goes up or down"
    )
    watch.add_argument("--interval", type=float, default=5.0, metavar="SECONDS")
    watch.add_argument("--failure-threshold", type=int, default=3, metavar="N")
    watch.add_argument("--success-threshold", type=int, default=1, metavar="N")
    return parser


def _addresses(args: argparse.Namespace) -> list[str]:
    addresses = list(args.addresses)
    if args.file:
        path = "/dev/stdin" if args.file == "-" else args.file
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error}") from error
        addresses += read_addresses(text.splitlines())
    if args.roles and not args.tf_config:
        raise ValueError("--roles chooses from --tf-config, which is not given.")
    if args.tf_config:
        roles = args.roles.replace(",", " ").split() if args.roles else None
        addresses += tf_config_addresses(roles=roles)
    if args.coordinator:
        addresses += coordinator_addresses()
    return addresses


async def _check(addresses: list[str], args: argparse.Namespace) -> int:
    if args.wait is None:
        report = await check_nodes(addresses, timeout=args.timeout)
    else:
        try:
            report = await wait_for_nodes(
                addresses,
                deadline=args.wait,
                timeout=args.timeout,
                on_progress=_show_progress,
            )
        except NodesDownError as error:
            report = error.report
    if args.json:
        for status in report.results:
            _print_json(_as_json(status))
    else:
        _print_table(report)
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
            _print_transition(transition, as_json=args.json)
    return ALL_UP


def _show_progress(report: NodeReport) -> None:
    if not report.all_alive:
        print(str(report).partition("\n")[0], file=sys.stderr)


def _print_table(report: NodeReport) -> None:
    width = max(len(status.address) for status in report.results)
    for status in report.results:
        state = "up" if status.alive else "DOWN"
        detail = status.reason and f"{status.reason}: {status.message}"
        line = f"{status.address:{width}}  {state:4}  {status.latency * 1e3:8.1f} ms"
        print(f"{line}  {detail}" if detail else line)
    print(f"{len(report.alive)} of {len(report.results)} nodes are up")


def _print_transition(transition: Transition, *, as_json: bool) -> None:
    now = dt.datetime.now().astimezone().isoformat(timespec="milliseconds")
    if as_json:
        _print_json({"time": now} | _as_json(transition.status))
    else:
        status = transition.status
        detail = f"  {status.reason}: {status.message}" if status.reason else ""
        state = "up" if transition.alive else "DOWN"
        print(f"{now}  {transition.address}  {state}{detail}", flush=True)


def _as_json(status: NodeStatus) -> dict[str, Any]:
    return {
        "address": status.address,
        "alive": status.alive,
        "latency": round(status.latency, 6),
        "reason": status.reason,
        "message": status.message,
    }


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    sys.exit(main())
