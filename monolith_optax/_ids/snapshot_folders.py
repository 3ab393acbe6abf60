"""Folders of snapshots, which are complete or not there."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = re.compile(r"snapshot-(\d{9})")
# Left by a process that was killed; they count as nothing.
_UNFINISHED = ".unfinished-"


@contextmanager
def new_snapshot(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write a snapshot to, which then takes the place of the last one.

    It gets its name when all of its files are on the disk, and only then the last one
    is removed. So at any moment the newest folder with a name is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path)
    old = _snapshots(folder)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield unfinished
        for path in [*unfinished.iterdir(), unfinished]:
            _to_disk(path)
        unfinished.rename(folder / f"snapshot-{max(old, default=0) + 1:09}")
        _to_disk(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for path in old.values():
        removed = path.rename(folder / f"{_UNFINISHED}{path.name}")
        shutil.rmtree(removed)


def last_snapshot(folder: str | os.PathLike[str]) -> Path:
    """The last complete snapshot.

    Raises:
      FileNotFoundError: there is none.
    """
    found = _snapshots(Path(folder))
    if not found:
        raise FileNotFoundError(f"There is no complete snapshot in {folder}.")
    return found[max(found)]


def _snapshots(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
