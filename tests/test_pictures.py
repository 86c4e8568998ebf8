"""Pictures: against a slow loop, and the same bytes every time."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmedgan.client.release.pictures import GAP, GAP_GREY, by_class, film_strip, grid, png
from fedmedgan.shared.errors import ModelError


def _slow_grid(images: np.ndarray, columns: int) -> np.ndarray:
    count, _, height, width = images.shape
    rows = (count + columns - 1) // columns
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), GAP_GREY)
    for n in range(count):
        for y in range(height):
            for x in range(width):
                value = min(max(float(images[n, 0, y, x]), -1.0), 1.0)
                row, column = n // columns * (height + GAP) + y, n % columns * (width + GAP) + x
                sheet[row, column] = round((value + 1) * 127.5)
    return sheet


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 5), st.integers(1, 7), st.integers(0, 100))
def test_grid_is_the_slow_grid(count: int, height: int, width: int, columns: int, seed: int):
    images = np.random.default_rng(seed).uniform(-1.3, 1.3, (count, 1, height, width)).astype(np.float32)
    columns = min(columns, count)
    picture = grid(images, columns)
    assert picture.mode == "L"
    np.testing.assert_array_equal(np.asarray(picture), _slow_grid(images, columns))


def test_grid_takes_half_floats_and_tensors_alike():
    images = np.linspace(-1, 1, 32, dtype=np.float16).reshape(2, 1, 4, 4)
    assert png(grid(images, 2)) == png(grid(torch.from_numpy(images).requires_grad_(), 2))


def test_grid_never_makes_more_columns_than_tiles_and_shows_nothing_as_one_pixel():
    assert grid(np.zeros((2, 1, 4, 4)), 9).size == (2 * 4 + GAP, 4)
    assert grid(np.zeros((0, 1, 4, 4)), 3).size == (1, 1)


@pytest.mark.parametrize(
    ("images", "code"),
    [
        (np.full((1, 1, 4, 4), np.nan), "MODEL_NOT_FINITE"),
        (np.full((1, 1, 4, 4), np.inf), "MODEL_NOT_FINITE"),
        (np.zeros((4, 4)), "MODEL_MISMATCH"),
        (np.zeros((1, 3, 4, 4)), "MODEL_MISMATCH"),
    ],
)
def test_what_cannot_be_drawn(images: np.ndarray, code: str):
    with pytest.raises(ModelError, match=code):
        grid(images, 1)


def test_png_holds_the_same_pixels_no_text_and_the_same_bytes():
    picture = grid(np.random.default_rng(0).uniform(-1, 1, (5, 1, 8, 8)), 3)
    data = png(picture)
    assert data == png(picture.copy())
    read = Image.open(io.BytesIO(data))
    assert read.info == {}
    np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))


def test_film_strip_holds_every_grid_and_its_caption():
    black, white = Image.new("L", (30, 20), 0), Image.new("L", (10, 40), 255)
    frames = [("round 1\nepsilon 2", black), ("a caption wider than its picture", white)]
    strip = film_strip(frames)
    shown = np.asarray(strip)
    assert (shown == 0).sum() >= 30 * 20
    assert strip.height > 40
    assert strip.width > 30 + 100
    assert png(strip) == png(film_strip(frames))
    without = np.asarray(film_strip([("", white)]))
    assert (without == 255).all()
    assert (np.asarray(film_strip([("inked", white)])) < 128).any()


def test_film_strip_of_nothing():
    assert film_strip([]).size == (1, 1)


def test_by_class_is_one_row_a_class_and_black_where_a_class_has_too_few():
    images = np.array([0.2, -0.2, 0.4], dtype=np.float32).reshape(3, 1, 1, 1) * np.ones((1, 1, 4, 4), np.float32)
    picture = by_class(images, np.array([1, 0, 1]), classes=3, columns=2)
    black = np.full((1, 1, 4, 4), -1, np.float32)
    rows = [images[1:2], black, images[0:1], images[2:3], black, black]
    assert png(picture) == png(grid(np.concatenate(rows), 2))
