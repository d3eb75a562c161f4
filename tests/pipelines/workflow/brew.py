"""A stage as small as one can be, with all that a stage has: recipe, identity, lease, result. For these tests."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipelines import store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, StageResult, run_stage

STAGE = "brew"
VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BrewRecipe(Strict):
    leaf: str = "assam"  # What is brewed.
    minutes: int = 4  # How long.
    water: str | None = input_(default=None)  # The output of another brew.
    trouble: str = how(default="")  # An error to raise, by name.
    notes: str = how(default="")  # A file that counts the runs.

    def __post_init__(self) -> None:
        if self.minutes < 1:
            raise ValueError(f"minutes={self.minutes}: tea needs at least 1; try 4")


def run(recipe: BrewRecipe) -> StageResult:
    inputs = {"water": hashlib.sha256(store.read(recipe.water)).hexdigest()} if recipe.water else {}

    def work(attempt: Attempt) -> StageResult:
        if recipe.notes:
            with Path(recipe.notes).open("a") as notes:
                notes.write(f"{recipe.leaf}\n")
        match recipe.trouble:
            case "value":
                raise ValueError("the kettle is cold; heat it first")
            case "sleep":
                time.sleep(60)
            case "interrupt once" if (stop := Path(f"{recipe.notes}.{recipe.minutes}")).exists():
                stop.unlink()
                raise KeyboardInterrupt
            case "interrupt":
                raise KeyboardInterrupt
            case "away":
                raise store.StoreError("the store is away")
            case "flaky":
                if Path(recipe.notes).read_text().split().count(recipe.leaf) == 1:
                    raise store.StoreError("the store is away")
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cup")
            case "bug":
                raise TypeError("not a cup")
        uri = store.join(attempt.uri, "cup.txt")
        store.write(uri, f"{recipe.leaf} {recipe.minutes} {inputs}".encode())
        return attempt.result(uri=uri, run_id=None, metrics={"strength": recipe.minutes / 4})

    return run_stage(STAGE, VERSION, recipe, inputs, work)
