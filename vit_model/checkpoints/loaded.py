"""What every reader returns: tensors under our names beside the description of the model that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vit_model.config import HeadKind, ModelConfig
from vit_model.preprocess import InputSpec, OutputSpec


@dataclass(frozen=True, slots=True)
class Loaded:
    """The config is what the file says or its format implies (Google: tanh GELU; timm: exact): comparable."""

    format: str
    tensors: dict[str, Tensor]
    config: ModelConfig
    head: HeadKind
    num_classes: int  # 0: the file has no head
    input_spec: InputSpec | None = None
    output_spec: OutputSpec | None = None
    unused: tuple[str, ...] = field(default=())  # names in the file that have no place in this model
