"""A format is a table: our name, their names, and how the axes move. One engine reads and writes all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kind:
    """How the arrays of a row become our tensor, and back; `write` takes the number of heads and of arrays."""

    read: Callable[[list[Tensor]], Tensor]
    write: Callable[[Tensor, int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """{0} in a name is an index from 0, {1} from 1, {01} from 01; the indices of all names agree in order."""

    ours: str
    theirs: tuple[str, ...]
    kind: Kind


SAME = Kind(lambda parts: parts[0], lambda x, _heads, _n: [x])
FUSED = Kind(torch.cat, lambda x, _heads, n: list(x.chunk(n)))  # q, k and v one under the other
VECTOR = Kind(lambda parts: parts[0].reshape(-1), lambda x, _heads, _n: [x])  # old Flax GroupNorm: (1, 1, 1, C)
CONV = Kind(lambda parts: parts[0].permute(3, 2, 0, 1), lambda x, _heads, _n: [x.permute(2, 3, 1, 0)])  # HWIO
DENSE = Kind(lambda parts: parts[0].T, lambda x, _heads, _n: [x.T])  # IO
CONV_DENSE = Kind(
    lambda parts: parts[0].reshape(-1, parts[0].shape[-1]).T, lambda x, _heads, _n: [x.T[None, None]]
)  # (1, 1, I, O)
DENSE_CONV = Kind(lambda parts: parts[0].flatten(1), lambda x, _heads, _n: [x[:, :, None, None]])  # (O, I, 1, 1)
HEADS_KERNEL = Kind(  # (D, heads, D/heads) each
    lambda parts: torch.cat([part.flatten(1).T for part in parts]),
    lambda x, heads, n: [part.T.reshape(part.shape[1], heads, -1) for part in x.chunk(n)],
)
HEADS_BIAS = Kind(  # (heads, D/heads) each
    lambda parts: torch.cat([part.reshape(-1) for part in parts]),
    lambda x, heads, n: [part.reshape(heads, -1) for part in x.chunk(n)],
)
HEADS_OUT = Kind(  # (heads, D/heads, D)
    lambda parts: parts[0].flatten(0, 1).T, lambda x, heads, _n: [x.T.reshape(heads, -1, x.shape[0])]
)


def rows(kind: Kind, *names: tuple[str, str | tuple[str, ...]]) -> tuple[Row, ...]:
    return tuple(Row(ours, (theirs,) if isinstance(theirs, str) else theirs, kind) for ours, theirs in names)


def norms(*names: tuple[str, str], weight: str = "weight", separator: str = ".") -> tuple[Row, ...]:
    """A weight (or scale, or gamma) and a bias (or beta) under one name."""
    bias = "beta" if weight == "gamma" else "bias"
    pairs = [
        (f"{ours}.{w}", f"{theirs}{separator}{t}")
        for ours, theirs in names
        for w, t in (("weight", weight), ("bias", bias))
    ]
    return rows(VECTOR, *pairs)


def read_table(table: Iterable[Row], arrays: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under our names, and the names of arrays that no complete row takes."""
    patterns = [(row, i, pattern_of(name)) for row in table for i, name in enumerate(row.theirs)]
    found: dict[tuple[str, tuple[int, ...]], tuple[Row, dict[int, str]]] = {}
    for name in arrays:
        for row, i, (pattern, bases) in patterns:
            if match := pattern.fullmatch(name):
                indices = tuple(int(text) - base for text, base in zip(match.groups(), bases, strict=True))
                found.setdefault((row.ours, indices), (row, {}))[1][i] = name
                break
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    for (ours, indices), (row, parts) in found.items():
        if len(parts) == len(row.theirs):
            tensors[fill(ours, indices)] = row.kind.read([arrays[parts[i]] for i in range(len(parts))])
            used.update(parts.values())
    return tensors, tuple(sorted(arrays.keys() - used))


def write_table(
    table: Iterable[Row], tensors: Mapping[str, Tensor], num_heads: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Arrays under their names, and our names for which the format has no place."""
    patterns = [(row, pattern_of(row.ours)[0]) for row in table]
    arrays: dict[str, Tensor] = {}
    left: list[str] = []
    for name, tensor in tensors.items():
        for row, pattern in patterns:
            if match := pattern.fullmatch(name):
                indices = tuple(int(text) for text in match.groups())
                parts = row.kind.write(tensor, num_heads, len(row.theirs))
                arrays.update({fill(theirs, indices): part for theirs, part in zip(row.theirs, parts, strict=True)})
                break
        else:
            left.append(name)
    return arrays, tuple(left)


def pattern_of(name: str) -> tuple[re.Pattern[str], tuple[int, ...]]:
    """A regular expression for the name, and the base of each index."""
    bases = tuple(int(base) for base in re.findall(r"\{(\d+)\}", name))
    pieces = re.split(r"\{\d+\}", name)
    return re.compile(r"(\d+)".join(re.escape(piece) for piece in pieces)), bases


def fill(name: str, indices: tuple[int, ...]) -> str:
    remaining = iter(indices)
    return re.sub(r"\{(\d+)\}", lambda m: str(next(remaining) + int(m[1])).zfill(len(m[1])), name)
