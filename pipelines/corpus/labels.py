"""The label of a WebDataset sample: one rule for whoever indexes tars and whoever reads them.

KEY.cls comes first: a class number or a class name. Without a usable one, "label" of the object in KEY.json, and
without that its "labels", a list.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["LABEL_BYTES", "MAX_CLASSES", "parse_cls", "parse_json", "parse_labels", "read_label"]

MAX_CLASSES = 1_000_000  # A class number beyond this is a mistake or an attack: every class gets a name and a row.
LABEL_BYTES = 1 << 20  # A .cls or .json beyond this is no label.


def read_label(cls: bytes | None, described: bytes | None) -> int | str | None:
    """A class number, a class name, or None where neither member says."""
    label = parse_cls(cls) if cls is not None else None
    if label is None and described is not None:
        label = parse_json(described)
    return label


def parse_cls(data: bytes) -> int | str | None:
    try:
        return _plain(data.decode().strip())
    except UnicodeDecodeError:
        return None


def parse_json(data: bytes) -> int | str | None:
    return _plain(_object(data).get("label"))


def parse_labels(data: bytes) -> tuple[int | str, ...] | None:
    """Several labels without repeats; None where there is no list of them, or something else in it."""
    given = _object(data).get("labels")
    found = [_plain(value) for value in given] if isinstance(given, list) else []
    labels = tuple(dict.fromkeys(label for label in found if label is not None))
    return labels if labels and None not in found else None


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):  # Not JSON, or nested so deep that it is an attack.
        return {}
    return value if isinstance(value, dict) else {}


def _plain(value: object) -> int | str | None:
    if isinstance(value, str):
        # Not isdigit(): "²" is a digit that int() refuses.
        return int(value) if value.isdecimal() and len(value) <= 9 else value or None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31:
        return value
    return None
