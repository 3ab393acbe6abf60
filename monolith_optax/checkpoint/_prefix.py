"""What a user may call a TensorFlow checkpoint."""

from pathlib import Path


def prefix_of(path: str) -> str:
    """The prefix of a checkpoint, given that, its index file, or its folder.

    Raises:
      ValueError: the folder has several checkpoints, or none.
    """
    if not Path(path).is_dir():
        return path.removesuffix(".index")
    match sorted(Path(path).glob("*.index"), key=lambda index: index.stat().st_mtime):
        case []:
            raise ValueError(
                f"{path} is a folder without a TensorFlow checkpoint, which has a file "
                "that ends in .index, and without Monolith's hash tables."
            )
        case [index]:
            return str(index.with_suffix(""))
        case several:
            names = ", ".join(str(index.with_suffix("")) for index in several)
            raise ValueError(
                f"{path} has several checkpoints: give one of them, from the oldest to "
                f"the newest {names}."
            )


def has_index(path: str) -> bool:
    """Whether a path is a folder with TensorFlow checkpoints."""
    return any(Path(path).glob("*.index"))
