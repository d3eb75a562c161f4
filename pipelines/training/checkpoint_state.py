"""What state.json of a checkpoint must be before anybody goes by it: other types would end a worker far from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["problem_of"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_order(value: Any) -> bool:
    names = ("lanes", "window_pages")
    return isinstance(value, dict) and all(
        type(value[name]) is int and value[name] > 0 for name in names & value.keys()
    )


def _is_best(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    measured, step = value.get("value"), value.get("step")
    return (
        (measured is None or isinstance(measured, int | float))
        and (step is None or _is_count(step))
        and _is_count(value.get("without_best", 0))
    )


def _is_points(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and isinstance(point[0], dict) and _is_count(point[1])
        for point in value
    )


FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "order": _is_order,
    "engine": lambda value: isinstance(value, str),
    "best": _is_best,
    "left_out": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "curves": _is_points,
    "dollars": lambda value: isinstance(value, int | float),
    "per_device_batch_size": lambda value: value is None or (_is_count(value) and value > 0),
    "ended": lambda value: isinstance(value, bool),
}


def problem_of(state: Mapping[str, Any]) -> str | None:
    """What is wrong with a field that a start goes by; None: nothing. Fields may be missing, as in older releases."""
    for name, is_right in FIELDS.items():
        if name in state and not is_right(state[name]):
            return f"{name}={str(state[name])[:80]} is none of ours"
    return None
