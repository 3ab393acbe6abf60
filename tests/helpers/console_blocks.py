"""Console blocks of documents: commands of this package, run as a reader runs them."""

import doctest
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sybil.parsers.markdown import CodeBlockParser

# Others would install something, or are examples and benchmarks with their own tests.
OURS = re.compile(r"monolith-(net|checkpoint)|python -m monolith_optax")
DATA = Path(__file__).parents[1] / "data"
CHECKPOINTS = "checkpoints/adamom/model.ckpt-6.*", "hash_tables/native/model.ckpt-1200*"
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class ConsoleBlockParser(CodeBlockParser):
    """Finds blocks with commands of this package, and runs these commands.

    The output must be that of the block, except times in milliseconds and whitespace.
    If the block shows none, the command must succeed.
    """

    language = "console"

    def __call__(self, document):
        for region in super().__call__(document):
            if any(OURS.match(command) for command, _ in commands(region.parsed)):
                yield region

    def evaluate(self, example):
        namespace = example.namespace
        text = example.parsed
        for shown, port in namespace.get("CONSOLE_PORTS", {}).items():
            text = text.replace(f":{shown}", f":{port}")
        for command, expected in commands(text):
            if OURS.match(command):
                problem = run(command, expected, namespace["CONSOLE_FOLDER"].name)
                if problem:
                    return f"{command}\n{problem}"
        return None


def commands(block):
    """The commands of a block and what they print."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert not parts[0].strip(), "A console block begins with a command, after '$ '."
    return list(zip(parts[1::2], parts[2::2], strict=True))


def run(command, expected, folder):
    """Runs a command; returns what is wrong with its output, if anything is."""
    programs = Path(sys.executable).parent
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    result = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=os.environ | {"PATH": path, "COLUMNS": "96", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if not expected.strip():
        return result.stdout if result.returncode else None
    checker = doctest.OutputChecker()
    expected = re.sub(r"[\d.]+ ms", "... ms", expected)
    if checker.check_output(expected, result.stdout, SAME):
        return None
    return checker.output_difference(doctest.Example("", expected), result.stdout, SAME)


def folder_with_checkpoints():
    """A new folder with the checkpoints that the documents speak of."""
    folder = tempfile.TemporaryDirectory()
    for pattern in CHECKPOINTS:
        for path in DATA.glob(pattern):
            (Path(folder.name) / path.name).symlink_to(path)
    return folder
