"""Model versions in MLflow: registered once per stage run, and read without ever running their code.

A version carries its lineage as tags: stage run and digest, pretrain run and digest, corpus, code, metrics, sha256 of
the weights. Aliases are moved in pipelines/promote.py alone.
"""

from __future__ import annotations

import difflib
import html
import logging
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines import identity
from pipelines.config import RecipeError
from pipelines.progress import say
from pipelines.tracking.client import TrackingError, connect, first_line, is_passing, tracking_uri, unreachable
from pipelines.tracking.package import WEIGHTS, build_package, check_safetensors, sha256_of
from pipelines.tracking.run import CorpusLike, Run, is_since

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion
    from mlflow.tracking import MlflowClient

    from pipelines.identity import Attempt

__all__ = [
    "ModelVersion",
    "UnknownModel",
    "VersionInfo",
    "alias_target",
    "all_versions",
    "check_model_name",
    "fetch_version",
    "find_version",
    "is_version",
    "register_version",
    "tag_version",
]

T = TypeVar("T")
log = logging.getLogger(__name__)

_REFERENCE = re.compile(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\- ]{0,99}")


class UnknownModel(TrackingError):
    """No such registered model or version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionInfo:
    """A registered version: what it is, without its weights."""

    name: str
    version: str
    digest: str  # Of the stage run that registered it.
    run_id: str  # MLflow run of that stage run.
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion(VersionInfo):
    """A version whose weights have been fetched and checked."""

    weights: Path


def is_version(reference: str) -> bool:
    return reference.startswith("models:/")


def check_model_name(name: str) -> str:
    """The name, or RecipeError: it becomes part of `models:/NAME/VERSION` and of a lease's key."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"model name {name!r}: letters, digits and _ . - and space only, at most 100, first a letter or a digit"
        )
    return name


# Writing ------------------------------------------------------------------------------------------------------------


def register_version(
    run: Run,
    *,
    name: str,
    weights: Path,
    corpus: CorpusLike,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    attempt: Attempt,
) -> str:
    """Register the weights as a version of `name`; returns "models:/NAME/VERSION".

    One stage run has one version: if it is there already it is returned, also when a killed attempt left it. What
    `--again` has trained since becomes a new version if its weights are others.
    """
    check_model_name(name)
    client = connect()
    sha256 = sha256_of(weights)
    for former in _ask(lambda: _versions(client, name, attempt.digest)):
        if former.tags.get("vit.weights_sha256") == sha256 or is_since(former.tags, attempt):
            say(f"model version {former.name}/{former.version} of this run stands already")
            return f"models:/{former.name}/{former.version}"
    lineage = {
        **tags,
        "vit.stage": attempt.stage,
        "vit.digest": attempt.digest,
        "vit.run_id": run.id,
        "vit.attempt": str(attempt.number),
        "vit.code": identity.code_fingerprint(),
        "vit.corpus": f"{corpus.uri}@{corpus.digest}",
        "vit.corpus_digest": corpus.digest,
        "vit.weights_sha256": sha256,
        **metric_tags(metrics),
    }
    if not run.flush():
        log.warning("metrics of run %s are still waiting to be sent", run.id)
    model_id = _ask(lambda: _log_model(client, run, weights, attempt, metrics, lineage))
    attempt.check()  # The version is the commit that others see: never write it for an attempt that lost its lease.
    _ask(lambda: _ensure_model(client, name))
    version = _ask(
        lambda: client.create_model_version(
            name,
            f"models:/{model_id}",
            run_id=run.id,
            model_id=model_id,
            tags=lineage,
            description=describe(metrics, lineage),
            await_creation_for=0,
        )
    )
    say(f"registered {name} version {version.version}: {tracking_uri()}/#/models/{name}/versions/{version.version}")
    return f"models:/{name}/{version.version}"


def _log_model(
    client: MlflowClient,
    run: Run,
    weights: Path,
    attempt: Attempt,
    metrics: Mapping[str, float],
    lineage: Mapping[str, str],
) -> str:
    """Upload the package as a logged model of the run; one that a killed attempt left behind is dropped."""
    from mlflow.entities import LoggedModelOutput

    for orphan in client.search_logged_models([run.experiment_id], f"tags.`vit.digest` = '{attempt.digest}'"):
        if is_since(orphan.tags, attempt):
            client.delete_logged_model(orphan.model_id)
    model = client.create_logged_model(
        run.experiment_id, name="model", source_run_id=run.id, tags=dict(lineage), model_type="image classifier"
    )
    with tempfile.TemporaryDirectory(prefix="vit-model-") as temporary:
        folder = build_package(weights, Path(temporary) / "model", model_id=model.model_id, run_id=run.id)
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(model.model_id, 0)])
    for key, value in metrics.items():
        client.log_metric(run.id, key, float(value), step=max(run.last_step(key), 0), model_id=model.model_id)
    return str(model.model_id)


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, description="Versions are registered by `vit finetune`; `champion` is moved by `vit promote` alone."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def metric_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """Metrics as version tags, for the table of versions in the MLflow UI."""
    return {f"metric.{key}": f"{value:.6g}" for key, value in metrics.items()}


