"""Position embeddings: the fixed sine-cosine grid, and resizing a learned grid or a patch kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vit_model.shapes import Float

Grid = tuple[int, int]
Method = Literal["google", "timm"]


def sincos2d(grid: Grid, width: int) -> Float[Tensor, "1 N D"]:
    """The fixed embedding of big_vision (arXiv 2205.01580): sin x, cos x, sin y, cos y, a quarter of the width each."""
    y, x = (
        side.flatten() for side in torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    )
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    x, y = x[:, None] * omega, y[:, None] * omega  # (N, D/4)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float()[None]


def resize_position(
    table: Float[Tensor, "1 N D"], old_grid: Grid, new_grid: Grid, num_prefix: int, method: Method = "google"
) -> Float[Tensor, "1 M D"]:
    """A learned table for another grid; the rows of prefix tokens stay as they are (paper section 3.2)."""
    h, w = old_grid
    if table.shape[1] != num_prefix + h * w:
        raise ValueError(
            f"position embedding has {table.shape[1]} rows; a {h}x{w} grid plus {num_prefix} prefix tokens needs"
            f" {num_prefix + h * w}; pass the checkpoint's own grid as old_grid"
        )
    if old_grid == new_grid:
        return table
    prefix, rows = table[:, :num_prefix], table[:, num_prefix:]
    grid = rows.reshape(1, h, w, -1).permute(0, 3, 1, 2)  # (1, D, h, w)
    # In single precision the places of the new rows are already off by 4e-6, in half precision by 1e-2.
    grid = resize_grid(grid.double(), new_grid, method).to(table.dtype)
    return torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def resize_grid(grid: Float[Tensor, "1 D h w"], new_grid: Grid, method: Method) -> Float[Tensor, "1 D H W"]:
    if method == "google":
        # align_corners=True reproduces scipy.ndimage.zoom(order=1) of google-research/vision_transformer.
        return F.interpolate(grid, size=new_grid, mode="bilinear", align_corners=True)
    if method == "timm":
        return F.interpolate(grid, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    raise ValueError(f"method={method!r} is not one of 'google', 'timm'")


def square_grid(num_rows: int, num_prefix: int) -> Grid:
    """The grid of a table that says only its length."""
    side = math.isqrt(max(num_rows - num_prefix, 0))
    if side * side != num_rows - num_prefix or not side:
        raise ValueError(
            f"{num_rows} position rows minus {num_prefix} prefix rows make no square grid; give the file's resolution"
        )
    return side, side


def resize_matrix(old: Grid, new: Grid) -> Float[Tensor, "M N"]:
    """The linear map from a flattened patch of one size to the same patch resized (bilinear, antialiased)."""
    basis = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
    basis = F.interpolate(basis, size=new, mode="bilinear", align_corners=False, antialias=True).flatten(1)
    return basis.T


def resize_patch_kernel(kernel: Float[Tensor, "D C p q"], new: Grid) -> Float[Tensor, "D C P Q"]:
    """FlexiViT (arXiv 2212.08013, eq. 4): the kernel whose tokens for resized patches come nearest to the old ones."""
    old = (kernel.shape[2], kernel.shape[3])
    if old == new:
        return kernel
    inverse: Tensor = torch.linalg.pinv(resize_matrix(old, new).T)  # (M, N): w' = pinv(B^T) w
    resized: Tensor = kernel.double().flatten(2) @ inverse.T.to(kernel.device)
    return resized.view(*kernel.shape[:2], *new).to(kernel.dtype)
