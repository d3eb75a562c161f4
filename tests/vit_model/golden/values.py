"""Arrays that a name and a shape decide, so that a golden file holds outputs alone and no weights.

Only random_raw of numpy's Philox is used, whose stream numpy guarantees; the making scripts and the tests share this.
"""

import hashlib

import numpy as np


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values in [-0.5, 0.5), float32."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    raw = np.random.Philox(key=key).random_raw(max(int(np.prod(shape)), 1))
    return ((raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24) - np.float32(0.5)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Matrices keep the variance of what they multiply; norms are near one; tables and tokens have deviation 0.3."""
    u = uniform(name, shape)
    name = name.split(":")[-1]  # what stands before is the case
    last = name.split("/")[-1].split(".")[-1]
    if last == "bias" or len(shape) <= 1 or shape[:3] == (1, 1, 1):
        is_scale = last in ("scale", "gamma", "weight")
        return u * np.float32(0.4) + np.float32(is_scale)
    if shape[0] == 1 and len(shape) == 3:
        return u
    return u * np.float32(np.sqrt(12 / fan_in(name, shape)))


def images(name: str, batch: int, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """(B, C, H, W) in -1..1 with structure of a coarse scale, so that pooling and resizing matter."""
    coarse = uniform(name, (batch, channels, -(-size[0] // 8), -(-size[1] // 8))).repeat(8, axis=2).repeat(8, axis=3)
    fine = uniform(name + "/fine", (batch, channels, *size))
    return coarse[:, :, : size[0], : size[1]] * np.float32(1.5) + fine * np.float32(0.5)


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """How many inputs a kernel sums over: all axes but the first in PyTorch's layout, but the last in Flax's."""
    if "/" not in name.split(":")[-1]:
        return int(np.prod(shape[1:]))
    if name.endswith("out/kernel"):
        return int(np.prod(shape[-3:-1]))
    if "DotProductAttention" in name:
        return int(shape[-3])
    return int(np.prod(shape[int("encoderblock/" in name) : -1]))  # scanned blocks have an axis of depth in front
