"""Options of the examples: checked before anything is trained, and Ctrl-C."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(Path(__file__).parents[2].glob("examples/train_*.py"))
assert len(EXAMPLES) >= 5


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def example(request):
    return runpy.run_path(str(request.param))


@pytest.fixture
def parse(example, monkeypatch, capsys, tmp_path):
    """Parses options in an empty folder; returns the status and what was said."""

    def parse(*options):
        monkeypatch.setattr(sys, "argv", ["example", *options])
        try:
            example["parse_args"]()
        except SystemExit as exit_:
            output, errors = capsys.readouterr()
            return exit_.code, output + errors
        return 0, ""

    monkeypatch.chdir(tmp_path)
    return parse


def test_help_shows_defaults(parse):
    status, output = parse("--help")
    assert status == 0
    options = re.split(r"(?m)^  (?=--)", output)[1:]
    flags = ("--quick", "--dense", "--addresses", "--process-id")
    for option in options:
        assert "(default: " in option or option.startswith(flags), option
    assert len(options) >= 6


BAD = [
    ("--plot", "no/such/folder/x.png", "cannot be written"),
    ("--plot", ".png", "must end in"),
    ("--plot", "picture.txt", "must end in .png, .pdf or .svg"),
    ("--plot", "picture", "must end in"),
    ("--learning-rate", "nan", "must be a positive number"),
    ("--learning-rate", "inf", "must be a positive number"),
    ("--learning-rate", "-1", "must be a positive number"),
    ("--deadline", "nan", "must be a positive number"),
    ("--seed", "-1", "must be a whole number of at least 0"),
    ("--steps", "0", "must be a whole number of at least 1"),
    ("--steps", "1.5", "must be a whole number of at least 1"),
    ("--dim", "0", "must be a whole number of at least"),
    ("--batch-size", "0", "must be a whole number of at least 1"),
    ("--collisions", "3", "must be a whole number of at least 16"),
    ("--checkpoint-every", "0", "must be a whole number of at least 1"),
    ("--addresses", "a:1,b", "'b' has no port"),
]


def test_options_are_checked(parse):
    _, output = parse("--help")
    known = [bad for bad in BAD if bad[0] in output]
    assert len(known) >= 7
    for option, value, words in known:
        status, output = parse(f"{option}={value}")
        assert status == 2, (option, value)
        assert words in output
        assert option in output


def test_pictures_need_vectors_of_two_numbers(parse, example):
    status, _ = parse("--dim", "1")
    draws_map = "draw_map" in example
    takes_dim = "--dim" in parse("--help")[1]
    assert status == (2 if draws_map or not takes_dim else 0)


@pytest.mark.parametrize("name", ["train_stream", "train_multihost"])
def test_another_run_is_not_continued(name, tmp_path, monkeypatch):
    [path] = [path for path in EXAMPLES if path.stem == name]
    example = runpy.run_path(str(path))
    folder = tmp_path / "run"
    option = "--checkpoint" if name == "train_stream" else "--checkpoint-dir"

    def check(*others):
        monkeypatch.setattr(sys, "argv", [name, option, str(folder), *others])
        example["check_options"](example["parse_args"]())

    monkeypatch.chdir(tmp_path)
    check("--optimizer=adamom")
    check("--optimizer=adamom", "--steps=7")
    words = (
        f"The run in {folder} has --optimizer adamom, not {{}} and --dim {{}}, not 3: "
        f"continue it with its own options, or choose another {option}."
    )
    dim, other = ("8", "adam") if name == "train_stream" else ("16", "rmsprop")
    with pytest.raises(SystemExit) as raised:
        check(f"--optimizer={other}", "--dim=3")
    assert raised.value.code == words.format(other, dim)


def interrupted(name, *options):
    """Starts an example, interrupts it while it trains; returns status and errors."""
    [path] = [path for path in EXAMPLES if path.stem == name]
    with subprocess.Popen(
        [sys.executable, path, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        shown = ""
        while "error=" not in shown and "loss=" not in shown:  # of a progress bar
            shown += process.stderr.read(1)
            assert process.poll() is None, shown
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def test_ctrl_c_ends_with_one_line(tmp_path):
    plot = tmp_path / "x.png"
    status, errors = interrupted("train_linear", "--steps=1000000", f"--plot={plot}")
    assert status == 130
    assert errors.endswith("\nInterrupted.\n")
    assert "Traceback" not in errors


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_line(tmp_path):
    plot = tmp_path / "x.png"
    status, errors = interrupted("train_multihost", "--steps=100000", f"--plot={plot}")
    assert status == 130
    assert errors.count("Interrupted.") == 1
    assert "Traceback" not in errors
