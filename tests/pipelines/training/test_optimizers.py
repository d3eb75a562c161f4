from __future__ import annotations

import pytest
import torch

from pipelines.training.config import Adam, AdamW, AnyOptimizer, Lamb, MuonAdamW, ScheduleFree, Sgd
from pipelines.training.lamb import Lamb as LambOptimizer
from pipelines.training.muon import Muon, orthogonal
from pipelines.training.optimizers import build_optimizers, is_kernel, set_lr
from pipelines.training.schedule_free import ScheduleFreeAdamW
from tests.pipelines.training.tiny import TinyModel
from vit_model import ViTConfig, build_model


def test_only_kernels_decay() -> None:
    model = TinyModel()
    decayed = {name for name, parameter in model.named_parameters() if is_kernel(name, parameter)}
    assert decayed == {"patch_embedding.weight", "blocks.0.qkv.weight", "blocks.1.qkv.weight", "head.weight"}
    (optimizer,) = build_optimizers(model, AdamW(weight_decay=0.3))
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {decays[id(parameter)] for name, parameter in model.named_parameters() if name in decayed} == {0.3}
    assert {decays[id(parameter)] for name, parameter in model.named_parameters() if name not in decayed} == {0.0}


@pytest.mark.parametrize(
    "config", [AdamW(), AdamW(layer_decay=0.5), Adam(), Sgd(), MuonAdamW(), ScheduleFree(), Lamb()], ids=str
)
def test_every_parameter_has_exactly_one_owner_and_moves(config: AnyOptimizer) -> None:
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
    Muon([{"params": [fused]}], 0.1, 0.9, 0.0, fused=[fused]).step()
    Muon([{"params": split}], 0.1, 0.9, 0.0).step()
    torch.testing.assert_close(fused.detach(), torch.cat([part.detach() for part in split]))


def test_muon_knows_q_k_v_by_name_and_not_by_shape() -> None:
    """An MLP of three times the width has the shape of q, k and v."""
    model = build_model(ViTConfig(resolution=8, patch_size=4, width=12, depth=1, mlp_dim=36, num_heads=2), 3, seed=0)
    muon = build_optimizers(model, MuonAdamW())[0]
    assert isinstance(muon, Muon)
    fused = {name for name, parameter in model.named_parameters() if id(parameter) in muon._fused}
    assert len(fused) == 1 and fused.pop().endswith("qkv.weight")


def test_muon_is_refused_for_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match="no matrix inside blocks; use kind: adamw"):
        build_optimizers(torch.nn.Linear(3, 3), MuonAdamW())


def test_layers_near_the_input_learn_slower() -> None:
    model = TinyModel()
    optimizers = build_optimizers(model, AdamW(peak_lr=1.0, layer_decay=0.5, weight_decay=0.3))
    set_lr(optimizers, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizers[0].param_groups for p in group["params"]}
    decays = {names[id(p)]: group["weight_decay"] for group in optimizers[0].param_groups for p in group["params"]}
    assert rates["head.bias"] == rates["head.weight"] == pytest.approx(0.1)
    assert rates["blocks.1.qkv.weight"] == rates["blocks.1.norm.bias"] == pytest.approx(0.05)
    assert rates["blocks.0.qkv.weight"] == pytest.approx(0.025)
    assert rates["patch_embedding.weight"] == rates["position_embedding"] == pytest.approx(0.0125)
    assert {name for name, decay in decays.items() if decay} == {
        name for name, parameter in model.named_parameters() if is_kernel(name, parameter)
    }


def test_schedule_free_is_its_three_sequences_written_out() -> None:
    """Against algorithm 1 of the paper with x, y and z kept apart, in float64, with a warm-up."""
    torch.manual_seed(0)
    start, decay, (mix, decay2), eps = torch.randn(5, dtype=torch.float64), 0.1, (0.9, 0.99), 1e-8
    parameter = torch.nn.Parameter(start.clone())
    optimizer = ScheduleFreeAdamW([{"params": [parameter]}], 0.1, (mix, decay2), eps, decay)
    x, z, second, weights, highest = start.clone(), start.clone(), torch.zeros_like(start), 0.0, 0.0
    for step in range(1, 30):
        lr = 0.1 * min(1.0, (step - 1) / 5)
        y = (1 - mix) * z + mix * x
        torch.testing.assert_close(parameter.detach(), y)
        gradient = torch.sin(3 * y) + y
        parameter.grad = torch.sin(3 * parameter.detach()) + parameter.detach()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        second = decay2 * second + (1 - decay2) * gradient**2
        z = z - lr * (gradient / ((second / (1 - decay2**step)).sqrt() + eps) + decay * y)
        highest = max(highest, lr)
        weights += highest**2
        share = highest**2 / weights if weights else 1.0
        x = (1 - share) * x + share * z
        torch.testing.assert_close(optimizer.averages()[parameter], x)


def test_lamb_is_its_formula_written_out() -> None:
    """Against algorithm 2 of the paper in float64: a tensor that decays, one that starts at zero, one that does not."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)]
    weights.append(torch.randn(5, dtype=torch.float64))
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    groups = [{"params": parameters[:2], "weight_decay": 0.3}, {"params": parameters[2:], "weight_decay": 0.0}]
    optimizer = LambOptimizer(groups, 0.1, (0.9, 0.99), 1e-6)
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(1, 20):
        lr = 0.1 / step
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, decay in enumerate((0.3, 0.3, 0.0)):
            gradient = torch.sin(3 * weights[i]) + weights[i] - 0.5
            parameters[i].grad = gradient.clone()
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.99 * second[i] + 0.01 * gradient**2
            update = first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.99**step)).sqrt() + 1e-6) + decay * weights[i]
            length, wanted = float(update.norm()), float(weights[i].norm())
            weights[i] = weights[i] - lr * (wanted / length if decay and wanted and length else 1.0) * update
        optimizer.step()
        for parameter, weight in zip(parameters, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), weight, rtol=1e-5, atol=1e-6)


def test_layer_decay_is_refused_for_a_model_without_blocks() -> None:
    with pytest.raises(ValueError, match=r"layer_decay=0.7 needs a model of blocks"):
        build_optimizers(torch.nn.Linear(3, 3), AdamW(layer_decay=0.7))


@pytest.mark.parametrize(
    "values", [{"peak_lr": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"layer_decay": 1.0}]
)
def test_values_that_cannot_train_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        AdamW(**values)  # type: ignore[arg-type]
