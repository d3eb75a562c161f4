"""What is left out, and why. A rejected image is listed with key and reason beside the manifest, never hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.corpus.errors import QuarantineError

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "BY_CHOICE",
    "NOTES",
    "REASONS",
    "Rejected",
    "bad_fraction",
    "check_fraction",
    "count_reasons",
    "quarantine_table",
]

REASONS = {
    "empty": "the file has no bytes",
    "not_an_image": "no known image format begins like this",
    "unsupported_format": "an image, but neither JPEG, PNG nor WebP",
    "truncated": "the file ends before the image does",
    "corrupt": "the container or the pixels cannot be decoded",
    "bomb": "more pixels or bytes than the limit",
    "zero_size": "width or height is zero",
    "animated": "more than one frame",
    "unreadable": "the file system gives an error, or no permission",
    "missing_label": "in no class folder, or without a label",
    "missing_image": "a sample of a tar without an image",
    "bad_name": "the file name is not UTF-8, or leaves the archive",
    "duplicate_member": "a sample of a tar with two members of one extension",
    "dotted_key": "a sample of a tar whose key has a dot, at which readers cut it",
    "scattered_key": "a sample of a tar whose members do not lie together",
    "repeated_key": "a second sample of one key in one tar",
    "oversized": "a sample of a tar whose members are too long together for one read",
    "duplicate": "the same bytes as another image that is kept",
    "withdrawn": "on a list given to `vit corpus exclude`",
}
BY_CHOICE = frozenset({"duplicate", "withdrawn"})  # Good images: they do not count for max_bad_fraction.

# Kept as they are; readers convert them by the rules of vit_model.preprocess.
NOTES = {
    "cmyk": "four colour channels",
    "16bit": "16 bits a channel",
    "alpha": "transparency",
    "exif_rotated": "turned by its EXIF tag",
    "renamed": "another format than the file name says",
    "resized": "made smaller, as the recipe says",
}


@dataclass(frozen=True, slots=True)
class Rejected:
    key: str
    source: str  # Path relative to the source.
    split: str
    label: int  # -1: none.
    reason: str  # One of REASONS.
    detail: str


def count_reasons(rejected: Iterable[Rejected]) -> dict[str, int]:
    return dict(sorted(Counter(item.reason for item in rejected).items()))


def bad_fraction(rejected: Sequence[Rejected], kept: int) -> float:
    """Bad images as a fraction of all; `kept` counts those that lie in tars, also if they were left out by choice."""
    bad = sum(item.reason not in BY_CHOICE for item in rejected)
    return round(bad / (kept + bad), 6) if bad else 0.0


def check_fraction(rejected: Sequence[Rejected], total: int, max_bad_fraction: float) -> None:
    """Raise QuarantineError, naming reasons and files, if more than the allowed fraction of `total` is bad."""
    if len(rejected) <= max_bad_fraction * total:
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected).items())
    shown = sorted(rejected, key=lambda item: item.source)[:5]
    lines = [f"  {item.source}: {item.reason} ({item.detail})" for item in shown]
    if len(rejected) > len(shown):
        lines.append(f"  and {len(rejected) - len(shown):,} more")
    raise QuarantineError(
        f"{len(rejected):,} of {total:,} images are bad ({len(rejected) / total:.2%}: {counts}), "
        f"max_bad_fraction allows {max_bad_fraction:.2%}; repair or remove them, or raise it with --max-bad-fraction\n"
        + "\n".join(lines)
    )


def quarantine_table(rejected: Iterable[Rejected], class_names: Mapping[int, str]) -> pa.Table:
    import pyarrow as pa

    rows = sorted(rejected, key=lambda item: (item.split, item.source))
    fields = ("key", "source", "split", "reason", "detail")
    columns = {name: pa.array([getattr(item, name) for item in rows], pa.string()) for name in fields}
    columns["class"] = pa.array([class_names.get(item.label) for item in rows], pa.string())
    return pa.table(columns)
