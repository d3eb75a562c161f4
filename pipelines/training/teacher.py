"""The teacher of a distillation, from its file of weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines import store
from pipelines.training.config import DistillConfig, TrainConfig
from pipelines.training.distill import Teacher, match_classes
from vit_model import InputSpec, OutputSpec, load_model, normalize, read_specs

__all__ = ["check_teacher", "load_teacher"]


def check_teacher(path: Path, student: OutputSpec) -> None:
    """Raises ValueError if the file says other classes than the student has, or none."""
    _, _, output_spec = read_specs(path)
    if output_spec is None:
        raise ValueError(
            f"teacher {path.name} does not say its classes; take weights that a stage of this project wrote"
        )
    match_classes(student.class_names, output_spec.class_names)


def load_teacher(
    uri: str,
    config: DistillConfig,
    train: TrainConfig,
    student: OutputSpec,
    student_input: InputSpec,
    device: torch.device,
) -> Teacher:
    """Each rank loads its own whole copy; it sees the student's pixels, resized to its own size where that differs."""
    with tempfile.TemporaryDirectory(prefix="vit-teacher-") as folder:
        path = store.download(uri, Path(folder) / uri.rsplit("/", 1)[-1])
        _, input_spec, output_spec = read_specs(path)
        model = load_model(path).to(device)
    if train.precision == "bf16_pure":
        model = model.to(torch.bfloat16)
    assert output_spec is not None, "the stage has checked the teacher"
    places = match_classes(student.class_names, output_spec.class_names)
    spec = input_spec or student_input
    size = (spec.height, spec.width)

    def prepare(images: Tensor) -> Tensor:
        pixels = normalize(images, spec, torch.float32)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return pixels

    columns = None if places is None else torch.tensor(places, device=device)
    return Teacher(model, config, prepare, columns)
