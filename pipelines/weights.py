"""Trained weights that a recipe refers to: a file, a model version, or what a stage returned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import identity, store

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus
    from pipelines.training.config import DistillConfig, TrainConfig

__all__ = ["Weights", "fetch_teacher", "fetch_weights", "named"]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights on this machine."""

    path: Path
    digest: str  # sha256 of the file: the same run may have made others with `--again`.
    lineage: dict[str, str]


def fetch_weights(reference: str, folder: Path, field: str = "weights") -> Weights:
    """Raises ValueError, naming the recipe's field, if there is no such object."""
    from pipelines.tracking.package import sha256_of

    if reference.startswith("models:/"):
        from pipelines.tracking.registry import fetch_version

        version = fetch_version(reference, folder)
        lineage = {
            "vit.pretrain_digest": version.digest,
            "vit.pretrain_run_id": version.run_id,
            "vit.weights": version.uri,
        }
        return Weights(version.weights, sha256_of(version.weights), lineage)
    try:
        path = store.download(reference, folder / reference.rstrip("/").rsplit("/", 1)[-1])
    except store.NotFound:
        raise ValueError(
            f"{field}={reference!r}: there is no such object; give what `vit pretrain` returned, or check the name"
        ) from None
    digest = sha256_of(path)
    try:
        made_by = identity.result_of(reference)
    except ValueError:  # Not made by a stage of ours: the content speaks for itself.
        return Weights(path, digest, {"vit.weights": reference, "vit.weights_digest": digest})
    lineage = {
        "vit.pretrain_digest": made_by.digest,
        "vit.pretrain_run_id": made_by.run_id or "",
        "vit.weights": reference,
    }
    return Weights(path, digest, lineage)


def fetch_teacher(distill: DistillConfig | None, train: TrainConfig, corpus: Corpus, folder: Path) -> Weights | None:
    """The teacher of a distillation; raises ValueError if it does not know the classes of the corpus."""
    if distill is None:
        return None
    from pipelines.training.teacher import check_teacher
    from vit_model import OutputSpec

    fetched = fetch_weights(distill.teacher, folder / "teacher", "distill.teacher")
    check_teacher(fetched.path, OutputSpec(class_names=corpus.class_names, activation=train.loss))
    lineage = {"vit.teacher": distill.teacher, "vit.teacher_digest": fetched.digest}
    return Weights(fetched.path, fetched.digest, lineage)


def named(teacher: Weights | None) -> dict[str, str]:
    """What it adds to the inputs of an identity; nothing without a teacher, so that no old digest changes."""
    return {} if teacher is None else {"teacher": teacher.digest}
