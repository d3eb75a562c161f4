"""`--again`: what is finished is computed anew. Interrupted, it is resumed by the same command and not begun anew.

A single stage keeps that in its lease (pipelines/identity.py). For a whole workflow an object in the store names the
`--again` that is under way; each result says which one made it, and what this one has made is not made twice.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines import store

if TYPE_CHECKING:
    from pipelines.workflow.spec import Workflow

__all__ = ["TOKEN_VARIABLE", "again", "again_of"]

TOKEN_VARIABLE = "VIT_AGAIN"  # How a job learns which workflow's `--again` it belongs to.


@contextmanager
def again(recompute: bool, token: str | None = None) -> Iterator[None]:
    """Inside the block a finished stage is computed again (`--again`), but for what this `token` has made before."""
    from pipelines.identity import AGAIN, AGAIN_OF

    was = AGAIN.set(recompute), AGAIN_OF.set(token)
    try:
        yield
    finally:
        AGAIN.reset(was[0])
        AGAIN_OF.reset(was[1])


@contextmanager
def again_of(workflow: Workflow) -> Iterator[None]:
    """Around the run of a workflow: under `--again` it goes on with the one that was interrupted, if there is one."""
    from pipelines.identity import AGAIN, AGAIN_OF

    if not AGAIN.get() or AGAIN_OF.get() is not None:
        yield
        return
    uri = _uri(workflow)
    with again(True, _token(workflow, uri)):
        yield
    store.delete(uri)  # Only where the run came to its end.


def _token(workflow: Workflow, uri: str) -> str:
    from pipelines.identity import code_fingerprint
    from pipelines.progress import say

    here = code_fingerprint().split("-")[0]
    try:
        record = store.read_json(uri)
    except store.NotFound:
        record = None
    if record is not None and record["code"] == here:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(float(record["started"])))
        say(f"{workflow.name}: goes on with the --again of {when}; what it has finished is reused")
        return str(record["token"])
    token = uuid.uuid4().hex
    store.write_json(uri, {"token": token, "code": here, "started": time.time()})
    return token


def _uri(workflow: Workflow) -> str:
    """One object for each set of steps: another value of a flag is another run."""
    from pipelines.config import to_dict
    from pipelines.identity import canonical

    steps = canonical(to_dict(workflow)["steps"])
    digest = hashlib.sha256(steps.encode()).hexdigest()
    return store.join(store.root(), "workflows", workflow.name, f"again-{digest[:16]}.json")
