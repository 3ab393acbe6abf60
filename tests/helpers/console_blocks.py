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

    The output must be that of the block, except times in milliseconds and whitespace;
    standard error counts if there is no other. If the block shows none, the command
    must succeed. Skip what cannot be run: `<!-- skip: next "it needs a cluster" -->`.

    `CONSOLE_PORTS` of the document maps the ports that it shows to those in use.
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
        capture_output=True,
        text=True,
        check=False,
    )
    # TensorFlow writes about its own start to standard error.
    output = result.stdout or result.stderr
    if not expected.strip():
        status = result.returncode
        return f"ends with status {status}: {result.stderr}" if status else None
    checker = doctest.OutputChecker()
    expected = re.sub(r"[\d.]+ ms", "... ms", expected)
    if checker.check_output(expected, output, SAME):
        return None
    return checker.output_difference(doctest.Example("", expected), output, SAME)


def folder_with_checkpoints():
    """A new folder with the checkpoints that the documents speak of."""
    folder = tempfile.TemporaryDirectory()
    for pattern in CHECKPOINTS:
        for path in DATA.glob(pattern):
            (Path(folder.name) / path.name).symlink_to(path)
    return folder
