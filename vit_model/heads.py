"""From one vector to logits: the linear head, the MLP head of pre-training, DeiT's two; attention pooling (MAP)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.config import HeadKind, ViTConfig
from vit_model.encoder import Mlp, attend_without_keys, keeps_precision
from vit_model.linear import Linear
from vit_model.shapes import Float


class Head(nn.Module):
    """Linear (fine-tuning) or, with one tanh hidden layer as wide as the model, as in pre-training (paper 3.1).

    "distilled" is DeiT's (arXiv 2012.12877): a second linear layer reads the distillation token, the first register of
    the model, and the logits are the mean of both.
    """

    def __init__(self, width: int, num_classes: int, kind: HeadKind = "linear") -> None:
        super().__init__()
        self.kind = kind
        self.num_classes = num_classes
        self.hidden = nn.Linear(width, width) if kind == "mlp" else None
        self.out = nn.Linear(width, num_classes) if num_classes else None
        self.distilled = nn.Linear(width, num_classes) if num_classes and kind == "distilled" else None

    def forward(
        self, x: Float[Tensor, "B D"], distillation: Float[Tensor, "B D"] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, num_classes) and pre_logits (B, D)."""
        pre_logits = x if self.hidden is None else self.hidden(x).tanh()
        if self.out is None:
            return pre_logits, pre_logits
        logits = self.out(pre_logits)
        if self.distilled is not None:
            logits = (logits + self.distilled(distillation)) / 2
        return logits, pre_logits


class AttentionPool(nn.Module):
    """MAP: a learned probe attends to all patches, then one MLP block (big_vision MAPHead)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.width // config.num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, config.width))
        self.query = Linear(config.width, config.width)
        self.key_value = Linear(config.width, 2 * config.width)
        self.out = Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        B, N, D = x.shape
        q = self.query(self.probe).view(1, 1, self.num_heads, self.head_dim)
        if keeps_precision(x):
            x = attend_without_keys(q, x, self.key_value.weight, self.key_value.bias)
        else:
            k, v = (
                self.key_value(x).view(B, N, 2, self.num_heads, self.head_dim).transpose(1, 3).unbind(2)
            )  # (B, A, N, D/A) each
            x = F.scaled_dot_product_attention(q.expand(B, -1, -1, -1).transpose(1, 2), k, v)  # (B, A, 1, D/A)
        x = self.out(x.reshape(B, D))
        x = x + self.mlp(self.norm(x))
        return x
