"""`WORKFLOW [--STEP.dotted.field VALUE ...]`: what `vit run` and `vit why` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.config import RecipeError
from pipelines.workflow.spec import packaged_workflows

__all__ = ["workflow_arguments"]


def workflow_arguments(verb: str, arguments: Sequence[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The workflow, and {step: {dotted field: value}} from the flags. Values are read as YAML."""
    import yaml

    if not arguments or arguments[0].startswith("-"):
        raise RecipeError(f"vit {verb} needs a workflow: a YAML path or one of {', '.join(packaged_workflows())}")
    name, *flags = arguments
    values: dict[str, dict[str, Any]] = {}
    words = [part for word in flags for part in (word.split("=", 1) if word.startswith("--") else [word])]
    while words:
        flag = words.pop(0)
        step, dot, field = flag.removeprefix("--").partition(".")
        if not flag.startswith("--") or not dot or not field or not words:
            raise RecipeError(f"{flag!r}: a workflow takes flags of the form --STEP.field VALUE")
        text = words.pop(0)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"{flag} {text!r}: not a YAML value: {error}") from None
        # None is how the flags of a single stage write it.
        values.setdefault(step, {})[field.replace("-", "_")] = None if text == "None" else value
    return name, values
