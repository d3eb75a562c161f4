"""What a person sees while a stage runs: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "as_line", "console", "progress", "say", "visible"]

PLAIN_EVERY_SECONDS = 5.0
_console: Console | None = None


def console() -> Console:
    """The one console of this process; long lines are never folded when the output is not a terminal."""
    global _console
    if _console is None or _console.file is not sys.stdout:
        from rich.console import Console

        _console = Console(file=sys.stdout, highlight=False, soft_wrap=not sys.stdout.isatty())
    return _console


def as_line(fields: Iterable[object]) -> str:
    """A line of text with tabs between the fields, whatever is in them."""
    shown = (str(one).replace("\n", "\\n").replace("\t", "\\t") for one in fields)
    return visible("\t".join(shown)) + "\n"


def say(text: str) -> None:
    """One line for the user. Square brackets are no markup."""
    console().print(visible(text), markup=False)


def visible(text: str) -> str:
    """Without what a terminal obeys or what turns the direction of text: names of files are other people's text."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _fields(fields: dict[str, Any]) -> str:
    shown = []
    for name, value in fields.items():
        if value is None:
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        shown.append(f"{name.replace('_per_second', '/s').replace('_', ' ')} {text}")
    return "  ".join(shown)


class Progress:
    """Handle of one piece of long work; `update` is cheap enough for every batch."""

    def __init__(self, description: str, total: int | None, unit: str, bar: RichProgress | None) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._bar = bar
        self._task: TaskID | None = bar.add_task(description, total=total, fields="") if bar else None
        self._started = self._shown = time.monotonic()
        self._first: int | None = None  # Where a resumed run started: the rate is of this run alone.

    def update(self, done: int, **fields: Any) -> None:
        """`done` counts from the start of the whole work, so a resumed run starts above 0."""
        if self._first is None:
            self._first = done
        self.done = done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, fields=_fields(fields))
            return
        now = time.monotonic()
        if now - self._shown >= PLAIN_EVERY_SECONDS or (self.total is not None and done >= self.total):
            self._shown = now
            say(self._line(now, fields))

    def _line(self, now: float, fields: dict[str, Any]) -> str:
        of = f"/{self.total:,}" if self.total else ""
        gained = self.done - (self._first or 0)
        elapsed = now - self._started
        eta = ""
        if self.total and gained > 0 and self.done < self.total:
            eta = f"  eta {(self.total - self.done) * elapsed / gained:.0f} s"
        return f"{self.description}: {self.done:,}{of} {self.unit}{eta}  {_fields(fields)}".rstrip()


@contextmanager
def progress(description: str, total: int | None, unit: str) -> Iterator[Progress]:
    """Show progress of `total` units (None: unknown) until the block ends."""
    if not console().is_terminal:
        yield Progress(description, total, unit, None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[fields]}", markup=False),
    )
    with Bar(*columns, console=console(), transient=False) as bar:
        yield Progress(description, total, unit, bar)
