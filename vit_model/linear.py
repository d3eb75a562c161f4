"""The dense layer of every block: PyTorch's, or oneDNN's kernels on the CPUs where those are the faster ones."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.shapes import Float

# Below this many multiply-accumulates the call of a oneDNN kernel costs more than it saves.
SMALLEST_PRODUCT = 4_000_000


class Linear(nn.Linear):
    """nn.Linear: the same parameters, the same result but for the order in which float32 sums are rounded."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B E"]:
        return linear(x, self.weight, self.bias)


def linear(x: Float[Tensor, "*B D"], weight: Float[Tensor, "E D"], bias: Tensor | None) -> Float[Tensor, "*B E"]:
    """F.linear; on AMD CPUs in float32 through oneDNN.

    PyTorch multiplies float32 matrices with MKL. On an AMD EPYC (AVX-512) oneDNN is 5 to 10 % faster forward, 10 % in
    the gradient of x, and adds the bias as it multiplies. MKL is made for Intel's CPUs and stays in use there.
    """
    if onednn_suits(x, weight):
        if not torch.is_grad_enabled():
            return onednn(x, weight, bias)
        product: Tensor = OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return F.linear(x, weight, bias)


def onednn_suits(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not prefers_onednn():
        return False
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)  # no DTensor, no fake or functional tensor
    return (
        plain
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT
        and bool(torch.backends.mkldnn.enabled)
        and not is_observed()
    )


@functools.cache
def prefers_onednn() -> bool:
    """By the maker of the CPU and not by a stopwatch: a run that resumes must compute as it did before."""
    has_kernel = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    has_kernel = has_kernel and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_kernel and torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_vendor() == "AuthenticAMD"


def cpu_vendor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else platform.processor()
    return "AuthenticAMD" if "AuthenticAMD" in text else "other"


def is_observed() -> bool:
    """Autocast, tracing, FLOP counters and function transforms must see the usual operator."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wanted_x, wanted_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted_weight else None, weight if wanted_x else None)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            linear(gradients[0], weight.t(), None) if wanted_x else None,  # differentiable in turn, which onednn is not
            rows.t() @ x.flatten(0, -2) if wanted_weight else None,  # here MKL is as fast
            rows.sum(0) if wanted_bias else None,
        )
