"""What can happen to a shard on its way to a reader, at every class of offset, and how a reader came through it.

The tests run the list against our reader, benchmarks/reader_faults.py against `ray.data.read_webdataset` too.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipelines.corpus.manifest import Corpus

from .proxy import Fault, Kind

__all__ = ["Case", "Outcome", "cases", "places"]

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Case:
    """A fault of the wire (`fault`), or of what is stored (`damage`: bytes of the shard to other bytes; None: gone)."""

    name: str
    where: str
    fault: Callable[[], Fault] | None = None
    damage: Callable[[bytes], bytes | None] | None = None
    while_reading: bool = False  # The damage is done after the first batch.
    expected: tuple[str, ...] = ("complete",)  # Of our reader: the first word of its outcome.


@dataclass(slots=True)
class Outcome:
    """How a reader came through: the samples that it gave, those it said were bad, or its error."""

    expected: int  # Samples of the corpus.
    given: set[str] = field(default_factory=set)  # Ids of samples whose content was right.
    wrong: set[str] = field(default_factory=set)  # Ids given as good with other content, or twice.
    masked: int = 0  # Said to be bad, and counted.
    error: str = ""

    @property
    def word(self) -> str:
        if self.error:
            return "error"
        if self.wrong:
            return "wrong"
        if len(self.given) == self.expected:
            return "complete"
        return "masked" if len(self.given) + self.masked == self.expected else "lost"

    def __str__(self) -> str:
        match self.word:
            case "error":
                return f"error: {self.error}"
            case "masked":
                return f"masked: {self.masked} of {self.expected} counted"
            case "lost":
                missing = self.expected - len(self.given) - self.masked
                return f"lost: {missing} of {self.expected} samples without a word"
            case "wrong":
                return f"wrong: {len(self.wrong)} samples"
        return "complete"


def places(shard: bytes, corpus: Corpus, number: int = 1) -> dict[str, int]:
    """An offset of each class, in the middle of a shard."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        members = tar.getmembers()
    images = [member for member in members if not member.name.endswith((".cls", ".json"))]
    middle = images[len(images) // 2]
    pages = corpus.table["page_offset"].to_pylist()[number]
    return {
        "before the first byte": 0,
        "inside a header": middle.offset + 100,
        "inside an image": middle.offset_data + middle.size // 2,
        "on a member boundary": middle.offset,
        "on a page boundary": pages[len(pages) // 2],
        "in the last block": len(shard) - 10,
    }


def cases(shard: bytes, offsets: dict[str, int]) -> Iterator[Case]:
    """All of them, for a shard of these bytes."""
    kinds: tuple[Kind, ...] = ("reset", "truncate", "stall")
    for kind in kinds:
        for where, offset in offsets.items():
            yield Case(kind, where, fault=lambda kind=kind, offset=offset: Fault(kind, method="GET", after=offset))
    yield Case("503", "one answer", fault=lambda: Fault("unavailable", method="GET"))
    yield Case("503", "two answers", fault=lambda: Fault("unavailable", method="GET", times=2))
    for name, kind in (("reset", "reset"), ("503", "unavailable")):
        yield Case(
            f"{name}, every time",
            "inside an image" if kind == "reset" else "all answers",
            fault=lambda kind=kind: Fault(kind, method="GET", after=offsets["inside an image"], times=None),
            expected=("error",),
        )
    boundary, header, image = (offsets[f"{where}"] for where in WHERE)
    yield Case(
        "corrupt header",
        "one bit",
        damage=lambda data: data[: header + 24] + bytes([data[header + 24] ^ 1]) + data[header + 25 :],
        expected=("masked",),
    )
    yield Case(
        "garbage",
        "over a header",
        damage=lambda data: data[:boundary] + b"\xff" * BLOCK + data[boundary + BLOCK :],
        expected=("masked",),
    )
    yield Case(
        "garbage",
        "inside an image",
        damage=lambda data: data[: image - 64] + b"\xa5" * 128 + data[image + 64 :],
        expected=("masked",),
    )
    yield Case(
        "zeros",
        "over two headers",
        damage=lambda data: data[:boundary] + bytes(2 * BLOCK) + data[boundary + 2 * BLOCK :],
        expected=("error",),
    )
    yield Case("truncated", "on a member boundary", damage=lambda data: data[:boundary], expected=("error",))
    yield Case("truncated", "inside an image", damage=lambda data: data[:image], expected=("error",))
    yield Case("missing shard", "", damage=lambda data: None, expected=("error",))
    for name, change in (
        ("other bytes", lambda data: data[:image] + bytes([data[image] ^ 255]) + data[image + 1 :]),
        ("shorter", lambda data: data[:boundary] + bytes(2 * BLOCK)),
    ):
        yield Case("replaced while reading", name, damage=change, while_reading=True, expected=("error",))


WHERE = ("on a member boundary", "inside a header", "inside an image")
