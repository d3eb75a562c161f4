"""What can happen to a shard on its way to a reader, at every class of offset, and how a reader came through it.

The tests run the list against our reader, benchmarks/reader_faults.py against `ray.data.read_webdataset` too.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipelines.corpus.manifest import Corpus
from pipelines.corpus.small import write_corpus
from pipelines.reader import fetch
from pipelines.reader.fetch import FetchError
from pipelines.reader.loader import AugmentConfig, ReaderConfig, train_batches
from pipelines.reader.rows import SampleError
from vit_model.preprocess import InputSpec

from .proxy import Fault, Kind

__all__ = ["SAMPLES", "Case", "Outcome", "aim", "cases", "places", "read_with_ours", "write_faults_corpus"]

BLOCK = 512
SAMPLES, SHARD_SAMPLES = 48, 16


@dataclass(frozen=True, slots=True)
class Case:
    """A fault of the wire (`kind`), or of what is stored (`damage`: bytes of the shard to other bytes; None: gone)."""

    name: str
    where: str
    kind: Kind | None = None
    offset: int = 0  # Of the wire fault, in the shard.
    times: int | None = 1  # Answers that it hits; None: all.
    damage: Callable[[bytes], bytes | None] | None = None
    while_reading: bool = False  # The damage is done after the first batch.
    expected: tuple[str, ...] = ("complete",)  # Of our reader: the first word of its outcome.

    def __str__(self) -> str:
        return f"{self.name}, {self.where}"


@dataclass(slots=True)
class Outcome:
    """How a reader came through: the samples that it gave, those it said were bad, or its error."""

    expected: int = SAMPLES  # Samples of the corpus.
    given: set[str] = field(default_factory=set)  # Samples whose content was right.
    wrong: set[str] = field(default_factory=set)  # Given as good with other content, or twice.
    masked: int = 0  # Said to be bad, and counted.
    error: str = ""

    @property
    def word(self) -> str:
        if self.error:
            return "error"
        if len(self.given) + len(self.wrong) + self.masked < self.expected:
            return "lost"
        if self.wrong:
            return "wrong"
        return "masked" if self.masked else "complete"

    def __str__(self) -> str:
        missing = self.expected - len(self.given) - len(self.wrong) - self.masked
        return {
            "error": f"error: {self.error}",
            "lost": f"lost: {missing} of {self.expected} samples without a word",
            "wrong": f"wrong content given as good: {len(self.wrong)} of {self.expected}",
            "masked": f"masked: {self.masked} of {self.expected}, counted",
            "complete": "complete",
        }[self.word]


def write_faults_corpus(base: str, pictures: Callable[[int], bytes]) -> Corpus:
    """Three shards of JPEGs; pages of four samples, so call it with corpus.pages.PAGE_SAMPLES = 4."""
    images = [("train", "abc"[i % 3], f"{i:03}.jpg", pictures(i)) for i in range(SAMPLES)]
    return write_corpus(base, images, shard_samples=SHARD_SAMPLES)


def places(shard: bytes, corpus: Corpus, number: int = 1) -> dict[str, int]:
    """An offset of each class, in the middle of a shard."""
    with tarfile.open(fileobj=io.BytesIO(shard)) as tar:
        members = tar.getmembers()
    images = [member for member in members if not member.name.endswith((".cls", ".json"))]
    middle = images[len(images) // 2 + 1]
    starts = [offset for offset, _ in pages_of(corpus, number)]
    return {
        "before the first byte": 0,
        "inside a header": middle.offset + 100,
        "inside an image": middle.offset_data + middle.size // 2,
        "on a member boundary": middle.offset,
        "on a page boundary": starts[len(starts) // 2],
        "one byte before the end": sum(pages_of(corpus, number)[-1]) - 1,
    }


def pages_of(corpus: Corpus, number: int) -> list[tuple[int, int]]:
    """Offset and length of each page of a shard."""
    pages = corpus.pages("train")
    entries = [pages[i] for i in range(len(pages))]
    return [(page.offset, page.length) for page in entries if page.shard == number]


def aim(case: Case, corpus: Corpus, number: int = 1) -> Fault:
    """The proxy's fault for our reader, which asks for a page at a time: the request that the offset falls into."""
    assert case.kind is not None
    name = corpus.shard_uri(number).rsplit("/", 1)[-1]
    start, length = next(
        (start, length) for start, length in pages_of(corpus, number) if start <= case.offset < start + length
    )
    header = f"bytes={start}-{start + length - 1}"
    if case.times is None:
        header = ""
    return Fault(case.kind, method="GET", match=name, header=header, after=case.offset - start, times=case.times)


