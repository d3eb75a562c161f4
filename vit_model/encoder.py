"""The encoder block: equations 2, 3 and 5-8 of the paper, pre-LN, with one fused projection for q, k and v."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit_model.config import ViTConfig
from vit_model.linear import Linear, linear
from vit_model.shapes import Float

# Lengths and numbers of the images packed into one row of tokens, in order: ((length, count), ...).
Packing = tuple[tuple[int, int], ...]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.width // config.num_heads  # said and not -1: views of an empty batch need it
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None
        self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None
        self.out = Linear(config.width, config.width)

    def forward(self, x: Float[Tensor, "B N D"], packing: Packing | None = None) -> Float[Tensor, "B N D"]:
        B, N, D = x.shape
        # unbind(2), not permute and unbind(0): the gradients then stack into qkv's own layout without a copy.
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)  # each (B, N, A, D/A)
        if packing is None:
            x = self.out(self.attend(q, k, v).reshape(B, N, D))
            return x
        parts = []
        start = 0
        for length, count in packing:  # images of one length are one dense batch: no mask, no padding
            stop = start + length * count
            q_part, k_part, v_part = (
                y[:, start:stop].view(count, length, self.num_heads, self.head_dim) for y in (q, k, v)
            )
            parts.append(self.attend(q_part, k_part, v_part).reshape(1, length * count, D))
            start = stop
        x = self.out(torch.cat(parts, dim=1))
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, N, A, D/A) each; the fused kernel."""
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p=dropout)
        return x.transpose(1, 2)

    def first(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B 1 D"]:
        """The output of token 0 alone: one query, all keys and values."""
        B, N, D = x.shape
        q_weight, kv_weight = torch.split(self.qkv.weight, [D, 2 * D])
        q_bias, kv_bias = (None, None) if self.qkv.bias is None else torch.split(self.qkv.bias, [D, 2 * D])
        q = F.linear(x[:, :1], q_weight, q_bias).view(B, 1, self.num_heads, self.head_dim)
        if self.q_norm is None and not (self.dropout and self.training) and keeps_precision(x):
            x = self.out(attend_without_keys(q, x, kv_weight, kv_bias))
            return x
        k, v = linear(x, kv_weight, kv_bias).view(B, N, 2, self.num_heads, self.head_dim).unbind(2)
        x = self.out(self.attend(q, k, v).reshape(B, 1, D))
        return x

    def explicit(self, x: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B A N N"]]:
        """The same by equations 6-8 with the softmax in fp32, which also gives the probabilities; no dropout."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, A, N, D/A)
        with torch.autocast(x.device.type, enabled=False):  # which would round the scores to half precision
            scores = (q.float() * self.head_dim**-0.5) @ k.float().transpose(-1, -2)
            probabilities = scores.softmax(dim=-1)
        x = (probabilities.to(v.dtype) @ v).transpose(1, 2).reshape(B, N, D)
        return self.out(x), probabilities


def attend_without_keys(
    q: Float[Tensor, "Q 1 A d"], x: Float[Tensor, "B N D"], kv_weight: Float[Tensor, "E D"], kv_bias: Tensor | None
) -> Float[Tensor, "B 1 D"]:
    """Attention of one query per image, or of one (Q = 1) for all, to tokens whose keys and values nobody else reads.

    softmax(q (x K)') (x V) = (softmax((q K') x') x) V: 2 N D D multiplications per image become 2 N D heads. The keys'
    bias moves all scores of a query alike, which the softmax does not see.
    """
    heads, head_dim = q.shape[2:]
    k_weight, v_weight = kv_weight.view(2, heads, head_dim, -1)  # (A, d, D) each
    folded = (q[:, 0].transpose(0, 1) * head_dim**-0.5) @ k_weight  # (A, B, D)
    probabilities = (folded.transpose(0, 1) @ x.transpose(1, 2)).softmax(dim=-1)  # (B, A, N)
    seen = (probabilities @ x).transpose(0, 1)  # (A, B, D)
    values: Tensor = (seen @ v_weight.transpose(1, 2)).transpose(0, 1).reshape(x.shape[0], 1, heads * head_dim)
    return values if kv_bias is None else values + kv_bias.chunk(2)[1]


def keeps_precision(x: Tensor) -> bool:
    """Whether a score of attention is rounded to no less than fp32; half precision needs the fused kernel for that."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)


class Mlp(nn.Module):
    """D -> mlp_dim -> D with GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.gelu == "tanh" else "none"
        self.dropout = config.dropout
        self.dense1 = Linear(config.width, config.mlp_dim)
        self.dense2 = Linear(config.mlp_dim, config.width)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        x = F.gelu(self.dense1(x), approximate=self.approximate)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        x = self.dense2(x)
        return x


class Block(nn.Module):
    """x + MSA(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: ViTConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = Mlp(config)
        has_scale = config.layer_scale is not None
        self.layer_scale1 = nn.Parameter(torch.empty(config.width)) if has_scale else None
        self.layer_scale2 = nn.Parameter(torch.empty(config.width)) if has_scale else None

    def forward(
        self, x: Float[Tensor, "B N D"], packing: Packing | None = None, first_only: bool = False
    ) -> Float[Tensor, "B M D"]:
        """first_only: the output of token 0 alone, (B, 1, D), for a last block of which only that token is read."""
        if self.drop_path and self.training:
            if packing is not None:
                raise ValueError(
                    f"drop_path={self.drop_path} drops whole rows, and a row of packed images is many; set it to 0"
                )
            x = self.dropped(x, self.branch1)
            x = self.dropped(x, self.branch2)
            return x[:, :1] if first_only else x
        if first_only:
            x = x[:, :1] + self.finish(self.attention.first(self.norm1(x)), self.layer_scale1)
        else:
            x = x + self.branch1(x, packing)
        return x + self.branch2(x)

    def branch1(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        return self.finish(self.attention(self.norm1(x), packing), self.layer_scale1)

    def branch2(self, x: Tensor) -> Tensor:
        return self.finish(self.mlp(self.norm2(x)), self.layer_scale2)

    def dropped(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Stochastic depth (arXiv 1603.09382) that does not compute what it drops; it drops a fixed share."""
        B = x.shape[0]
        kept = B - int(self.drop_path * B)
        if kept == B:  # too few images to leave a whole one out
            keep = 1 - self.drop_path
            return x + branch(x) * (torch.rand(B, 1, 1, device=x.device) < keep).to(x.dtype) / keep
        rows = torch.randperm(B, device=x.device)[:kept]
        return x.index_add(0, rows, branch(x[rows]).to(x.dtype), alpha=B / kept)

    def finish(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return x if scale is None else x * scale

    def explicit(self, x: Float[Tensor, "B N D"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B A N N"]]:
        """The block on the explicit attention path, and its probabilities; for analysis, so nothing is dropped."""
        y, probabilities = self.attention.explicit(self.norm1(x))
        x = x + (y if self.layer_scale1 is None else y * self.layer_scale1)
        y = self.mlp(self.norm2(x))
        return x + (y if self.layer_scale2 is None else y * self.layer_scale2), probabilities
