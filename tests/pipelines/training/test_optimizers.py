from __future__ import annotations

import pytest
import torch

from pipelines.training.config import Adam, AdamW, MuonAdamW, Sgd
from pipelines.training.muon import Muon, orthogonal
from pipelines.training.optimizers import build_optimizers, is_kernel, set_lr
from tests.pipelines.training.tiny import TinyModel


def test_only_kernels_decay() -> None:
    model = TinyModel()
    decayed = {name for name, parameter in model.named_parameters() if is_kernel(name, parameter)}
    assert decayed == {"patch_embedding.weight", "blocks.0.qkv.weight", "blocks.1.qkv.weight", "head.weight"}
    (optimizer,) = build_optimizers(model, AdamW(weight_decay=0.3))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {decays[id(parameter)] for name, parameter in model.named_parameters() if name in decayed} == {0.3}
    assert {decays[id(parameter)] for name, parameter in model.named_parameters() if name not in decayed} == {0.0}


@pytest.mark.parametrize("config", [AdamW(), Adam(), Sgd(), MuonAdamW()], ids=lambda config: config.kind)
def test_every_parameter_has_exactly_one_owner_and_moves(config: AdamW | Adam | Sgd | MuonAdamW) -> None:
    model = TinyModel()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, config)
    owned = [parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(optimizers, config.peak_lr)
    for optimizer in optimizers:
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_two_optimizers_keep_the_ratio_of_their_rates() -> None:
    optimizers = build_optimizers(TinyModel(), MuonAdamW(peak_lr=0.02, adamw_lr=0.001))
    set_lr(optimizers, 0.01)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == pytest.approx(
        [0.01, 0.0005, 0.0005]
    )


def test_newton_schulz_brings_all_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 16, 64)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_treats_fused_q_k_v_as_three_matrices() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(24, 8)
    fused = torch.nn.Parameter(torch.zeros(24, 8))
    split = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    fused.grad = gradient.clone()
    for part, piece in zip(split, gradient.chunk(3), strict=True):
        part.grad = piece.clone()
    Muon([{"params": [fused]}], 0.1, 0.9, 0.0).step()
    Muon([{"params": split}], 0.1, 0.9, 0.0).step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in split]))


def test_muon_is_refused_for_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="no matrix inside blocks; use kind: adamw"):
        build_optimizers(torch.nn.Linear(3, 3), MuonAdamW())


@pytest.mark.parametrize("values", [{"peak_lr": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}])
def test_values_that_cannot_train_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdamW(**values)  # type: ignore[arg-type]
