"""How strongly images are changed on the device: the recipe's keys, and the levels of AugReg by name.

Steiner et al., "How to train your ViT?" (2021): each level is RandAugment(layers, magnitude) with mixup's alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["LEVELS", "Changes", "Level", "Policy", "changes_of", "check_changes"]

Level = Literal["none", "light1", "light2", "medium1", "medium2", "strong1", "strong2"]
Policy = Literal["none", "randaugment", "three"]

# level -> (layers, magnitude, mixup). light1 still applies operations: at magnitude 0 some of them are strong.
LEVELS: dict[Level, tuple[int, float, float]] = {
    "none": (0, 0.0, 0.0),
    "light1": (2, 0.0, 0.0),
    "light2": (2, 10.0, 0.2),
    "medium1": (2, 15.0, 0.2),
    "medium2": (2, 15.0, 0.5),
    "strong1": (2, 20.0, 0.5),
    "strong2": (2, 20.0, 0.8),
}
LAYERS, MAGNITUDE = 2, 10.0
MOST_LAYERS, MOST_MAGNITUDE = 16, 30.0


@dataclass(frozen=True, slots=True)
class Changes:
    """What is done to the images of a batch on the device, after crop and flip."""

    policy: Policy = "none"
    layers: int = LAYERS
    magnitude: float = MAGNITUDE
    color_jitter: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def is_nothing(self) -> bool:
        return self.policy == "none" and not self.color_jitter and not self.mixes


class Keys(Protocol):
    """The recipe's keys, as AugmentConfig has them."""

    @property
    def preset(self) -> Level | None: ...
    @property
    def policy(self) -> Policy: ...
    @property
    def layers(self) -> int: ...
    @property
    def magnitude(self) -> float: ...
    @property
    def color_jitter(self) -> float: ...
    @property
    def mixup(self) -> float: ...
    @property
    def cutmix(self) -> float: ...


def changes_of(keys: Keys) -> Changes:
    """The keys with a preset filled in."""
    if keys.preset is None:
        return Changes(keys.policy, keys.layers, keys.magnitude, keys.color_jitter, keys.mixup, keys.cutmix)
    layers, magnitude, mixup = LEVELS[keys.preset]
    return Changes("randaugment" if layers else "none", layers, magnitude, keys.color_jitter, mixup, keys.cutmix)


def check_changes(keys: Keys) -> None:
    """Refuse values out of range and keys without effect."""
    if keys.preset is not None:
        given = {"policy": "none", "layers": LAYERS, "magnitude": MAGNITUDE, "mixup": 0.0}
        if doubled := [name for name, default in given.items() if getattr(keys, name) != default]:
            raise ValueError(
                f"preset={keys.preset} already sets {', '.join(doubled)}; remove the preset, or remove {doubled[0]}"
            )
    elif keys.policy != "randaugment" and (keys.layers != LAYERS or keys.magnitude != MAGNITUDE):
        raise ValueError(
            f"layers={keys.layers}, magnitude={keys.magnitude} have no effect with policy={keys.policy}"
            "; set policy=randaugment or remove them"
        )
    if not 1 <= keys.layers <= MOST_LAYERS or not 0 <= keys.magnitude <= MOST_MAGNITUDE:
        raise ValueError(
            f"layers={keys.layers}, magnitude={keys.magnitude} are not 1..{MOST_LAYERS} and 0..{MOST_MAGNITUDE:g}"
            "; AugReg uses 2 layers of magnitude 0 to 20"
        )
    if not 0 <= keys.color_jitter < 1:
        raise ValueError(f"color_jitter={keys.color_jitter} is not 0 <= j < 1; DeiT III uses 0.3, 0 disables it")
    for name in ("mixup", "cutmix"):
        if not 0 <= getattr(keys, name) < 100:
            raise ValueError(
                f"{name}={getattr(keys, name)} is the alpha of a Beta distribution and not negative"
                "; 0.2 to 1 is usual, 0 disables it"
            )
