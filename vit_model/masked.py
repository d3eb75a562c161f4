"""Masked patch prediction (arXiv 2010.11929, appendix B.1.2): the ViT, a [mask] embedding and a head over patches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vit_model.config import ViTConfig
from vit_model.initialize import initialize
from vit_model.shapes import Float
from vit_model.vit import ViT

MASKED = -1  # In `sources`: the learned [mask] embedding.
OWN_NAMES = ("mask_token", "patch_head.weight", "patch_head.bias")


class MaskedViT(ViT):
    """A ViT without classes that is asked what its corrupted patches showed. Build it through `build_masked`."""

    def __init__(self, config: ViTConfig, num_outputs: int) -> None:
        if config.patch_dropout or config.pool == "map":
            raise ValueError(
                f"masked patches need every patch and no probe; patch_dropout={config.patch_dropout} and"
                f" pool={config.pool!r} must be 0 and 'token' or 'gap'"
            )
        super().__init__(config, 0)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.patch_head = nn.Linear(config.width, num_outputs)

    def forward(  # type: ignore[override]
        self, images: Tensor, rows: Tensor, sources: Tensor
    ) -> Float[Tensor, "B M E"]:
        """images as in ViT. rows (B, M), int64: the corrupted patches, each once. sources (B, M): the patch whose
        embedding each shows (its own: unchanged), or MASKED. The corruption comes before the position embedding.
        """
        patches = self.embed_patches(images)
        wide = (-1, -1, patches.shape[2])
        shown = patches.gather(1, sources.clamp(min=0)[:, :, None].expand(wide))
        shown = torch.where(sources[:, :, None] == MASKED, self.mask_token.to(patches.dtype), shown)
        x = patches.scatter(1, rows[:, :, None].expand(wide), shown)
        x = self.add_position(x, self.config.grid_of(images.shape[2], images.shape[3]))
        for block in self.blocks:
            x = self.run_block(block, x, None, False)
        x = x.gather(1, (rows + self.config.num_prefix)[:, :, None].expand(wide))
        asked: Tensor = self.patch_head(self.norm(x))
        return asked


def build_masked(
    config: ViTConfig, num_outputs: int, *, seed: int | None = None, device: torch.device | str = "cpu"
) -> MaskedViT:
    """An initialised model in training mode; num_outputs: numbers predicted for each corrupted patch."""
    with torch.device("meta"):
        model = MaskedViT(config, num_outputs)
    if str(device) == "meta":
        return model
    model.to_empty(device=device)
    generator = None if seed is None else torch.Generator(device=device).manual_seed(seed)
    initialize(model, generator)
    nn.init.normal_(model.mask_token, std=0.02, generator=generator)
    nn.init.zeros_(model.patch_head.weight)
    return model


def without_masking(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the plain ViT without classes: what is fine-tuned afterwards."""
    return {name: tensor for name, tensor in tensors.items() if name not in OWN_NAMES}
