"""run_ahead: prepares the next items of an iterator in a thread."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")

# A thread that waits for data cannot be stopped, and must not keep the program.
_PATIENCE_S = 5.0


def run_ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """Yields items in order, and prepares up to `depth` of them before they are needed.

    An error is raised in the place of the item that it belongs to. When the caller
    stops, by `close`, an error or Ctrl-C, the thread ends and closes `items`.
    """
    ready: deque[tuple[str, Any]] = deque()
    changed, stopped = threading.Condition(), False

    def put(kind: str, what: Any = None) -> None:
        with changed:
            ready.append((kind, what))
            changed.notify_all()

    def wanted() -> bool:
        with changed:
            changed.wait_for(lambda: stopped or len(ready) < depth)
            return not stopped

    def work() -> None:
        end: tuple[str, Any] = "end", None
        try:
            while wanted():
                try:
                    put("item", next(items))
                except StopIteration:
                    break
            items.close()
        except BaseException as error:
            end = "error", error
        put(*end)

    thread = threading.Thread(target=work, name="run_ahead", daemon=True)
    try:
        thread.start()
        while True:
            with changed:
                changed.wait_for(lambda: ready)
                kind, what = ready.popleft()
                changed.notify_all()
            if kind == "error":
                raise what
            if kind == "end":
                return
            yield what
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        if thread.ident is not None:
            thread.join(_PATIENCE_S)
