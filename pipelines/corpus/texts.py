"""Many strings in little memory: the text of a long listing lies on disk."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import IO, overload

__all__ = ["Texts"]

IN_MEMORY = 16 << 20  # Bytes of text of one column; beyond them it goes to a file in TMPDIR that has no name.
READ = 1 << 20


class Texts(Sequence[str]):
    """Strings laid end to end, to be appended to: 8 bytes of memory each."""

    def __init__(self) -> None:
        self._ends = array("q")
        self._open = bytearray()
        self._file: IO[bytes] | None = None
        self._written = 0  # Bytes in the file; those in `_open` follow.

    def append(self, text: str) -> None:
        self._open += text.encode("utf-8", "surrogateescape")
        self._ends.append(self._written + len(self._open))
        if len(self._open) >= IN_MEMORY:
            self._file = self._file or tempfile.TemporaryFile(prefix="vit-plan-")  # noqa: SIM115  lives as long as this
            self._file.write(self._open)
            self._file.flush()
            self._written += len(self._open)
            self._open.clear()

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return self.take(range(*number.indices(len(self))))
        return self.take([range(len(self))[number]])[0]

    def take(self, rows: Sequence[int]) -> list[str]:
        """Many by number, in their order."""
        ends, held, written = self._ends, self._open, self._written
        file = -1 if self._file is None else self._file.fileno()
        found: list[str] = []
        for row in rows:
            start, end = ends[row - 1] if row else 0, ends[row]
            # A text is never cut in two: what is written ends where one ends.
            data = os.pread(file, end - start, start) if start < written else held[start - written : end - written]
            found.append(data.decode("utf-8", "surrogateescape"))
        return found

    def __iter__(self) -> Iterator[str]:
        start = low = 0
        held = b""  # The bytes from `low` on.
        for number in range(len(self)):
            end = self._ends[number]
            if end > low + len(held):
                low, held = start, self._bytes(start, max(end, min(start + READ, self._ends[-1])))
            yield held[start - low : end - low].decode("utf-8", "surrogateescape")
            start = end

    def _bytes(self, start: int, end: int) -> bytes:
        found = b""
        if start < self._written:
            assert self._file is not None
            found = os.pread(self._file.fileno(), min(end, self._written) - start, start)
            start = self._written
        return found + bytes(self._open[start - self._written : end - self._written]) if end > start else found
