"""Arrays for the paper's figures (section 4.5, appendix D): filters, positions, attention, CKA. No plotting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vit_model.shapes import Float
from vit_model.vit import ViT


@torch.no_grad()
def patch_filters(model: ViT, count: int = 28) -> Float[Tensor, "K C P P"]:
    """Leading principal components of the patch filters, most variance first (figure 7 left); each scaled to 0..1."""
    kernel = model.patch_embedding.weight.detach().float()
    samples = kernel.flatten(1)
    _, _, components = torch.linalg.svd(samples - samples.mean(dim=0), full_matrices=False)
    components = components[:count]
    low, high = components.amin(dim=1, keepdim=True), components.amax(dim=1, keepdim=True)
    scaled = (components - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.reshape(scaled, (-1, *kernel.shape[1:]))


@torch.no_grad()
def position_similarity(model: ViT) -> Float[Tensor, "h w h w"]:
    """Cosine similarity of the position of patch (row, column) to those of all patches (figure 7 centre)."""
    table = model.position(model.config.grid)
    if table is None:
        raise ValueError("position='none': this model has no position embedding to compare")
    h, w = model.config.grid
    rows = torch.nn.functional.normalize(table[0, table.shape[1] - h * w :].float(), dim=1)
    return (rows @ rows.T).view(h, w, h, w)


def patch_distances(grid: tuple[int, int], stride: int) -> Float[Tensor, "N N"]:
    """Pixels between the centres of every two patches."""
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([y.flatten(), x.flatten()], dim=1).double() * stride
    return torch.cdist(places, places)


def attention_distance(
    attention: Sequence[Float[Tensor, "B A N N"]],
    grid: tuple[int, int],
    stride: int,
    num_prefix: int,
    *,
    renormalize: bool = True,
) -> Float[Tensor, "L A"]:
    """Mean pixels between query and key patches, weighted by attention (figure 7 right); mean over queries and images.

    What patches pay to prefix tokens has no distance. renormalize spreads it over the patches; without it, it counts as
    distance 0, as in most published code, which lowers the value.
    """
    distances = patch_distances(grid, stride)
    means = []
    for probabilities in attention:
        patches = probabilities[:, :, num_prefix:, num_prefix:].double()
        if renormalize:
            patches = patches / patches.sum(dim=-1, keepdim=True).clamp_min(1e-30)
        means.append((patches * distances.to(patches.device)).sum(dim=-1).mean(dim=(0, 2)))
    return torch.stack(means).float()


def attention_rollout(
    attention: Sequence[Float[Tensor, "B A N N"]],
    grid: tuple[int, int],
    num_prefix: int,
    *,
    has_class_token: bool = True,
    residual: bool = True,
) -> Float[Tensor, "B h w"]:
    """Attention followed through all layers (arXiv 2005.00928; figure 6): what is read of each patch, at most 1.

    residual adds the skip connection as an identity of equal weight. Without a class token the mean over the
    patches is read.
    """
    joint: Tensor | None = None
    for probabilities in attention:
        step = probabilities.float().mean(dim=1)  # over heads
        if residual:
            step = step + torch.eye(step.shape[-1], device=step.device)
        step = step / step.sum(dim=-1, keepdim=True)
        joint = step if joint is None else step @ joint
    if joint is None:
        raise ValueError("no attention given; ask the model for it with attention=True")
    rows = joint[:, 0] if has_class_token else joint[:, num_prefix:].mean(dim=1)
    patches = rows[:, num_prefix:]
    return (patches / patches.amax(dim=1, keepdim=True)).view(-1, *grid)


def attention_entropy(attention: Sequence[Float[Tensor, "B A N N"]]) -> Float[Tensor, "L A"]:
    """Mean entropy of the attention of a query, in nats."""
    return torch.stack([torch.special.entr(p.float()).sum(dim=-1).mean(dim=(0, 2)) for p in attention])


@torch.no_grad()
def linear_cka(x: Float[Tensor, "S D"], y: Float[Tensor, "S E"]) -> float:
    """Similarity of two representations of the same samples (arXiv 1905.00414); 1 if equal up to rotation, scale."""
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    if x.shape[0] < min(x.shape[1], y.shape[1]):  # the same through the S x S products, which are then the smaller ones
        gram_x, gram_y = x @ x.T, y @ y.T
        return float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def cka_matrix(blocks: Sequence[Float[Tensor, "B N D"]], token: int | None = None) -> Float[Tensor, "L L"]:
    """CKA between all layers: of one token, or of the mean over tokens."""
    samples = [x.mean(dim=1) if token is None else x[:, token] for x in blocks]
    values = torch.eye(len(samples))
    for i, x in enumerate(samples):
        for j in range(i):
            values[i, j] = values[j, i] = linear_cka(x, samples[j])
    return values


@torch.no_grad()
def token_components(
    tokens: Float[Tensor, "B N D"], grid: tuple[int, int], num_prefix: int, count: int = 3
) -> Float[Tensor, "B h w K"]:
    """Leading principal components of the patch tokens of all images, scaled to 0..1: three make an RGB picture."""
    patches = tokens[:, num_prefix:].float()
    flat = patches.flatten(0, 1)
    flat = flat - flat.mean(dim=0)
    _, _, components = torch.linalg.svd(flat, full_matrices=False)
    values = flat @ components[:count].T
    low, high = values.amin(dim=0), values.amax(dim=0)
    scaled = (values - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.reshape(scaled, (tokens.shape[0], *grid, count))
