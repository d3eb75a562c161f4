"""One MLflow run per stage run: the recipe as parameters, curves, pictures, and tags that lead to the result object.

MLflow mirrors the run; the truth is the result object in the store. Everything goes by explicit run id (MLflow's fluent
API is thread-local), so a worker process may `Run.attach` to the run its driver opened.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipelines import config, identity, store
from pipelines.tracking.client import TrackingError, connect, first_line, is_passing, tracking_uri, unreachable
from pipelines.tracking.metrics import SPOOL, MetricSender

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun
    from mlflow.tracking import MlflowClient

    from pipelines.identity import Attempt

__all__ = ["CorpusLike", "Run", "TrackingError", "track"]

log = logging.getLogger(__name__)

MAX_VALUE = 6000  # Characters of a parameter. MLflow cuts longer ones without a word.
MAX_TAG = 8000
PER_CALL = 100  # Parameters or tags of one log-batch call.


class CorpusLike(Protocol):
    """What tracking needs to know of a corpus (pipelines.corpus.manifest.Corpus)."""

    @property
    def uri(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def splits(self) -> Mapping[str, int]: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...


class Run:
    """An open MLflow run. A failure of MLflow after the start is said and never stops the stage."""

    def __init__(self, client: MlflowClient, run_id: str, experiment_id: str, spool: str | None) -> None:
        self.id = run_id
        self.experiment_id = experiment_id
        self.client = client
        self._sender = MetricSender(client, run_id, spool)

    @classmethod
    def attach(cls, run_id: str, attempt: Attempt | None = None) -> Run:
        """The same run from another process, such as a training worker. Call `close` at the end."""
        client = connect()
        info = _ask(lambda: client.get_run(run_id)).info
        return cls(client, run_id, info.experiment_id, attempt.uri if attempt else None)

    @property
    def url(self) -> str:
        """Where a browser finds this run."""
        return f"{tracking_uri()}/#/experiments/{self.experiment_id}/runs/{self.id}"

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Queue points; a thread sends them. Costs microseconds, also while the server is down."""
        self._sender.add(values, step)

    def last_steps(self) -> dict[str, int]:
        """The last step at which MLflow has each curve: a resumed stage logs only what comes after."""
        self._sender.send()
        data = _ask(lambda: self.client.get_run(self.id)).data
        # The only cheap way to the step: the public `data.metrics` drops it, the history has every point.
        return {metric.key: int(metric.step) for metric in data._metric_objs}

    def last_step(self, key: str) -> int:
        """Of one curve; -1 if MLflow has none."""
        return self.last_steps().get(key, -1)

    def history(self, key: str) -> list[tuple[int, float]]:
        """Points of a curve as MLflow has them, by step; empty where it has none or does not answer."""
        points: list[tuple[int, float]] = []
        self._try(
            lambda: points.extend((point.step, point.value) for point in self.client.get_metric_history(self.id, key)),
            f"history of {key}",
        )
        return sorted(points)

    def log_figure(self, figure: Any, name: str) -> None:
        """A matplotlib figure as figures/NAME.png."""
        from pipelines.tracking.figures import boxes_for_unknown_letters

        with boxes_for_unknown_letters():
            self._try(lambda: self.client.log_figure(self.id, figure, f"figures/{name}.png"), f"figure {name}")

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._try(lambda: self.client.log_artifact(self.id, str(path), folder or None), f"artifact {path.name}")

    def log_text(self, text: str, name: str) -> None:
        self._try(lambda: self.client.log_text(self.id, text, name), f"artifact {name}")

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._try(lambda: _set_tags(self.client, self.id, tags), f"tags {', '.join(tags)}")

    def flush(self) -> bool:
        """Send what is queued now; False when MLflow did not take it."""
        return self._sender.send()

    def close(self) -> None:
        """Send the rest. What MLflow does not take within seconds is spooled beside the attempt, and that is said."""
        self._sender.close()

    def _try(self, call: Callable[[], object], what: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            call()
        except (MlflowException, OSError) as error:
            # A picture is worth less than the training run that made it.
            log.warning("%s: MLflow did not do it: %s", what, first_line(error))


@contextmanager
def track(
    attempt: Attempt, recipe: Any, *, corpus: CorpusLike | None = None, tags: Mapping[str, str] | None = None
) -> Iterator[Run]:
    """Open the MLflow run of this stage run, or go on with the one that an earlier attempt left unfinished.

    Raises TrackingError if MLflow does not answer at the start. Ends FINISHED, FAILED or KILLED.
    """
    client = connect()
    run_id, experiment_id = _ask(lambda: _open(client, attempt, recipe, corpus, tags or {}))
    run = Run(client, run_id, experiment_id, attempt.uri)
    _resend(run, attempt)
    status = "FINISHED"
    try:
        yield run
    except identity.LeaseLost:
        status = ""  # The attempt that took over goes on with this run: its state is not ours to set.
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException as error:
        status = "FAILED"
        run.set_tags({"vit.error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        run.close()
        if status:
            run._try(lambda: client.set_terminated(run.id, status), f"status {status}")


def _ask(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        if is_passing(error):
            raise unreachable(error) from error
        raise


def _open(
    client: MlflowClient, attempt: Attempt, recipe: Any, corpus: CorpusLike | None, tags: Mapping[str, str]
) -> tuple[str, str]:
    experiment_id = _experiment(client, attempt.stage)
    own = {
        "vit.stage": attempt.stage,
        "vit.digest": attempt.digest,
        "vit.code": identity.code_fingerprint(),
        "vit.attempt": str(attempt.number),
        "vit.place": attempt.root,
        "mlflow.source.name": f"vit {attempt.stage}",
        "mlflow.source.type": "JOB",
        **({"vit.corpus": f"{corpus.uri}@{corpus.digest}", "vit.corpus_digest": corpus.digest} if corpus else {}),
        **tags,
    }
    former = _former(client, experiment_id, attempt)
    if former is None:
        name = f"{attempt.stage}-{attempt.digest[:12]}"
        run_id = client.create_run(experiment_id, tags={"vit.digest": attempt.digest}, run_name=name).info.run_id
        known: dict[str, str] = {}
    else:
        run_id = former.info.run_id
        known = dict(former.data.params)
        client.update_run(run_id, status="RUNNING")
    _set_tags(client, run_id, own)
    _log_params(client, run_id, attempt, recipe, known)
    client.log_text(run_id, config.to_yaml(recipe), "recipe.yaml")
    if corpus is not None:
        _log_corpus(client, run_id, corpus, "train" if attempt.stage in {"pretrain", "finetune"} else "eval")
    return run_id, experiment_id


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # Another stage made it in the meantime.
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} was deleted; restore it in the MLflow UI or with `mlflow experiments restore`"
        )
    return str(found.experiment_id)


def _former(client: MlflowClient, experiment_id: str, attempt: Attempt) -> MlflowRun | None:
    """The newest run of this digest; after `--again` only one that an attempt since then has written to."""
    found = client.search_runs(
        [experiment_id],
        f"tags.`vit.digest` = '{attempt.digest}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found and is_since(found[0].data.tags, attempt) else None


def is_since(tags: Mapping[str, str], attempt: Attempt) -> bool:
    """Whether what carries these tags belongs to the same computation: `--again` has not begun anew since."""
    number = tags.get("vit.attempt", "1")
    return not number.isdecimal() or int(number) >= attempt.first


def _log_params(client: MlflowClient, run_id: str, attempt: Attempt, recipe: Any, known: Mapping[str, str]) -> None:
    """Parameters are write-once in MLflow; a later attempt may differ in `how` fields, which go to a tag."""
    from mlflow.entities import Param

    params = as_params(config.flatten(recipe))
    new = [Param(key, value) for key, value in params.items() if key not in known]
    for start in range(0, len(new), PER_CALL):
        client.log_batch(run_id, params=new[start : start + PER_CALL])
    changed = {key: value for key, value in params.items() if key in known and known[key] != value}
    if changed:
        _set_tags(client, run_id, {f"vit.changed.a{attempt.number}": json.dumps(changed, ensure_ascii=False)})


def as_params(flat: Mapping[str, Any]) -> dict[str, str]:
    """Parameter names and texts that MLflow takes; what is too long says so and points to recipe.yaml."""
    params: dict[str, str] = {}
    for key, value in flat.items():
        name = re.sub(r"[^\w.\- :/]", "_", key)
        if name != key or len(name) > 250 or name in params or name.startswith(("/", ".")):
            # The hash keeps two names apart that become one.
            name = f"{name.lstrip('/.')[:200]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if len(text) > MAX_VALUE:
            text = f"{text[:200]} ... ({len(text):,} characters; the whole value is in recipe.yaml)"
        params[name] = text
    return params


def _set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    rows = [
        RunTag(key, text if len(text) <= MAX_TAG else f"{text[: MAX_TAG - 60]} ... ({len(text):,} characters, cut)")
        for key, text in ((key, str(value)) for key, value in tags.items())
    ]
    for start in range(0, len(rows), PER_CALL):
        client.log_batch(run_id, tags=rows[start : start + PER_CALL])


def _log_corpus(client: MlflowClient, run_id: str, corpus: CorpusLike, context: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {"samples": dict(corpus.splits), "classes": len(corpus.class_names), "digest": corpus.digest}
    dataset = Dataset(
        name=corpus.uri.rstrip("/").rsplit("/", 1)[-1],
        digest=corpus.digest[:36],  # MLflow's limit; the whole digest is in the tag and in the profile.
        source_type="s3" if store.is_s3(corpus.uri) else "local",
        source=json.dumps({"uri": f"{corpus.uri}@{corpus.digest}"}),
        profile=json.dumps(profile),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])


def _resend(run: Run, attempt: Attempt) -> None:
    """Send the metric points that an earlier attempt could not."""
    for info in list(store.list_objects(store.join(attempt.root, "attempts"))):
        if info.uri.rsplit("/", 1)[-1].startswith(SPOOL):
            points = run._sender.resend(store.read_json(info.uri))
            if run.flush():
                store.delete(info.uri)
                log.info("%d metric points of an earlier attempt sent to MLflow", points)