def describe(metrics: Mapping[str, float], lineage: Mapping[str, str]) -> str:
    """Markdown for the version page: metrics first, then where it comes from."""
    rows = [(key, f"{value:.4f}") for key, value in metrics.items()]
    labels = {
        "vit.corpus": "corpus",
        "vit.run_id": f"{lineage.get('vit.stage', 'stage')} run",
        "vit.pretrain_run_id": "pretrain run",
        "vit.pretrain_digest": "pretrain digest",
        "vit.digest": "digest",
        "vit.code": "code",
        "vit.weights_sha256": "weights sha256",
    }
    rows += [(label, lineage[tag]) for tag, label in labels.items() if lineage.get(tag)]
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, "", "How to load it: `docs/models.md`"])


def _cell(text: str) -> str:
    """Names come from users' folders: no markup of theirs may live in the page."""
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", html.escape(text, quote=False)).replace("\n", " ")


def tag_version(version: VersionInfo, tags: Mapping[str, str]) -> None:
    client = connect()

    def write() -> None:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.version, key, value)

    _ask(write)


# Reading ------------------------------------------------------------------------------------------------------------


def find_version(reference: str) -> VersionInfo:
    """Resolve "models:/NAME/VERSION" or "models:/NAME@ALIAS". Raises TrackingError with the nearest names."""
    match = _REFERENCE.fullmatch(reference)
    if not match:
        raise TrackingError(f"{reference!r} names no model version; write models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match.groups()
    client = connect()
    if number is None:
        number = _ask(lambda: _aliases(client, name)).get(alias)
        if number is None:
            known = ", ".join(sorted(_ask(lambda: _aliases(client, name)))) or "none"
            raise TrackingError(
                f"model {name!r} has no alias {alias!r} (it has: {known}); `vit promote` gives {alias!r} to a version "
                "that passes, or name a version: " + f"models:/{name}/1"
            )
    version = _ask(lambda: _known(client, name, lambda: client.get_model_version(name, number)))
    return _info(version)


def all_versions() -> list[VersionInfo]:
    """Every version of every model; raises TrackingError if MLflow does not answer."""
    client = connect()
    found: list[VersionInfo] = []
    token: str | None = None
    while True:
        page = _ask(partial(client.search_model_versions, max_results=1000, page_token=token))
        found += [_info(version) for version in page]
        token = page.token
        if not token:
            return found


def alias_target(name: str, alias: str) -> VersionInfo | None:
    """The version that the alias names now, or None; also None when there is no such model."""
    client = connect()
    try:
        number = _ask(lambda: _aliases(client, name)).get(alias)
    except UnknownModel:
        return None
    return None if number is None else _info(_ask(lambda: client.get_model_version(name, number)))


def fetch_version(reference: str, folder: Path) -> ModelVersion:
    """Download the weights of a version into `folder` and check them. No code of the version is fetched or run."""
    import mlflow.artifacts

    info = find_version(reference)
    client = connect()
    base = _ask(lambda: client.get_model_version_download_uri(info.name, info.version))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path = Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{base}/artifacts/{WEIGHTS}", dst_path=str(folder), tracking_uri=tracking_uri()
            )
        )
    except Exception as error:
        raise TrackingError(
            f"{info.uri} has no readable artifacts/{WEIGHTS}: {first_line(error)}; versions registered by "
            "`vit finetune` have one"
        ) from error
    wanted = info.tags.get("vit.weights_sha256")
    if wanted is not None and sha256_of(path) != wanted:
        path.unlink()
        raise TrackingError(f"{info.uri}: the weights differ from the sha256 in its tag; the artifact was changed")
    check_safetensors(path)
    return ModelVersion(
        name=info.name,
        version=info.version,
        digest=info.digest,
        run_id=info.run_id,
        tags=info.tags,
        weights=path,
    )


def _info(version: MlflowVersion) -> VersionInfo:
    tags = dict(version.tags)
    # A version that others registered has no digest of ours: its name and number stand in for it.
    digest = tags.get("vit.digest") or identity.canonical([version.name, version.version, version.source])
    return VersionInfo(
        name=version.name, version=str(version.version), digest=digest, run_id=version.run_id or "", tags=tags
    )


def _versions(client: MlflowClient, name: str, digest: str) -> list[MlflowVersion]:
    return list(client.search_model_versions(f"name = '{name}' and tags.`vit.digest` = '{digest}'"))


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    found = _known(client, name, lambda: client.get_registered_model(name))
    return {alias: str(number) for alias, number in dict(found.aliases).items()}


def _known(client: MlflowClient, name: str, call: Callable[[], T]) -> T:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = [model.name for model in client.search_registered_models(max_results=500)]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if name not in names and near else ""
        raise UnknownModel(f"{first_line(error)}{hint}; `vit finetune` registers versions") from None


def _ask(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        if not isinstance(error, TrackingError) and is_passing(error):
            raise unreachable(error) from error
        raise
