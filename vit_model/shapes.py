"""Shape annotations for signatures: jaxtyping where it is installed (tests check every call), inert stand-ins where not.

Legend: B batch, C channels, H W image, N tokens (prefix included), D width, h w patch grid, K classes, A heads, L layers.
"""

from typing import TYPE_CHECKING, Any

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

__all__ = ["Bool", "Float", "Int", "UInt8"]
