"""What a model is: frozen, JSON-able descriptions. A config and a file of weights make a model."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

GROUPS = 32  # of every GroupNorm; channels below 32 are groups of their own
Resolution = int | tuple[int, int]
HeadKind = Literal["linear", "mlp", "distilled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """A Vision Transformer (arXiv 2010.11929, section 3.1); with `stem`, a hybrid. The defaults are B/16."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["vit"] = "vit"
    resolution: Resolution = 224  # image side in px, or (height, width)
    patch_size: int = 16  # px; on the feature map of a hybrid: positions
    channels: int = 3  # input channels
    width: int = 768  # hidden size D of every token
    depth: int = 12  # encoder blocks
    mlp_dim: int = 3072  # width of the hidden layer of each MLP
    num_heads: int = 12  # attention heads; divides width
    pool: Literal["token", "gap", "map"] = (
        "token"  # how tokens become one vector: class token, mean, attention with a probe
    )
    pool_norm: Literal["before", "after"] = "before"  # final LN before pooling (Google) or, for gap, after it (timm)
    class_token: bool | None = None  # None: exactly when pool is "token"
    num_registers: int = 0  # extra prefix tokens that no pooling reads; DeiT's distillation token is one
    position: Literal["learned", "sincos2d", "none"] = "learned"  # position embedding, added once before the blocks
    position_prefix: bool = True  # the learned table has rows for the prefix tokens (False: big_vision, DeiT III)
    gelu: Literal["exact", "tanh"] = (
        "exact"  # exact (erf) as timm and Hugging Face; tanh as the JAX code: Google weights need it
    )
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False  # LayerNorm of q and k per head before the product
    layer_scale: float | None = None  # initial value of a learned scale on each residual branch
    dropout: float = 0.0  # after position, attention output, GELU and MLP output
    attention_dropout: float = 0.0  # on attention probabilities
    drop_path: float = 0.0  # chance that a sample skips a residual branch (of the last block, if linear)
    drop_path_schedule: Literal["linear", "constant"] = "linear"  # over depth
    patch_dropout: float = 0.0  # share of patches left out of each training image
    stem: tuple[int, ...] | None = (
        None  # hybrid: bottleneck units per ResNet stage; () is the root alone; None: no stem
    )
    stem_width: int = 64  # channels after the root
    stem_numerics: Literal["google", "timm"] = "google"  # eps of GroupNorm and of weight standardisation

    def __post_init__(self) -> None:
        check_choices(self)
        check_resolution(self.resolution)
        check_positive(self, "patch_size", "channels", "width", "depth", "mlp_dim", "num_heads", "stem_width")
        check_fraction(self, "dropout", "attention_dropout", "drop_path", "patch_dropout")
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width} is not divisible by num_heads={self.num_heads}")
        if self.position == "sincos2d" and self.width % 4:
            raise ValueError(f"width={self.width} is not divisible by 4, which position='sincos2d' needs")
        if self.pool == "token" and self.class_token is False:
            raise ValueError(
                "pool='token' reads a class token that class_token=False leaves out; use pool='gap' or 'map'"
            )
        if self.pool_norm == "after" and self.pool != "gap":
            raise ValueError(f"pool_norm='after' has no effect with pool={self.pool!r}; it belongs to pool='gap'")
        if self.num_registers < 0:
            raise ValueError(f"num_registers={self.num_registers} is negative")
        if self.stem is None and self.stem_numerics != "google":
            raise ValueError(f"stem_numerics={self.stem_numerics!r} has no effect without a stem")
        if not self.position_prefix and (self.position != "learned" or not self.num_prefix):
            raise ValueError(
                "position_prefix=False has no effect without prefix tokens and a learned position embedding"
            )
        check_above_zero(self, "layer_norm_eps")
        if self.layer_scale is not None and not math.isfinite(self.layer_scale):
            raise ValueError(f"layer_scale={self.layer_scale} is not finite")
        if self.stem is not None:
            check_stages("stem", self.stem)
            widths = [self.stem_width << i for i in range(len(self.stem) + 2)]
            if odd := [width for width in widths if width > GROUPS and width % GROUPS]:
                raise ValueError(
                    f"stem_width={self.stem_width} makes {odd[0]} channels, which {GROUPS} groups do not divide;"
                    f" take a power of two or a multiple of {GROUPS}"
                )
        self.grid_of(*self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Image height and width in px."""
        return pair(self.resolution)

    @property
    def stride(self) -> int:
        """Pixels between neighbouring patches: the number in the name of a pure ViT."""
        if self.stem is None:
            return self.patch_size
        return self.patch_size * (
            4 << max(len(self.stem) - 1, 0)
        )  # root convolution 2, root pool 2, later stages 2 each

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns at `resolution`."""
        return self.grid_of(*self.size)

    @property
    def has_class_token(self) -> bool:
        return self.pool == "token" if self.class_token is None else self.class_token

    @property
    def num_prefix(self) -> int:
        """Class token and registers, which come before the patches."""
        return int(self.has_class_token) + self.num_registers

    @property
    def num_tokens(self) -> int:
        return self.num_prefix + self.grid[0] * self.grid[1]

    @property
    def num_positions(self) -> int:
        """Rows of the learned position table."""
        return self.num_tokens if self.position_prefix else self.num_tokens - self.num_prefix

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patch rows and columns of an image; an image that leaves a rest is an error."""
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            near = [max(round(side / self.stride), 1) * self.stride for side in (height, width)]
            raise ValueError(
                f"image of {height}x{width} px is not divisible into patches of {self.stride} px"
                f"; nearest: {near[0]}x{near[1]}"
            )
        return height // self.stride, width // self.stride


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig:
    """A BiT ResNet (arXiv 1912.11370): pre-activation units, GroupNorm, weight standardisation."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["resnet"] = "resnet"
    resolution: Resolution = (
        224  # image side in px, or (height, width); any size works, this one is recorded and counted
    )
    channels: int = 3  # input channels
    units: tuple[int, ...] = (3, 4, 6, 3)  # bottleneck units per stage
    width_factor: int = 1  # multiplies every width
    group_norm_eps: float = 1e-5
    standardize_eps: float = 1e-10  # under the root of the weight variance; timm: 1e-8
    root_pool: Literal["zero", "infinity"] = "zero"  # what the root max-pool pads with: BiT zeros, big_vision -inf

    def __post_init__(self) -> None:
        check_choices(self)
        check_resolution(self.resolution)
        check_positive(self, "channels", "width_factor")
        check_above_zero(self, "group_norm_eps", "standardize_eps")
        check_stages("units", self.units)
        if not self.units:
            raise ValueError("units=() is a ResNet without stages; give the units of at least one")

    @property
    def size(self) -> tuple[int, int]:
        return pair(self.resolution)

    @property
    def width(self) -> int:
        """Length of pre_logits."""
        return (256 << (len(self.units) - 1)) * self.width_factor


ModelConfig = ViTConfig | ResNetConfig


def pair(resolution: Resolution) -> tuple[int, int]:
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain JSON values; defaults are written out, so a later default does not change an old file."""
    return dataclasses.asdict(config)


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    kinds: dict[str, type[ViTConfig] | type[ResNetConfig]] = {"vit": ViTConfig, "resnet": ResNetConfig}
    kind = values.get("kind", "vit")
    if kind not in kinds:
        raise ValueError(f"kind={kind!r} is not one of {sorted(kinds)}")
    known = {field.name for field in dataclasses.fields(kinds[kind])}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown fields {unknown} in a config of kind {kind!r}; known: {sorted(known)}")
    # JSON has lists only; a frozen, hashable config holds tuples.
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return kinds[kind](**plain)


@functools.cache
def choices_of(kind: type) -> dict[str, tuple[Any, ...]]:
    """The fields of a dataclass that take one of a few values, and these."""
    plain: dict[Any, tuple[Any, ...]] = {bool: (True, False), bool | None: (True, False, None)}
    found = {
        name: get_args(hint) if get_origin(hint) is Literal else plain.get(hint)
        for name, hint in get_type_hints(kind).items()
    }
    return {name: choices for name, choices in found.items() if choices}


def check_choices(values: object) -> None:
    """A misspelt word must not pass for the other one: what is not "tanh" would be the exact GELU."""
    kind: Any = type(values)
    for name, choices in choices_of(kind).items():
        if (value := getattr(values, name)) not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_resolution(resolution: object) -> None:
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    whole = isinstance(sides, tuple) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    if not whole:
        raise ValueError(f"resolution={resolution!r} is neither a positive whole number of px nor (height, width)")


def check_stages(name: str, units: object) -> None:
    if not isinstance(units, tuple) or not all(type(count) is int and count > 0 for count in units):
        raise ValueError(f"{name}={units!r} is not a tuple of whole numbers with at least one unit in every stage")


def check_positive(config: ModelConfig, *names: str) -> None:
    for name in names:
        if type(value := getattr(config, name)) is not int or value < 1:
            raise ValueError(f"{name}={value!r} is not a positive whole number")


def check_above_zero(config: ModelConfig, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}={getattr(config, name)} is not positive")


def check_fraction(config: ModelConfig, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} is not in [0, 1)")
