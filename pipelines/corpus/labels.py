"""The label of a sample: one rule for whoever makes a corpus, from tars or from a list, and whoever reads it.

In a tar KEY.cls comes first. Without a usable one, "label" of the object in KEY.json, and without that its "labels".
"""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = [
    "LABEL_BYTES",
    "MAX_CLASSES",
    "Label",
    "as_label",
    "is_text",
    "parse_cls",
    "parse_json",
    "parse_labels",
    "read_any_label",
    "read_label",
]

MAX_CLASSES = 1_000_000  # A class number beyond this is a mistake or an attack: every class gets a name and a row.
LABEL_BYTES = 1 << 20  # A .cls or .json beyond this is no label.
MOST_DIGITS = 9  # Of a number that is written as text.
BELOW_0 = re.compile(r"-\d+")

Label = int | str | tuple[int | str, ...]


def as_label(value: object) -> int | str | None:
    """A class number, a class name, or None for what can be neither.

    Numbers count from 0. Text of up to 9 decimal digits is a number ("007" is class 7), any other text is a name; but a
    number below 0 is no label, as text neither: -1 stands for "not known". A float without a fraction is a number.
    """
    if isinstance(value, str):
        if value.isdecimal() and len(value) <= MOST_DIGITS:  # Not isdigit(): "²" is a digit that int() refuses.
            return int(value)
        return value if value and is_text(value) and not BELOW_0.fullmatch(value) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def is_text(value: str) -> bool:
    """Whether UTF-8 can say it: JSON may hold half a surrogate pair, file names any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_label(cls: bytes | None, described: bytes | None) -> int | str | None:
    """A class number, a class name, or None where neither member says."""
    label = parse_cls(cls) if cls is not None else None
    if label is None and described is not None:
        label = parse_json(described)
    return label


def read_any_label(cls: bytes | None, described: bytes | None) -> Label | None:
    """As `read_label`; where there is no single label, the tuple of those in "labels"."""
    label = read_label(cls, described)
    return parse_labels(described) if label is None and described is not None else label


def parse_cls(data: bytes) -> int | str | None:
    try:
        return as_label(data.decode().strip())
    except UnicodeDecodeError:
        return None


def parse_json(data: bytes) -> int | str | None:
    return as_label(_object(data).get("label"))


def parse_labels(data: bytes) -> tuple[int | str, ...] | None:
    """Several labels without repeats; None where there is no list of them, or something else in it."""
    given = _object(data).get("labels")
    found = [as_label(value) for value in given] if isinstance(given, list) else []
    labels = tuple(dict.fromkeys(label for label in found if label is not None))
    return labels if labels and None not in found else None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # Not JSON, or nested so deep that it is an attack.
        return {}
    return value if isinstance(value, dict) else {}
