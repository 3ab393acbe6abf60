"""Looks up host names, as a program that can be killed while a lookup hangs.

Standard input is a socket. It reads names from it, one on each line, and writes answers
to it in any order. An answer for the empty name says that it has started.
"""

import json
import queue
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

# Each name that hangs keeps one.
MAX_THREADS = 2048
STACK_BYTES = 512 * 1024


def look_up(name: str) -> dict[str, Any]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return {"name": name, "gaierror": [error.errno, error.strerror]}
    except Exception as error:
        return {"name": name, "fault": repr(error)}
    addresses = [[family, sockaddr] for family, *_, sockaddr in found]
    return {"name": name, "found": addresses}


def work(
    names: queue.SimpleQueue[str], answer: Callable[[dict[str, Any]], None]
) -> None:
    while True:
        answer(look_up(names.get()))


def main() -> None:
    threading.stack_size(STACK_BYTES)
    names: queue.SimpleQueue[str] = queue.SimpleQueue()
    lock = threading.Lock()
    channel = socket.socket(fileno=0)

    def answer(value: dict[str, Any]) -> None:
        with lock:
            channel.sendall(json.dumps(value).encode() + b"\n")

    answer({"name": ""})
    for number, line in enumerate(channel.makefile("rb")):
        if number < MAX_THREADS:
            threading.Thread(target=work, args=(names, answer), daemon=True).start()
        names.put(json.loads(line))


if __name__ == "__main__":
    try:
        main()
    except OSError:
        sys.exit()  # the reader is gone
