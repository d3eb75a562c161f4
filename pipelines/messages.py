"""What a person reads of the commands themselves: their help and their errors; the exit codes."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping

from pipelines.config import RecipeError
from pipelines.progress import visible

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "OK",
    "REFUSED",
    "TERMINATED",
    "USAGE",
    "UsageError",
    "report",
    "say_error",
    "say_help",
    "write",
]

OK, FAILED, USAGE, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
OURS = ("pipelines", "infra", "vit_model")


class UsageError(ValueError):
    """The command itself is wrong: exit code 2, nothing was started."""


def write(text: str) -> None:
    sys.stdout.write(text + "\n")  # Without rich: `vit --help` answers at once.


def say_help(groups: Mapping[str, Mapping[str, str]]) -> None:
    """`groups`: title -> verb -> what it does."""
    write("usage: vit VERB ...\n\nPretrain, fine-tune and ship Vision Transformers on your own image corpus.")
    for title, verbs in groups.items():
        write(f"\n{title}")
        for verb, text in verbs.items():
            write(f"  {verb:<13} {text}")
    write(
        "\nA RECIPE is a YAML path or the name of a packaged recipe (`vit recipes`); `vit VERB RECIPE --help` shows its"
        "\nfields. A finished stage is not computed again: its result is reused; --again recomputes."
        "\n--debug shows tracebacks. Exit code: 0 done, 1 failed, 2 wrong command or recipe, 3 a promotion was refused,"
        "\n130 interrupted (the same command resumes)."
    )


def say_error(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(f"vit: {visible(text)}\n")
    sys.stderr.flush()


def report(error: Exception, debug: bool) -> int:
    """One message for what is wrong with the command, the data or a service; a traceback for what is our own fault."""
    if isinstance(error, UsageError | RecipeError):
        say_error(str(error))
        if debug:
            _say_traceback(error)
        return USAGE
    from pipelines.identity import Held
    from pipelines.workflow.runner import NotRun, StepFailed, root_error

    if isinstance(error, Held):
        say_error(str(error))
        return OK
    if isinstance(error, StepFailed) and isinstance(error.__cause__, NotRun):
        say_error(f"step {error.step} was not run: {error.__cause__}")
        return REFUSED
    step = f"step {error.step}: " if isinstance(error, StepFailed) else ""
    root = root_error(error.__cause__ if isinstance(error, StepFailed) and error.__cause__ else error)
    expected = isinstance(root, ValueError | OSError) or type(root).__module__.split(".")[0] in OURS
    if debug or not expected:
        _say_traceback(error)
    text = str(root) if expected else f"{type(root).__name__}: {root}"
    if isinstance(root, OSError) and root.errno in {errno.ENOSPC, errno.EDQUOT}:
        text += "; free some and run the same command again"
    say_error(f"{step}{text or type(root).__name__}" + ("" if debug or not expected else "  (--debug shows where)"))
    return USAGE if isinstance(root, UsageError | RecipeError) else FAILED


def _say_traceback(error: Exception) -> None:
    import traceback

    sys.stdout.flush()
    traceback.print_exception(error)
