"""The console entry, and the one table: exception -> message, exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from typer.exceptions import TyperException

from malmen_cli.cli import processes
from malmen_cli.cli.console import Console
from malmen_cli.exceptions import (
    CheckpointError,
    EditorError,
    FactsError,
    MemoryLimitError,
    NumericsError,
    OutputError,
    RankError,
    SpecError,
)

DONE, GATE, USAGE, FACTS, CHECKPOINT, NUMERICS, OUTPUT, MEMORY, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 70, 130

EXIT_CODES: dict[type[BaseException], int] = {
    TyperException: USAGE,
    FactsError: FACTS,
    SpecError: FACTS,
    CheckpointError: CHECKPOINT,
    EditorError: CHECKPOINT,
    NumericsError: NUMERICS,
    OutputError: OUTPUT,
    MemoryLimitError: MEMORY,
    MemoryError: MEMORY,
    RankError: INTERNAL,
    KeyboardInterrupt: INTERRUPTED,
}
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
_MEMORY_HINT = "try a smaller --batch-size, or --device cpu"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

# Other libraries' chatter on stderr; what the user has set himself stays.
_QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `malmen` with these arguments (else those of the process) and return its exit code; never raises."""
    _prepare()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if processes.idle(arguments):
        return DONE
    try:
        from malmen_cli.cli.app import app

        with processes.together(arguments):
            code = app(args=arguments, prog_name="malmen", standalone_mode=False)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException as error:  # noqa: BLE001  # the last line of defence: a user never sees a bare traceback
        return report(error)
    if code == INTERRUPTED:
        Console().error("malmen: interrupted")
    return code if isinstance(code, int) else DONE


def report(error: BaseException) -> int:
    """Say on stderr why the program stops; the exit code."""
    console = Console()
    if os.environ.get("MALMEN_TRACEBACK", "") not in ("", "0"):
        console.error("".join(traceback.format_exception(error)).rstrip())
    code = exit_code(error)
    for line in _lines(error, code):
        console.error(line)
    return code


def exit_code(error: BaseException) -> int:
    """The documented code of an exception; 70 for what nobody expected."""
    for kind in type(error).__mro__:
        if kind in EXIT_CODES:
            return EXIT_CODES[kind]
    if _out_of_memory(error):
        return MEMORY
    return OUTPUT if isinstance(error, OSError) and error.errno in _DISK else INTERNAL


def _lines(error: BaseException, code: int) -> list[str]:
    if isinstance(error, FactsError):
        return _problems(error)
    if isinstance(error, TyperException) and not error.format_message():
        return []  # no command was given: typer has printed the help
    if code == INTERNAL and not isinstance(error, RankError):
        what = f"{type(error).__name__}: {_one_line(error)}"
        return [f"malmen: internal error: {what} (run again with MALMEN_TRACEBACK=1 to see where)"]
    if code == INTERRUPTED:
        return ["malmen: interrupted"]
    if code == MEMORY and not isinstance(error, MemoryLimitError):
        return [f"malmen: error: out of memory: {_MEMORY_HINT}"]
    return [f"malmen: error: {_message(error)}"]


def _problems(error: FactsError) -> list[str]:
    """Every problem on a line of its own, as compilers print them, then the count."""
    if error.total <= 1:
        return [f"malmen: error: {error}"]
    hidden = error.total - len(error.problems)
    more = [f"... and {hidden} more"] if hidden > 0 else []
    return [*map(str, error.problems), *more, f"malmen: error: {error.total} problems, nothing was written"]


def _message(error: BaseException) -> str:
    if not isinstance(error, TyperException):
        return _one_line(error)
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return " ".join(error.format_message().split()) + hint


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _out_of_memory(error: BaseException) -> bool:
    """torch's own classes are told by name and text: importing torch to compare them would cost a second."""
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError | OSError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def _prepare() -> None:
    """Leave stderr to us: libraries quiet, warnings off unless asked for, no forced colours off a terminal."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # typer's help is coloured under GITHUB_ACTIONS and FORCE_COLOR even into a file.
        os.environ.setdefault("_TYPER_FORCE_DISABLE_TERMINAL", "1")
