"""Names of what an attempt leaves in the store, and the error that no second try would mend. Imports nothing."""

from __future__ import annotations

__all__ = ["FAULT", "OUTCOME", "PROGRESS", "SAMPLES", "STARTS", "STOP", "WEIGHTS", "TrainingError"]

FAULT = "fault.json"  # What the last worker that failed died of.
OUTCOME = "outcome.json"  # What rank 0 leaves for the driver, last.
PROGRESS = "progress.json"  # Written by rank 0 while training, read by the driver.
SAMPLES = "samples.safetensors"  # Pictures of the last validation with their predictions.
STARTS = "starts.json"  # The steps from which this attempt's workers started.
STOP = "stop.json"  # Written by the driver, read by rank 0.
WEIGHTS = "weights.safetensors"


class TrainingError(RuntimeError):
    """Training cannot go on, and trying again would end the same way."""
