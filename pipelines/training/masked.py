"""Masked patch prediction (arXiv 2010.11929, appendix B.1.2): which patches are corrupted, and what they are asked.

The paper corrupts half of the patch embeddings: 80 % of them become the [mask] embedding, 10 % that of another patch of
the image, 10 % stay. It states neither the edges of the bins nor the head: here bins of 32 levels and a linear layer.
Draws follow from Philox(seed, epoch, sample_id): the same for any number of workers, and after a resume.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.batch import Batch
from pipelines.training.config import MaskedConfig, TrainConfig
from pipelines.training.forward import Prepare, in_precision
from vit_model import MaskedViT, ModelConfig, ViTConfig, build_masked, forward_macs

__all__ = ["build", "corruption", "draw", "macs", "masked_terms", "num_outputs", "targets"]

STREAM = 0x6D61736B  # Half of the key: apart from every other use of the seed.
BITS, SIDE = 3, 4  # Bits of each colour; cells a side of the target `colours`.
MASK_SHARE, OTHER_SHARE = 0.8, 0.1  # Of the corrupted patches; the rest stays as it is.


def num_outputs(config: MaskedConfig, model: ModelConfig) -> int:
    """Numbers predicted for each patch. Raises ValueError for a model that has no such patches."""
    if not isinstance(model, ViTConfig) or model.stem is not None:
        raise ValueError("train.masked corrupts the patches of a ViT; a ResNet or a hybrid has none of pixels")
    if config.target == "colours" and model.patch_size % SIDE:
        raise ValueError(f"masked.target=colours cuts a patch into {SIDE}x{SIDE}; patch_size={model.patch_size} cannot")
    classes = 1 << (BITS * model.channels)
    sizes = {"mean_colour": classes, "colours": SIDE**2 * classes, "pixels": model.patch_size**2 * model.channels}
    return sizes[config.target]


def build(model: ModelConfig, config: MaskedConfig, seed: int | None = None, device: str = "cpu") -> MaskedViT:
    """The model that a run trains. Raises ValueError where it cannot be trained so."""
    outputs = num_outputs(config, model)
    assert isinstance(model, ViTConfig)
    return build_masked(model, outputs, seed=seed, device=device)


def macs(model: ModelConfig, config: MaskedConfig) -> int:
    """Of a forward pass of one image."""
    assert isinstance(model, ViTConfig)
    patches = model.grid[0] * model.grid[1]
    asked = max(1, round(config.share * patches))
    return forward_macs(model, 0) + asked * model.width * num_outputs(config, model)


def draw(
    seed: int, epochs: NDArray[np.int64], sample_ids: NDArray[np.int64], num_patches: int, share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`rows` and `sources` (B, M) for the model: the same number of patches in each image."""
    raw = np.empty((len(sample_ids), 3, num_patches), np.uint64)
    for i, (epoch, sample_id) in enumerate(zip(epochs.tolist(), sample_ids.tolist(), strict=True)):
        counter = (0, 0, epoch, sample_id % (1 << 64))
        raw[i] = np.random.Philox(key=(seed % (1 << 64), STREAM), counter=counter).random_raw((3, num_patches))
    rows = np.argsort(raw[:, 0], axis=1, kind="stable")[:, : max(1, round(share * num_patches))]
    kind, which = (np.take_along_axis(raw[:, i] >> np.uint64(11), rows, axis=1) * 2.0**-53 for i in (1, 2))
    # Never itself; an image of one patch has no other.
    other = (rows + 1 + (which * (num_patches - 1)).astype(np.int64)) % num_patches
    sources = np.where(kind < MASK_SHARE, -1, np.where(kind < MASK_SHARE + OTHER_SHARE, other, rows))
    return rows, sources


def corruption(model: nn.Module, batch: Batch, config: MaskedConfig, seed: int, device: torch.device) -> Tensor:
    """(B, 2, M) int64 on the device: rows and sources. A held-out image is corrupted in the same way every time."""
    ids = torch.as_tensor(batch.sample_ids).numpy()
    epochs = np.zeros_like(ids) if batch.epochs is None else batch.epochs.numpy()
    height, width = model.config.grid_of(*batch.images.shape[2:])  # type: ignore[union-attr, operator]
    plan = torch.from_numpy(np.stack(draw(seed, epochs, ids, height * width, config.share), axis=1))
    return (plan.pin_memory() if device.type == "cuda" else plan).to(device, non_blocking=True)


def targets(images: Tensor, rows: Tensor, config: MaskedConfig, patch_size: int) -> Tensor:
    """Of uint8 images (B, C, H, W), for the patches `rows` (B, M), raster order within each patch.

    mean_colour: classes (B, M, 1); colours: of each cell (B, M, 16); pixels: float (B, M, P * P * C) in -1..1.
    """
    cells = SIDE if config.target == "colours" else 1
    if config.target == "pixels":
        found = F.pixel_unshuffle(images, patch_size).flatten(2).transpose(1, 2)  # (B, N, C * P * P)
        wanted = found.gather(1, rows[:, :, None].expand(-1, -1, found.shape[2]))
        return wanted.float() / 127.5 - 1
    side = patch_size // cells
    sums = F.avg_pool2d(images.float(), side, divisor_override=1).long()  # Whole numbers: no rounding at an edge.
    levels = sums // (side**2 << (8 - BITS))  # (B, C, h, w)
    classes = torch.zeros_like(levels[:, 0])
    for channel in range(levels.shape[1]):
        classes = (classes << BITS) + levels[:, channel]
    patches = F.pixel_unshuffle(classes[:, None].float(), cells).long().flatten(2).transpose(1, 2)
    return patches.gather(1, rows[:, :, None].expand(-1, -1, cells**2))


def masked_terms(
    model: nn.Module, images: Tensor, weights: Tensor, plan: Tensor, prepare: Prepare, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Weighted sums over images: of the mean loss over an image's corrupted patches, and of their share right.

    Right is a colour class; for `pixels`, the class of the predicted patch's mean colour.
    """
    masked = config.masked
    assert masked is not None
    rows, sources = plan[:, 0], plan[:, 1]
    patch_size = int(model.config.patch_size)  # type: ignore[union-attr, arg-type]
    with in_precision(images, prepare, config) as pixels:
        outputs: Tensor = model(pixels, rows, sources)
    outputs = outputs.float()
    wanted = targets(images, rows, masked, patch_size)
    if masked.target == "pixels":
        loss = (outputs - wanted).square().mean(dim=(1, 2))
        channels = images.shape[1]
        right = _mean_classes(outputs, channels) == _mean_classes(wanted, channels)
        return (loss * weights).sum(), (right.float().mean(dim=1) * weights).sum()
    logits = outputs.view(*wanted.shape, -1)  # (B, M, cells, classes)
    each = F.cross_entropy(logits.movedim(3, 1), wanted, reduction="none")
    right = logits.argmax(dim=3) == wanted
    return (each.mean(dim=(1, 2)) * weights).sum(), (right.float().mean(dim=(1, 2)) * weights).sum()


def _mean_classes(patches: Tensor, channels: int) -> Tensor:
    """(B, M, C * P * P) in -1..1 -> levels of the mean colour in one number, (B, M)."""
    means = (patches.detach().view(*patches.shape[:2], channels, -1).mean(dim=3) + 1) * (1 << (BITS - 1))
    levels = means.floor().clamp(0, (1 << BITS) - 1).long()
    scale = (1 << BITS) ** torch.arange(channels, device=patches.device)
    classes: Tensor = (levels * scale).sum(dim=2)
    return classes
