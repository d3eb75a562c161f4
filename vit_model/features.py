"""What a model returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """A NamedTuple, because DDP, FSDP and torch.compile look for tensors inside tuples."""

    logits: Tensor  # (B, K); without a head it is pre_logits
    pre_logits: Tensor  # (B, D): what the last layer reads, so after the tanh of an MLP head
    tokens: Tensor | None  # (B, N, D) after the final LN, prefix first; of a ResNet (B, h*w, D). None with tokens=False
    blocks: tuple[Tensor, ...] | None = None  # on request: the tokens after each block, before the final LN
    attention: tuple[Tensor, ...] | None = None  # on request: (B, A, N, N) probabilities of each block, fp32
