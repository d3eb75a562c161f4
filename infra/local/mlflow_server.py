"""Run the MLflow server in this one process: `mlflow server` keeps a second Python of 200 MB that only waits.

Started as a script: DATABASE ARTIFACTS_URI PORT LOG. Host checks and the rest come by MLflow's own variables.
"""

from __future__ import annotations

import logging.config
import os
import sys
import uuid
import warnings

LOG_BYTES = 8 << 20


def main(database: str, artifacts: str, port: int, log: str) -> None:
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import uvicorn
    from mlflow.server import constants, handlers

    uri = f"sqlite:///{database}"
    # The names that `mlflow server` hands to its worker; imported, so that a renamed one fails here and not in silence.
    os.environ |= {
        constants.BACKEND_STORE_URI_ENV_VAR: uri,
        constants.REGISTRY_STORE_URI_ENV_VAR: uri,
        constants.ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
        constants.ARTIFACTS_DESTINATION_ENV_VAR: artifacts,
        constants.SERVE_ARTIFACTS_ENV_VAR: "true",
        "_MLFLOW_SERVER_BOOT_ID": uuid.uuid4().hex,
        "_MLFLOW_IN_JOB_EXECUTOR": "false",
        "_MLFLOW_SGI_NAME": "uvicorn",
    }
    handlers.initialize_backend_stores(uri, uri, "mlflow-artifacts:/")
    handler = {
        "class": "logging.handlers.RotatingFileHandler",
        "filename": log,
        "maxBytes": LOG_BYTES,
        "backupCount": 1,
        "formatter": "line",
    }
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
        "handlers": {"file": handler},
        "root": {"handlers": ["file"], "level": "INFO"},
        "loggers": {"uvicorn.access": {"level": "WARNING"}, "mlflow": {"propagate": True, "handlers": []}},
    }
    logging.config.dictConfig(settings)
    uvicorn.run("mlflow.server.fastapi_app:app", host="127.0.0.1", port=port, workers=1, log_config=None)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
