"""The driver of a pretraining in a process that can be interrupted, with a trace of what every rank was given.

python -m tests.chaos.driver RECIPE FOLDER    (in the root of the environment, which `vit` itself would not keep)
"""

from __future__ import annotations

import sys
from pathlib import Path

from pipelines import pretrain
from pipelines.config import load_recipe
from pipelines.training import worker
from tests.chaos.strikes import struck

if __name__ == "__main__":
    recipe, folder = sys.argv[1:]
    worker.train_worker = struck(Path(folder), [])
    try:
        pretrain.run(load_recipe(pretrain.PretrainRecipe, recipe))
    except KeyboardInterrupt:
        sys.exit(130)
