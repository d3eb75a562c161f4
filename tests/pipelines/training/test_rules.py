from __future__ import annotations

from typing import Any

import pytest

from pipelines.config import RecipeError, from_dict
from pipelines.fit import check_model
from pipelines.identity import deciding_fields
from pipelines.pretrain import PretrainRecipe
from pipelines.training.config import AdamW, MuonAdamW, ParallelConfig, TrainConfig
from pipelines.training.rules import check_together, check_workers
from vit_model import variant

BASE: dict[str, Any] = {"corpus": "c", "model": {"variant": "Ti/16"}, "train": {"batch_size": 16, "total_steps": 60}}


def recipe(**changes: Any) -> PretrainRecipe:
    values = {**BASE, **{name: {**BASE.get(name, {}), **value} for name, value in changes.items()}}
    return from_dict(PretrainRecipe, values)


def check(given: PretrainRecipe) -> None:
    check_together(given.train, given.optimizer, given.schedule, given.validation, given.parallel, given.workers)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train": {"export": "best"}}, "export: best needs validation.best"),
        ({"validation": {"best": {"metric": "ema/top1"}}}, "needs an average; add train.ema"),
        ({"optimizer": {"kind": "schedule_free"}}, "set decay: constant"),
        (
            {"optimizer": {"kind": "schedule_free"}, "schedule": {"decay": "constant"}, "train": {"ema": {}}},
            "averages what optimizer kind: schedule_free averages itself",
        ),
        ({"optimizer": {"kind": "muon"}, "parallel": {"kind": "fsdp"}}, "needs whole matrices"),
        ({"optimizer": {"kind": "lamb"}, "parallel": {"kind": "hsdp"}}, "needs whole tensors"),
        ({"schedule": {"end_lr": 1.0}}, "the rate would rise to the end"),
        ({"parallel": {"kind": "fsdp"}, "workers": {"count": 1}}, "there may be one alone"),
        ({"parallel": {"kind": "fsdp"}, "workers": {"count": [1, 8]}}, "there may be one alone"),
        ({"parallel": {"kind": "hsdp", "replicas": 3}, "workers": {"count": 4}}, "replicas=3 does not divide 4"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_with_the_remedy(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(recipe(**changes))
    check(recipe())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"train": {"export": "ema"}}, "export: ema needs an average"),
        ({"train": {"per_device_batch_size": 0}}, "give 1 or more, or auto"),
        ({"train": {"per_device_batch_size": "most"}}, "per_device_batch_size"),
        ({"train": {"ema": {"decay": 1.0}}}, "decay=1.0 is outside"),
        ({"train": {"class_weights": {"a": -1.0}}}, "class_weights.a=-1.0"),
        ({"validation": {"best": {"patience": 0}}}, "patience=0"),
        ({"validation": {"best": {}, "every_epochs": 3.0}}, "no effect beside best.every_epochs"),
        ({"parallel": {"replicas": 2}}, "replicas=2 has no effect with kind: ddp"),
        ({"distill": {"teacher": "t", "target": "hard", "temperature": 2.0}}, "no effect with target: hard"),
        ({"workers": {"hang_seconds": 0}}, "hang_seconds=0"),
        ({"workers": {"max_failures": -5}}, "max_failures=-5"),
        ({"workers": {"cpus": -1.0}}, "cpus=-1.0"),
        ({"workers": {"resize_seconds": float("nan")}}, "resize_seconds=nan"),
        ({"workers": {"dollars_per_hour": float("inf")}}, "dollars_per_hour=inf"),
        ({"train": {"grad_clip": float("inf")}}, "grad_clip=inf"),
        ({"model": {"dropout": 2.0}}, "dropout=2.0 is outside"),
        ({"model": {"drop_path": float("nan")}}, "drop_path=nan is outside"),
        ({"optimizer": {"kind": "lamb", "weight_decay": 0.0}}, "turns LAMB into Adam"),
        ({"workers": {"node_load_seconds": 0.0}}, "node_load_seconds=0.0"),
        ({"validation": {"batch_size": 0}}, "batch_size=0 is less than one image"),
        ({"train": {"total_steps": None, "epochs": float("inf")}}, "epochs=inf"),
        ({"optimizer": {"kind": "adamw", "weight_decay": float("nan")}}, "weight_decay=nan"),
        ({"optimizer": {"kind": "adamw", "eps": -1.0}}, "eps=-1.0"),
        ({"optimizer": {"kind": "adamw", "peak_lr": float("inf")}}, "peak_lr=inf"),
        ({"optimizer": {"kind": "sgd", "momentum": 0.0, "nesterov": True}}, "nesterov=True has no effect"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(**changes)
    assert text in str(error.value)


def test_how_a_run_is_done_decides_nothing_and_what_it_learns_from_does() -> None:
    base = deciding_fields(recipe())
    how = recipe(
        train={
            "per_device_batch_size": "auto",
            "compile": True,
            "activation_checkpointing": True,
            "non_finite": "rollback",
        },
        parallel={"kind": "hsdp", "replicas": 2},
        workers={"hang_seconds": None},
    )
    assert deciding_fields(how) == base
    for what in (
        {"train": {"ema": {}}},
        {"train": {"precision": "bf16_pure"}},
        {"train": {"class_weights": {"a": 2.0}}},
        {"optimizer": {"kind": "adamw", "layer_decay": 0.75}},
        {"validation": {"best": {}}},
        {"distill": {"teacher": "t"}},
    ):
        assert deciding_fields(recipe(**what)) != base


@pytest.mark.parametrize(
    ("parallel", "workers", "text"),
    [
        ({"kind": "fsdp"}, (1, 1), "give workers.count: 2 or more"),
        ({"kind": "fsdp"}, (1, 8), r"give workers.count: \[2, 8\] or more"),
        ({"kind": "hsdp", "replicas": 3}, (4, 4), "replicas=3 does not divide 4 workers"),
        ({"kind": "hsdp", "replicas": 2}, (2, 4), "every number of workers from 2 to 4"),
    ],
)
def test_workers_that_cannot_share_the_weights_are_refused_by_the_driver(
    parallel: dict[str, Any], workers: tuple[int, int], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        check_workers(ParallelConfig(**parallel), *workers)
    check_workers(ParallelConfig(kind="hsdp", replicas=2), 4, 4)
    check_workers(ParallelConfig(), 1, 8)


def test_what_a_resnet_does_not_have_is_refused_by_the_driver() -> None:
    bit, train = variant("R26x1"), TrainConfig(total_steps=1)
    check_model(train, bit, AdamW())
    for given, optimizer in (
        (TrainConfig(total_steps=1, activation_checkpointing=True), AdamW()),
        (train, AdamW(layer_decay=0.7)),
        (train, MuonAdamW()),
    ):
        with pytest.raises(ValueError, match="ResNet"):
            check_model(given, bit, optimizer)
        check_model(given, variant("Ti/16"), optimizer)
