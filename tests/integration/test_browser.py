"""What a person sees: the registered model with its versions, alias and metrics in the MLflow UI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.browser import chromium, open_page, visit

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine; .ci/run installs one where apt works"),
]


def test_versions_alias_and_metrics_are_in_the_ui(first: dict[str, Any], tmp_path: Path) -> None:
    version = first["promote"].result.uri.rsplit("/", 1)[1]
    with open_page() as page:
        assert "smoke" in visit(page, "/models", "smoke")
        listed = visit(page, "/models/smoke", f"Version {version}")
        assert "champion" in listed
        picture = tmp_path / "model.png"
        page.screenshot(path=picture)
        assert picture.stat().st_size > 10_000
        shown = visit(page, f"/models/smoke/versions/{version}", "champion")
        assert first["finetune"].result.digest[:12] in shown
        run = first["finetune"].result
        logged = client_experiment(str(run.run_id))
        metrics = visit(page, f"/experiments/{logged}/runs/{run.run_id}", "Metrics")
        assert "val/top1" in metrics
        assert f"{run.metrics['val/top1']:.3}"[:4] in metrics


def client_experiment(run_id: str) -> str:
    from pipelines.tracking.client import connect

    return str(connect().get_run(run_id).info.experiment_id)
