"""Which images form a step and what decodes them: the same from the first step of a run to its last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.identity import CannotResume

__all__ = ["RunOrder"]

FIXED_AT_START = ("lanes", "window_pages")  # Chosen when a run starts; later starts might choose otherwise.
FIRST_WINDOW_PAGES = 4  # Of the checkpoints that do not say it.


class RunOrder:
    """What this start chose, until a checkpoint says what the run began with."""

    def __init__(self, fields: Mapping[str, Any], engine: str) -> None:
        """`fields`: corpus digest, split, seed, batch size, lanes, pages of a window; `engine`: by its pixels."""
        self.fields: dict[str, Any] = dict(fields)
        self.engine = engine

    def take_over(self, uri: str, state: Mapping[str, Any]) -> None:
        """Go on with the order of the checkpoint at `uri`; raises CannotResume where images would not be the same."""
        stored = {"window_pages": FIRST_WINDOW_PAGES, **state.get("order", {})}
        chosen = {name: stored.get(name) for name in FIXED_AT_START}
        if {**self.fields, **chosen} != stored:
            raise CannotResume(f"{uri} was made with another order of images; begin anew with --again")
        self.fields.update(chosen)
        engine = state.get("engine", self.engine)  # Not there: an earlier release wrote it.
        if engine != self.engine:
            raise CannotResume(
                f"{uri} was made with the decode engine {engine}, here is {self.engine}: pixels would change in the "
                "middle of the run; install those versions again, or begin anew with --again"
            )

    def to_json(self) -> dict[str, Any]:
        return {"order": self.fields, "engine": self.engine}
