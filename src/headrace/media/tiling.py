"""A picture to square tiles: the dynamic tiling of InternVL and NVLM (`dynamic_preprocess` of their model code)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headrace.core.spec import TilingSpec
from headrace.media.limits import require_pillow

if TYPE_CHECKING:
    from PIL.Image import Image


def choose_grid(width: int, height: int, spec: TilingSpec) -> tuple[int, int]:
    """(columns, rows) of the grid of `min_tiles` to `max_tiles` tiles whose shape is nearest to a picture's.

    Nearest: the smallest |width ÷ height − columns ÷ rows|. Of two that are as near, the one of more tiles wins if the
    picture has more than half of its pixels.
    """
    most = spec.max_tiles
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1) if i * j >= spec.min_tiles]
    best, best_difference = (1, 1), float("inf")
    # In floating point, and of as many tiles the narrower first, as the models' own code has it: it makes the ties.
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])):
        difference = abs(width / height - columns / rows)
        tie = difference == best_difference and width * height > 0.5 * spec.tile_size**2 * columns * rows
        if difference < best_difference or tie:
            best, best_difference = (columns, rows), difference
    return best


def tile_count(grid: tuple[int, int], spec: TilingSpec) -> int:
    """Tiles that a picture of this grid becomes, the thumbnail with them."""
    inside = grid[0] * grid[1]
    return inside + (spec.thumbnail and inside > 1)


def cut(image: NDArray[np.uint8] | Image, spec: TilingSpec, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """(tiles, side, side, 3): the picture made as large as its grid (bicubic), cut row by row; then the thumbnail.

    `image` (height, width, 3), or grey or RGB. `size`: its (width, height), where `image` is a smaller copy of it.
    """
    require_pillow()
    from PIL import Image as Pillow

    picture = Pillow.fromarray(image) if isinstance(image, np.ndarray) else image
    columns, rows = grid = choose_grid(*(size or picture.size), spec)
    side = spec.tile_size
    tiles = np.empty((tile_count(grid, spec), side, side, 3), dtype=np.uint8)
    whole = _resized(picture, columns * side, rows * side)
    inside = whole.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    tiles[: columns * rows] = inside.reshape(-1, side, side, 3)
    if len(tiles) > columns * rows:
        tiles[-1] = _resized(picture, side, side)
    return tiles


def _resized(picture: Image, width: int, height: int) -> NDArray[np.uint8]:
    from PIL.Image import Resampling

    return np.asarray(picture.resize((width, height), Resampling.BICUBIC).convert("RGB"))
