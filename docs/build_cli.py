"""Write docs/cli.md: the help of every command, as the program prints it. `make docs` runs this; a test compares."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from pathlib import Path

from typer import rich_utils

from malmen_cli.cli.errors import main

COMMANDS = ("", "apply", "train-editor", "eval", "diff", "stats", "facts", "facts check", "facts convert")
PAGE = Path(__file__).with_name("cli.md")
WIDTH = 100


def help_of(command: str) -> str:
    """What `malmen COMMAND --help` prints on a terminal of WIDTH columns, without colours."""
    printed = io.StringIO()
    width, rich_utils.MAX_WIDTH = rich_utils.MAX_WIDTH, WIDTH
    try:
        with redirect_stdout(printed):
            code = main([*command.split(), "--help"])
    finally:
        rich_utils.MAX_WIDTH = width
    if code:
        raise SystemExit(code)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines())


def page() -> str:
    """The whole page."""
    parts = ["# Command line\n\nWritten by `make docs` from the program's own help.\n"]
    parts += [f"## malmen {command}".rstrip() + f"\n\n```text\n{help_of(command)}\n```\n" for command in COMMANDS]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stderr.write(f"{PAGE} written\n")
