"""Command lines: called in this process, and started as programs."""

import subprocess


def caller(main, capsys):
    """Calls a command line; that returns its exit status, output and errors."""

    def run(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return run


def start(command, *arguments, **options):
    """Starts a command line as a program."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *arguments], text=True, **(pipes | options))
