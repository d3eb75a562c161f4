"""`vit pretrain RECIPE` in a process that can be interrupted, with a trace of what every rank was given.

python -m tests.chaos.driver RECIPE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import cli
from pipelines.training import worker
from tests.chaos.strikes import struck

if __name__ == "__main__":
    recipe, folder = sys.argv[1:]
    worker.train_worker = struck(Path(folder), [])
    sys.exit(cli.main(["pretrain", recipe]))
