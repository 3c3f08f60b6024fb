"""Canny edges: lines one pixel wide where the brightness of a picture jumps; a ControlNet draws along them.

    1. gradient       of the brightness, (gx, gy); its size here is |gx| + |gy|
    2. thinning       across an edge only the steepest pixel stays
    3. two limits     above HIGH a pixel is an edge; between LOW and HIGH it may be one
    4. linking        a pixel that may be an edge is one if it touches an edge

Sizes and limits are those of OpenCV's `Canny(picture, 100, 200)`, which does not blur the picture first.  The
ControlNets for Stable Diffusion were trained on such edges.

Source: Canny, "A computational approach to edge detection", 1986.
"""

import numpy as np
from PIL import Image, ImageFilter

LOW, HIGH = 100, 200  # in levels of 255


def canny(picture: Image.Image) -> Image.Image:
    """Return the edges of a picture, white on black, in RGB and of the same size."""
    grey = np.asarray(picture.convert("L"), dtype=np.float32)  # (h, w)
    gx, gy = sobel(grey)
    size = np.abs(gx) + np.abs(gy)
    size = np.where(steepest(size, gx, gy), size, 0)
    edges = link(size > HIGH, size > LOW)
    return Image.fromarray(edges.astype(np.uint8) * 255).convert("RGB")


def sobel(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradient of a picture to the right and downwards, by Sobel's differences; (h, w) each."""
    p = np.pad(grey, 1, mode="edge")
    across, down = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
    return across[:-2] + 2 * across[1:-1] + across[2:], down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]


def steepest(size: np.ndarray, gx: np.ndarray, gy: np.ndarray) -> np.ndarray:
    """Return where the gradient's size is a maximum along its own direction; (h, w)."""
    p = np.pad(size, 1)
    h, w = size.shape

    def beside(dy: int, dx: int) -> np.ndarray:
        return p[1 + dy : 1 + dy + h, 1 + dx : 1 + dx + w]

    tangent = np.tan(np.pi / 8)  # 22.5°, halfway to the diagonal
    flat, steep = np.abs(gy) <= tangent * np.abs(gx), np.abs(gx) <= tangent * np.abs(gy)
    result = np.zeros_like(size, dtype=bool)
    for where, (dy, dx) in (
        (flat, (0, 1)),
        (steep & ~flat, (1, 0)),
        (~flat & ~steep & (gx * gy > 0), (1, 1)),
        (~flat & ~steep & (gx * gy <= 0), (1, -1)),
    ):
        result |= where & (size > beside(-dy, -dx)) & (size >= beside(dy, dx))
    return result


def link(strong: np.ndarray, weak: np.ndarray) -> np.ndarray:
    """Return the weak pixels that a chain of weak pixels joins to a strong one; corners touch, too; (h, w)."""
    edges = strong
    while True:
        wider = np.asarray(Image.fromarray(edges.astype(np.uint8)).filter(ImageFilter.MaxFilter(3))).astype(bool)
        grown = wider & weak
        if np.array_equal(grown, edges):
            return edges
        edges = grown
