"""What rank 0 leaves for the driver: files of weights, sample predictions, and the outcome, last."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pipelines import identity, store
from pipelines.training.names import OUTCOME, SAMPLES, WEIGHTS, TrainingError
from pipelines.training.state import TrainState
from pipelines.training.validation import Measured

__all__ = ["choices", "hand_over", "write_outcome"]


def choices(state: TrainState, export: str) -> dict[str, Mapping[str, Tensor]]:
    """All weights that could be handed on; TrainingError if the recipe's choice is not among them."""
    found: dict[str, Mapping[str, Tensor]] = {"last": state.evaluated()}
    if state.ema is not None:
        found["ema"] = state.ema.tensors
    if state.best:
        found["best"] = state.best
    if export not in found:
        raise TrainingError("nothing was the best: no validation gave a number; see the curves, or export: last")
    return found


def hand_over(
    attempt: identity.Attempt,
    weights: Mapping[str, Mapping[str, Tensor]],
    export: str,
    write: Callable[[Path, Mapping[str, Tensor]], None],
    measured: Measured | None,
    beat: Callable[[], None],
) -> dict[str, Any]:
    """Upload `weights[export]` as the result and the others beside it; returns the fields of the outcome."""
    fields: dict[str, Any] = {"weights": store.join(attempt.uri, WEIGHTS)}
    others: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="vit-export-") as folder:
        for kind, tensors in weights.items():
            name = WEIGHTS if kind == export else WEIGHTS.replace(".", f"-{kind}.", 1)
            write(Path(folder) / name, tensors)
            attempt.check()
            store.upload(Path(folder) / name, store.join(attempt.uri, name))
            beat()
            if kind != export:
                others[kind] = store.join(attempt.uri, name)
                continue
            with (Path(folder) / name).open("rb") as file:
                fields["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if measured is not None and measured.samples:
            from safetensors.torch import save_file

            save_file({name: part.contiguous() for name, part in measured.samples.items()}, Path(folder) / SAMPLES)
            fields["samples"] = store.join(attempt.uri, SAMPLES)
            store.upload(Path(folder) / SAMPLES, fields["samples"])
    if measured is not None:
        fields["confusion"] = measured.confusion
    return fields | ({"others": others} if others else {})


def write_outcome(attempt: identity.Attempt, **fields: Any) -> None:
    store.write_json(store.join(attempt.uri, OUTCOME), fields)
