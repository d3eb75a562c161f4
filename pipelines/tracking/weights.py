"""What a recipe's `model` or `weights` may name: a registered version, or a safetensors file in the store."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from pipelines import identity, store
from pipelines.tracking.client import TrackingError
from pipelines.tracking.package import WEIGHTS, check_safetensors, sha256_of
from pipelines.tracking.registry import VersionInfo, fetch_version, find_version, is_version

__all__ = ["ModelSource", "fetch_weights", "find_weights"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Resolved once at the start: an alias that moves later changes nothing for this run. Picklable."""

    uri: str  # "models:/NAME/VERSION", never an alias; or where the file is.
    digest: str  # sha256 of the weights: one stage run may have made several with `--again`.
    version: VersionInfo | None = None

    def inputs(self, field: str = "model") -> dict[str, str]:
        """For the identity. The same weights registered under two names are two things to promote."""
        named = {} if self.version is None else {f"{field}.registered_as": self.version.name}
        return {field: self.digest, **named}


def find_weights(reference: str) -> ModelSource:
    """Resolve "models:/NAME/VERSION", "models:/NAME@ALIAS", a stage run's URI, or a safetensors file anywhere."""
    if is_version(reference):
        version = find_version(reference)
        return ModelSource(version.uri, version.tags.get("vit.weights_sha256") or version.digest, version)
    if "/runs/" in reference and not reference.endswith(".safetensors"):
        result = identity.result_of(reference)
        inner = str(result.details.get("weights") or result.uri)
        if inner == reference:
            raise TrackingError(f"{reference} is the result of a {result.stage} run, which has no weights")
        return find_weights(inner)
    try:
        result = identity.result_of(reference)
        if reference == result.details.get("weights") and (digest := result.details.get("weights_sha256")):
            return ModelSource(reference, str(digest))
    except ValueError:
        pass  # Not the result of a stage run.
    with tempfile.TemporaryDirectory(prefix="vit-weights-") as folder:
        path = store.download(reference, Path(folder) / WEIGHTS)
        check_safetensors(path)
        return ModelSource(reference, sha256_of(path))


def fetch_weights(source: ModelSource, folder: Path) -> Path:
    """A local safetensors file, checked; no code of a version is fetched or run."""
    if source.version is not None:
        return fetch_version(source.uri, folder).weights
    path = store.download(source.uri, folder / WEIGHTS)
    check_safetensors(path)
    return path
