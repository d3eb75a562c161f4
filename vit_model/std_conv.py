"""The convolution of BiT and of the hybrids: weight standardisation, and TensorFlow's SAME padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.shapes import Float


class StdConv2d(nn.Conv2d):
    """A convolution with its kernel standardised per output channel (arXiv 1903.10520), without bias.

    Three codebases, three epsilons: the hybrids divide by std + 1e-5, BiT by sqrt(var + 1e-10), timm by
    sqrt(var + 1e-8).
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, same: bool, eps: float, eps_on: str
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=0 if same else (kernel - 1) // 2, bias=False)
        self.same = same
        self.eps = eps
        self.eps_on = eps_on

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        if self.same:
            x = pad_same(x, self.kernel_size[0], self.stride[0], 0.0)
        return F.conv2d(x, self.standardized(), None, self.stride, self.padding)

    def standardized(self) -> Float[Tensor, "D C P Q"]:
        weight = self.weight.flatten(1)
        if self.eps_on == "variance":
            return F.layer_norm(weight, weight.shape[1:], eps=self.eps).view_as(self.weight)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # half precision has no room for moments
        standardized: Tensor = DivideByStd.apply(weight, self.eps)  # type: ignore[no-untyped-call]
        return standardized.to(self.weight.dtype).view_as(self.weight)


class DivideByStd(torch.autograd.Function):
    """(w - mean) / (std + eps) per row. layer_norm's kernels take a tenth of the time of var_mean on a CPU.

    Nothing as large as the kernel is kept for the backward pass but the kernel itself.
    """

    @staticmethod
    def forward(ctx: Any, weight: Float[Tensor, "D N"], eps: float) -> Float[Tensor, "D N"]:
        # The floor under the root keeps a constant row finite; it changes no float32 result.
        normalized, mean, rstd = torch.native_layer_norm(weight, weight.shape[1:], None, None, 1e-20)
        shrink = 1 / (1 + eps * rstd)  # std / (std + eps)
        ctx.save_for_backward(weight, mean, rstd, shrink)
        return normalized.mul_(shrink)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "D N"]) -> tuple[Float[Tensor, "D N"], None]:
        weight, mean, rstd, shrink = ctx.saved_tensors
        normalized = (weight - mean).mul_(rstd)
        slope = torch.linalg.vecdot(gradient, normalized).unsqueeze(1) / weight.shape[1] * shrink
        centred = gradient - gradient.mean(dim=1, keepdim=True)
        return centred.sub_(normalized.mul_(slope)).mul_(rstd * shrink), None


def pad_same(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """TensorFlow's SAME: what is odd goes after; at stride 2 on an even side a 3x3 kernel gets 0 before, 1 after."""
    pads: list[int] = []
    for side in (x.shape[3], x.shape[2]):
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value) if any(pads) else x
