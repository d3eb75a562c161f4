"""Which rows of each tensor lie in which file of a checkpoint, and the rows that a rank wants to have.

A tensor is cut along its first dimension, as FSDP2 cuts it: rank i of n takes ceil(rows / n) of them, the last ranks
what is left. So a layout is the number of files and the rows of each cut tensor, and any number of ranks can read what
any other number wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["WHOLE", "Layout", "Part", "rows_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which of `count` equal parts of the cut tensors a rank holds."""

    index: int = 0
    count: int = 1
    writes: bool = True  # False: another rank holds the same part and writes it.


WHOLE = Part()
MOST_ROWS = 1 << 40


def rows_of(part: Part, rows: int) -> slice:
    """The rows of a tensor of so many that belong to a part."""
    each = -(-rows // part.count)
    return slice(min(part.index * each, rows), min((part.index + 1) * each, rows))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a checkpoint lies in its files; a tensor that `rows` does not name lies whole in the first one."""

    files: int = 1
    rows: Mapping[str, int] = field(default_factory=dict)  # Of each cut tensor, over all files.

    def to_json(self) -> dict[str, Any]:
        kind = "replicated" if self.files == 1 else "sharded"
        return {"kind": kind, "files": self.files, **({"rows": dict(self.rows)} if self.rows else {})}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """Raises ValueError for what no checkpoint of ours says."""
        files, rows = value.get("files"), value.get("rows", {})
        if not isinstance(files, int) or not 1 <= files <= 1 << 16 or not isinstance(rows, dict):
            raise ValueError(f"layout of {files!r} files is none of ours")
        for name, count in rows.items():
            if type(count) is not int or not 0 < count <= MOST_ROWS:
                raise ValueError(f"{count!r} rows of {name} are none of ours")
        return cls(files, dict(rows))

    def file_name(self, index: int) -> str:
        return f"tensors-{index:05d}-of-{self.files:05d}.safetensors"

    def needed(self, part: Part) -> list[int]:
        """The files in which anything of a part lies: its neighbours, and the first for what is not cut."""
        if self.files == part.count:
            return sorted({0, part.index})
        if part.count == 1:
            return list(range(self.files))
        wanted = {0}
        for rows in set(self.rows.values()):
            ours = rows_of(part, rows)
            wanted |= {index for index, there in self._places(rows) if _overlap(there, ours)}
        return sorted(wanted)

    def join(self, tensors: Mapping[int, Mapping[str, Tensor]], part: Part) -> dict[str, Tensor]:
        """From the tensors of the needed files the rows of a part.

        Raises KeyError if one is missing, ValueError if a file does not have the rows that it should.
        """
        import torch

        found = {name: tensor for name, tensor in tensors[0].items() if name not in self.rows}
        for name, rows in self.rows.items():
            ours, pieces = rows_of(part, rows), []
            for index, there in self._places(rows):
                if common := _overlap(there, ours):
                    has = tuple(tensors[index][name].shape)
                    if has[:1] != (there.stop - there.start,):
                        raise ValueError(f"{name} of file {index} is {has}, not {there.stop - there.start} rows")
                    pieces.append(tensors[index][name][common.start - there.start : common.stop - there.start])
            if pieces:
                found[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return found

    def _places(self, rows: int) -> Iterator[tuple[int, slice]]:
        for index in range(self.files):
            yield index, rows_of(Part(index, self.files), rows)


def _overlap(one: slice, other: slice) -> slice | None:
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(start, stop) if start < stop else None
