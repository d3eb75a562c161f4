"""Every packaged recipe loads, says in its first line what it is for, and belongs to one stage or is a workflow."""

from __future__ import annotations

import pytest

from pipelines.config import find_recipe, packaged_recipes
from pipelines.why import stage_of
from pipelines.workflow.spec import load_workflow
from pipelines.workflow.stages import STAGES


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_loads(name: str) -> None:
    if name.startswith("workflows/"):
        assert load_workflow(name).steps
    else:
        assert stage_of(name) in STAGES


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_says_what_it_is_for(name: str) -> None:
    first = find_recipe(name).read_text().splitlines()[0]
    assert first.startswith("# ") and len(first) > 20
