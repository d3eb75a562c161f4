"""Shape annotations for signatures: jaxtyping where it is installed (tests check every call), else inert stand-ins.

Legend: B batch, C channels, H W image, N tokens (prefix included), D width, h w patch grid, K classes, A heads.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from typing import Annotated as Bool
    from typing import Annotated as Float
    from typing import Annotated as Int
    from typing import Annotated as UInt8
else:
    try:
        from jaxtyping import Bool, Float, Int, UInt8
    except ImportError:

        class _Inert:
            """`Float[Tensor, "B N D"]` is just `Tensor`."""

            def __class_getitem__(cls, item: tuple[type, str]) -> Any:
                return item[0]

        Bool = Float = Int = UInt8 = _Inert

__all__ = ["Bool", "Float", "Int", "UInt8", "check_images"]


def check_images(images: Tensor, channels: int) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"images are a {type(images).__name__}; this model takes one tensor, all images of one size")
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[2:]:
        shape = tuple(images.shape)
        raise ValueError(f"images have shape {shape}; this model takes (batch, {channels}, height, width)")
    if not images.dtype.is_floating_point:
        raise ValueError(f"images are {images.dtype}; this model takes floating point: use vit_model.normalize first")
