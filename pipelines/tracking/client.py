"""The door to the MLflow server: one place that says where it is, how long we wait, and which failures may pass."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipelines import store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["TrackingError", "connect", "first_line", "is_passing", "tracking_uri", "unreachable"]

# MLflow's own defaults (7 retries, factor 2, 120 s a request) can hold a caller for a quarter of an hour.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_SAFETY = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
_QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}

# Codes of MLflow errors that a retry cannot mend.
_LASTING = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "PERMISSION_DENIED",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "UNAUTHENTICATED",
}


class TrackingError(RuntimeError):
    """MLflow cannot be reached, or what was asked of it does not exist."""


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI. Without it MLflow would silently open a database in the working folder."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        store.root()  # Puts the embedded stack's endpoints into the environment, if there are any.
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        raise TrackingError(
            "MLFLOW_TRACKING_URI is not set; `vit up` starts the embedded server and sets it for every `vit` verb, "
            "or set it to your own server, for example http://mlflow.example:5000"
        )
    return uri.rstrip("/")


def connect() -> MlflowClient:
    """A client with our waiting limits; it opens no connection yet."""
    for name, value in (_PATIENCE | _SAFETY | _QUIET).items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    uri = tracking_uri()
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: server down, busy or restarting."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return str(error.error_code) not in _LASTING
    return isinstance(error, OSError)  # requests' exceptions are OSErrors


def unreachable(error: BaseException) -> TrackingError:
    """What a user reads when MLflow does not answer."""
    if "500" in str(error) and (
        lack := store.lack_of_space()
    ):  # The server answers, but what it hands on to the store fails.
        return TrackingError(f"MLflow at {tracking_uri()} cannot store what it is given: {first_line(error)}{lack}")
    return TrackingError(
        f"MLflow at {tracking_uri()} does not answer: {first_line(error)}; `vit status` shows the embedded server and "
        "`vit up` restarts it; with your own server, check MLFLOW_TRACKING_URI"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error: MLflow appends whole stack traces of the server."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
