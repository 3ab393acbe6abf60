"""The node checker's command line: `monolith-net --help`."""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from monolith_optax import _console
from monolith_optax.net import _output
from monolith_optax.net._arguments import targets_of
from monolith_optax.net._command_line import addresses_of, parser, split_command
from monolith_optax.net._connect import TcpConnector
from monolith_optax.net._round import check_nodes
from monolith_optax.net._wait import Goal, wait
from monolith_optax.net._watch import watch_nodes

ALL_UP, SOME_DOWN = 0, 1  # all command lines share the others


def program() -> NoReturn:
    """Runs the command line as a program."""
    _console.program(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = parser()
    return _console.status_of(
        options.prog, lambda: _run(options, sys.argv[1:] if argv is None else argv)
    )


def _run(options: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    argv, command = split_command(argv)
    args = options.parse_args(argv)
    try:
        addresses = addresses_of(args)
        if args.command == "wait":
            _check_wait(addresses, args, command)
    except (OSError, ValueError) as error:
        options.error(str(error))
    run = {"check": _check, "wait": _wait, "watch": _watch}[args.command]
    status = _console.run(run(addresses, args))
    if command and status == ALL_UP:
        os.execvp(command[0], list(command))
    return status


def _check_wait(
    addresses: Sequence[str], args: argparse.Namespace, command: Sequence[str]
) -> None:
    """Nobody should wait first and learn then that the command does not exist."""
    distinct = len(set(addresses))
    if args.count and args.count > distinct:
        raise ValueError(f"-n asks for {args.count} nodes, but there are {distinct}.")
    if command and shutil.which(command[0]) is None:
        raise FileNotFoundError(f"There is no program {command[0]!r} to run.")


async def _check(addresses: list[str], args: argparse.Namespace) -> int:
    async with args.http or TcpConnector() as connector:
        report = await check_nodes(addresses, timeout=args.timeout, connector=connector)
    if not args.quiet:
        _output.print_report(report, as_json=args.json)
    return ALL_UP if report.all_alive else SOME_DOWN


async def _wait(addresses: list[str], args: argparse.Namespace) -> int:
    targets = targets_of(addresses)
    goal = Goal(args.count or len(targets), down=args.down)
    show = _output.Waiting(goal, as_json=args.json)
    async with args.http or TcpConnector() as connector:
        report = await wait(
            targets,
            goal,
            deadline=args.deadline,
            timeout=args.timeout,
            interval=args.interval,
            on_progress=None if args.quiet else show.progress,
            connector=connector,
        )
    if not args.quiet:
        show.end(report)
    return ALL_UP if goal.is_met_by(report) else SOME_DOWN


async def _watch(addresses: list[str], args: argparse.Namespace) -> int:
    async with args.http or TcpConnector() as connector:
        transitions = watch_nodes(
            addresses,
            interval=args.interval,
            failure_threshold=args.failure_threshold,
            success_threshold=args.success_threshold,
            timeout=args.timeout,
            connector=connector,
        )
        async with contextlib.aclosing(transitions):
            async for transition in transitions:
                _output.print_transition(transition, as_json=args.json)
    return ALL_UP


if __name__ == "__main__":
    program()
