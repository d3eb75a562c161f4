from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def has_simd() -> bool: ...
def read_sizes(images: Sequence[bytes | memoryview], sizes: NDArray[np.int32], /) -> None: ...
def decode(
    images: Sequence[bytes | memoryview],
    crops: NDArray[np.int32],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    status: NDArray[np.uint8],
    height: int,
    width: int,
    cubic: bool,
    simd: bool,
    /,
) -> None: ...
