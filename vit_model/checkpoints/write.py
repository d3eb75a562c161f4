"""One model, four formats."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from vit_model.build import Model
from vit_model.checkpoints.match import state_of
from vit_model.checkpoints.native import write_native
from vit_model.checkpoints.read import Format
from vit_model.preprocess import InputSpec, OutputSpec


def write_weights(
    model: Model,
    path: Path,
    format: Format,
    input_spec: InputSpec | None,
    output_spec: OutputSpec | None,
    accept: Collection[str],
) -> None:
    match format:
        case "native":
            write_native(
                path, state_of(model), model.config, model.head.kind, model.head.num_classes, input_spec, output_spec
            )
        case _:
            raise ValueError(f"format={format!r} is not one of 'native', 'google', 'timm', 'huggingface'")
