"""Sheets of images for people to look at: a grid of tiles, and grids side by side with captions.

The same images give the same bytes. Nothing is stretched or enhanced from one image to the next: -1 is black
and 1 is white everywhere, so that two grids can be compared by eye.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fedmedgan.shared.errors import ModelError

GAP = 2
"""Pixels between tiles."""
GAP_GREY = 96
MARGIN = 8
"""Pixels around a frame of a film strip."""
CAPTION_SIZE = 13
PAPER, INK = 255, 0


def grid(images_N1HW: Any, columns: int) -> Image.Image:
    """Lay images out in rows, left to right and top to bottom.

    Args:
        images_N1HW: values in [-1, 1], array or CPU tensor; values outside are shown as black or white.
        columns: tiles in a row, at least 1; a last row may be part full.

    Returns:
        An 8-bit grey image. No image at all gives a single grey pixel.

    Raises:
        ModelError: MODEL_NOT_FINITE, an image holds NaN or infinity; MODEL_MISMATCH, not (N, 1, H, W).
    """
    tiles_NHW = _grey(images_N1HW)
    count, height, width = tiles_NHW.shape
    if count == 0:
        return Image.new("L", (1, 1), GAP_GREY)
    columns = min(max(columns, 1), count)
    rows = -(-count // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), GAP_GREY, np.uint8)
    for n, tile in enumerate(tiles_NHW):
        top, left = n // columns * (height + GAP), n % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = tile
    return Image.fromarray(sheet)


def by_class(images_N1HW: np.ndarray, labels_N: np.ndarray, classes: int, columns: int) -> Image.Image:
    """A grid with one row a class: its first `columns` images, black where there are fewer."""
    rows = np.full((classes, columns, *images_N1HW.shape[1:]), -1, np.float32)
    for label in range(classes):
        own = images_N1HW[labels_N == label][:columns]
        rows[label, : len(own)] = own
    return grid(rows.reshape(-1, *images_N1HW.shape[1:]), columns)


def film_strip(frames: list[tuple[str, Image.Image]]) -> Image.Image:
    """Grids side by side, each under its caption: rounds of a training, or arms of a comparison.

    Args:
        frames: caption and grid, in order. Line breaks in a caption start a new line.

    Returns:
        An 8-bit grey image on white. No frame at all gives a single white pixel.
    """
    if not frames:
        return Image.new("L", (1, 1), PAPER)
    font = ImageFont.load_default(CAPTION_SIZE)
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    boxes = [pen.multiline_textbbox((0, 0), caption, font=font) for caption, _ in frames]
    text_height = max(round(box[3]) for box in boxes)
    widths = [max(picture.width, round(box[2])) for box, (_, picture) in zip(boxes, frames, strict=True)]
    height = max(picture.height for _, picture in frames)
    strip = Image.new("L", (sum(widths) + MARGIN * (len(frames) + 1), text_height + height + 3 * MARGIN), PAPER)
    pen, left = ImageDraw.Draw(strip), MARGIN
    for width, (caption, picture) in zip(widths, frames, strict=True):
        pen.multiline_text((left, MARGIN), caption, fill=INK, font=font)
        strip.paste(picture.convert("L"), (left, text_height + 2 * MARGIN))
        left += width + MARGIN
    return strip


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file without any text or time in it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _grey(images_N1HW: Any) -> np.ndarray:
    """(N, H, W) bytes of images in [-1, 1]."""
    if isinstance(images_N1HW, Tensor):
        images_N1HW = images_N1HW.detach().cpu().numpy()
    images = np.asarray(images_N1HW, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] != 1:
        raise ModelError("MODEL_MISMATCH", f"images to draw have shape {images.shape}, not (N, 1, H, W)")
    if not np.isfinite(images).all():
        raise ModelError("MODEL_NOT_FINITE", "the images to draw hold values that are not finite")
    return np.rint((np.clip(images[:, 0], -1, 1) + 1) * 127.5).astype(np.uint8)