def cases(shard: bytes, offsets: dict[str, int]) -> Iterator[Case]:
    """All of them, for a shard of these bytes."""
    kinds: tuple[Kind, ...] = ("reset", "truncate", "stall")
    for kind in kinds:
        for where, offset in offsets.items():
            yield Case(kind, where, kind, offset)
    yield Case("503", "one answer", "unavailable")
    yield Case("503", "two answers", "unavailable", times=2)
    yield Case("503", "every answer", "unavailable", times=None, expected=("error",))
    yield Case("reset", "every answer", "reset", offsets["inside a header"], times=None, expected=("error",))
    boundary, header = offsets["on a member boundary"], offsets["inside a header"]
    image = offsets["inside an image"]

    def over(at: int, new: bytes) -> Callable[[bytes], bytes]:
        return lambda data: data[:at] + new + data[at + len(new) :]

    one_bit = bytes([shard[header + 24] ^ 1])
    yield Case("corrupt header", "one bit of a size", damage=over(header + 24, one_bit), expected=("masked",))
    yield Case("garbage", "over a header", damage=over(boundary, b"\xff" * BLOCK), expected=("masked",))
    yield Case("garbage", "over an image's start", damage=over(boundary + BLOCK, b"\xa5" * 64), expected=("masked",))
    yield Case("zeros", "over two headers", damage=over(boundary, bytes(2 * BLOCK)), expected=("error",))
    yield Case("truncated", "on a member boundary", damage=lambda data: data[:boundary], expected=("error",))
    yield Case("truncated", "inside an image", damage=lambda data: data[:image], expected=("error",))
    yield Case("missing shard", "from the start", damage=lambda data: None, expected=("error",))
    for name, change in (
        ("by one of the same size", over(image, bytes([shard[image] ^ 255]))),
        ("by a shorter one", lambda data: data[:boundary] + bytes(2 * BLOCK)),
    ):
        yield Case("replaced while reading", name, damage=change, while_reading=True, expected=("error",))


def read_with_ours(
    corpus: Corpus, looks: dict[str, str] | None, after_first: Callable[[], object] = lambda: None
) -> tuple[Outcome, dict[str, str]]:
    """One epoch of our reader, and what each sample looked like; `looks`: what it should look like."""
    fetch._etags.clear()
    outcome = Outcome()
    seen: dict[str, str] = {}
    batches = train_batches(
        corpus,
        batch_size=8,
        seed=1,
        spec=InputSpec(height=16, width=16),
        augment=AugmentConfig(),
        total_steps=SAMPLES // 8,
        lanes=1,
        window_pages=1,
        reader=ReaderConfig(backend="local", ahead=1),
    )
    try:
        for number, batch in enumerate(batches):
            for sample, weight, image in zip(batch.sample_ids.tolist(), batch.weights, batch.images, strict=True):
                key, pixels = str(sample), hashlib.sha256(image.numpy().tobytes()).hexdigest()
                if not weight:
                    outcome.masked += 1
                elif key in seen or (looks is not None and looks[key] != pixels):
                    outcome.wrong.add(key)
                else:
                    outcome.given.add(key)
                seen[key] = pixels
            if number == 0:
                after_first()
        if sum(batches.stats().bad.values()) != outcome.masked:
            outcome.wrong.add("the count of bad samples")
    except (FetchError, SampleError) as error:
        outcome.error = str(error)
    return outcome, seen
