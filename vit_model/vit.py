"""The Vision Transformer and its hybrids (arXiv 2010.11929, section 3.1): patches, encoder, one vector, logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit_model.config import HeadKind, ViTConfig
from vit_model.encoder import Block, Packing
from vit_model.features import Features
from vit_model.heads import AttentionPool, Head
from vit_model.position import resize_grid, sincos2d
from vit_model.shapes import Float, check_images
from vit_model.stem import ResNetStem


class ViT(nn.Module):
    """Build it through `build_model`, which also initialises it."""

    def __init__(self, config: ViTConfig, num_classes: int, head: HeadKind = "linear") -> None:
        super().__init__()
        self.config = config
        # Recompute each block in the backward pass: less memory for a third more time.
        self.activation_checkpointing = False
        self.stem = None if config.stem is None else ResNetStem(config)
        in_channels = config.channels if self.stem is None else self.stem.out_channels
        self.patch_embedding = nn.Conv2d(in_channels, config.width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.width)) if config.has_class_token else None
        self.registers = (
            nn.Parameter(torch.empty(1, config.num_registers, config.width)) if config.num_registers else None
        )
        self.position_embedding: nn.Parameter | None = None
        if config.position == "learned":
            self.position_embedding = nn.Parameter(torch.empty(1, config.num_positions, config.width))
        elif config.position == "sincos2d":
            self.register_buffer("sincos", sincos2d(config.grid, config.width), persistent=False)
        self.blocks = nn.ModuleList(Block(config, rate) for rate in drop_path_rates(config))
        self.norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.pool = AttentionPool(config) if config.pool == "map" else None
        self.head = Head(config.width, num_classes, head)

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        tokens: bool = True,
        blocks: bool = False,
        attention: bool = False,
    ) -> Features:
        """images: (B, C, H, W), floating point, scaled as the weights expect (vit_model.normalize).

        Any size that the patch divides; one that leaves a rest is a ValueError that names the nearest.
        tokens=False leaves out the tokens that nobody reads: with pool="token" the last block then computes the
        class token alone (7 % of B/16 saved, the same logits). blocks and attention ask for more; attention takes the
        slower explicit path. A list of (C, H, W) images of different sizes is packed into one row without padding;
        its Features have no tokens.
        """
        if not isinstance(images, Tensor):
            if blocks or attention:
                raise ValueError("a list of images gives no blocks and no attention; give one batch of equal sizes")
            return self.forward_packed(images)
        x = self.embed(images)
        if self.training and self.config.patch_dropout:
            x = self.drop_patches(x)
        wants_more = tokens or blocks or attention or self.head.distilled is not None
        first_only = self.config.pool == "token" and not wants_more
        states: list[Tensor] = []
        probabilities: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if attention:
                x, probability = cast(Block, block).explicit(x)
                probabilities.append(probability)
            else:
                x = self.run_block(block, x, None, first_only and i == len(self.blocks) - 1)
            if blocks:
                states.append(x)
        x = self.norm(x) if self.config.pool_norm == "before" else x
        logits, pre_logits = self.head(self.pooled(x), self.distillation(x))
        return Features(
            logits,
            pre_logits,
            x if tokens else None,
            tuple(states) if blocks else None,
            tuple(probabilities) if attention else None,
        )

    def embed(self, images: Tensor) -> Float[Tensor, "B N D"]:
        """Equation 1: patches, prefix tokens and positions."""
        patches = self.embed_patches(images)
        grid = self.config.grid_of(images.shape[2], images.shape[3])
        return self.add_position(patches, grid)

    def embed_patches(self, images: Tensor) -> Float[Tensor, "B N D"]:
        """The patch embeddings alone, in raster order."""
        check_images(images, self.config.channels)
        self.config.grid_of(images.shape[2], images.shape[3])
        x = images if self.stem is None else self.stem(images)
        x = self.patch_embedding(x)  # (B, D, h, w)
        return torch.flatten(x, 2).transpose(1, 2)

    def add_position(self, patches: Float[Tensor, "B N D"], grid: tuple[int, int]) -> Float[Tensor, "B M D"]:
        position, prefix = self.position(grid), self.prefix()
        if position is not None and (
            prefix is None or not self.config.position_prefix or self.position_embedding is None
        ):
            patches = patches + position  # rows for patches only
            position = None
        if prefix is not None:
            patches = torch.cat([prefix.to(patches.dtype).expand(patches.shape[0], -1, -1), patches], dim=1)
        x = patches if position is None else patches + position
        return F.dropout(x, self.config.dropout) if self.config.dropout and self.training else x

    def prefix(self) -> Tensor | None:
        """Class token, then registers: (1, num_prefix, D)."""
        parts: list[Tensor] = [token for token in (self.class_token, self.registers) if token is not None]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None

    def position(self, grid: tuple[int, int]) -> Tensor | None:
        """The embedding at this grid; a learned one is interpolated as Google's code does when it fine-tunes."""
        if self.config.position == "none":
            return None
        if self.position_embedding is None:
            fixed = self.get_buffer("sincos")
            return fixed if grid == self.config.grid else sincos2d(grid, self.config.width).to(fixed)
        if grid == self.config.grid:
            return self.position_embedding
        prefix = self.config.num_prefix if self.config.position_prefix else 0
        h, w = self.config.grid
        rows = self.position_embedding[:, prefix:].float().view(1, h, w, -1).permute(0, 3, 1, 2)
        rows = resize_grid(rows, grid, "google").flatten(2).transpose(1, 2).to(self.position_embedding.dtype)
        return torch.cat([self.position_embedding[:, :prefix], rows], dim=1)

    def drop_patches(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B M D"]:
        """PatchDropout (arXiv 2208.07220): each image keeps its own random patches, and every prefix token."""
        B, N, D = x.shape
        prefix = self.config.num_prefix
        kept = max(round((N - prefix) * (1 - self.config.patch_dropout)), 1)
        rows = torch.rand(B, N - prefix, device=x.device).argsort(dim=1)[:, :kept] + prefix
        patches = x.gather(1, rows[:, :, None].expand(-1, -1, D))
        return torch.cat([x[:, :prefix], patches], dim=1)

    def run_block(self, block: nn.Module, x: Tensor, packing: Packing | None, first_only: bool) -> Tensor:
        if self.activation_checkpointing and self.training:
            x = checkpoint(block, x, packing, first_only, use_reentrant=False)
        else:
            x = block(x, packing, first_only)
        return x

    def distillation(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"] | None:
        """What DeiT's second head reads: the first register."""
        return x[:, 1] if self.head.distilled is not None else None

    def pooled(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B D"]:
        if self.config.pool == "token":
            return x[:, 0]
        x = x[:, self.config.num_prefix :]
        if self.pool is not None:
            x = self.pool(x)
        else:
            x = x.mean(dim=1)
            if self.config.pool_norm == "after":
                x = self.norm(x)
        return x

    def forward_packed(self, images: Sequence[Tensor]) -> Features:
        """NaViT's packing (arXiv 2307.06304) without its masks: one row of tokens, attention by groups of a length."""
        if not images or any(image.ndim != 3 for image in images):
            raise ValueError("packed images are a list of at least one (channels, height, width) tensor")
        order: dict[tuple[int, ...], list[int]] = {}
        for i, image in enumerate(images):
            order.setdefault(tuple(image.shape), []).append(i)
        rows = [
            self.embed(torch.stack([images[i] for i in group])) for group in order.values()
        ]  # each (count, length, D)
        if self.training and self.config.patch_dropout:
            rows = [self.drop_patches(x) for x in rows]
        packing = tuple((x.shape[1], x.shape[0]) for x in rows)
        x = torch.cat([x.reshape(1, -1, x.shape[2]) for x in rows], dim=1)
        for block in self.blocks:
            x = self.run_block(block, x, packing, False)
        x = self.norm(x) if self.config.pool_norm == "before" else x
        groups = x.split([length * count for length, count in packing], dim=1)
        images_of = [
            x.view(count, length, self.config.width) for x, (length, count) in zip(groups, packing, strict=True)
        ]
        back = torch.tensor([i for group in order.values() for i in group], device=x.device).argsort()
        second = [y for x in images_of if (y := self.distillation(x)) is not None]
        pooled = torch.cat([self.pooled(x) for x in images_of])[back]
        logits, pre_logits = self.head(pooled, torch.cat(second)[back] if second else None)
        return Features(logits, pre_logits, None)


def drop_path_rates(config: ViTConfig) -> list[float]:
    if config.drop_path_schedule == "constant":
        return [config.drop_path] * config.depth
    return [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
