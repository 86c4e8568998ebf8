"""Stored values to the picture that a radiologist would see, as a square training image.

The order is that of the standard: modality LUT or rescale; VOI LUT or window, else the frame's own range;
then inversion. The result keeps its aspect ratio: it is resized, antialiased, until its longer side is S, and
the rest of the square is filled with its minimum (black). Pixel aspect ratios and per-frame functional groups
are not read; an enhanced multi-frame image without a window at its top level is shown over each frame's own
range.

Source: DICOM PS3.3 C.11.1 (Modality LUT), C.11.2 (VOI LUT), C.11.6 (Presentation LUT shape), C.7.5.1.1.2
(padding).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from fedmedgan.client.data import dicom
from fedmedgan.client.data.dicom import DicomImage
from fedmedgan.client.data.header import Header, Malformed
from fedmedgan.shared.errors import DataError

_LUT_DESCRIPTOR, _LUT_DATA = 0x00283002, 0x00283006

Transform = Callable[[np.ndarray], np.ndarray]
"""Values (H, W) to values (H, W), floats."""


def to_frames(image: DicomImage, size: int, most: int, masks: bool = False) -> dict[int, np.ndarray]:
    """Training images of a file, one a frame.

    Frames without information (constant, or not finite) are left out; of more than `most` frames, `most`
    evenly spaced ones are looked at.

    Args:
        size: S, side of the square in pixels.
        most: cap on the number of frames.
        masks: a frame of zeros in MONOCHROME2 is an empty mask, -1 everywhere, rather than no information.

    Returns:
        Place of each frame in the file -> float32 (1, S, S) in [-1, 1]; at least one.

    Raises:
        DataError: DICOM_PHOTOMETRIC, not MONOCHROME1 or MONOCHROME2; DICOM_RESCALE, DICOM_WINDOW, bad
        numbers;
            DICOM_PIXEL_VALUES, no frame holds information.
    """
    found = {}
    for index in (n * image.frames // min(image.frames, most) for n in range(min(image.frames, most))):
        try:
            found[index] = to_image(image, size, index, masks)
        except DataError as error:
            if error.code != "DICOM_PIXEL_VALUES":
                raise
    if not found:
        raise _no_information()
    return found


def to_image(image: DicomImage, size: int, index: int = 0, masks: bool = False) -> np.ndarray:
    """Training image of one frame: float32 (1, S, S) in [-1, 1]. Raises DataError like `to_frames`."""
    if image.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError("DICOM_PHOTOMETRIC", "the image is not grayscale")
    header = image.header
    stored = image.pixels[index] if image.frames > 1 else image.pixels
    if masks and not stored.any() and not _inverted(image):
        return np.full((1, size, size), -1.0, np.float32)
    if not np.isfinite(stored).all() or stored.min() == stored.max():
        raise _no_information()
    padding = _padding(stored, header)
    # 16 bits fit into float32 without rounding; large radiographs then need half the memory.
    values = _modality(header)(stored.astype(np.float32 if stored.dtype.itemsize <= 2 else np.float64))
    voi = _voi(header)
    shown = voi(values) if voi else _full_range(values, padding)
    if _inverted(image):
        shown = 1.0 - shown
    if padding is not None:
        shown[padding] = 0.0
    if not np.isfinite(shown).all() or shown.min() == shown.max():
        raise _no_information()
    return _square(shown.astype(np.float32, copy=False), size)


def _no_information() -> DataError:
    return DataError("DICOM_PIXEL_VALUES", "the image is constant or not finite")


def _padding(stored: np.ndarray, header: Header) -> np.ndarray | None:
    """Where the scanner filled pixels that it did not measure, (H, W) bool; None where nothing is said."""
    if stored.dtype.kind == "f":
        return None
    try:
        signed = stored.dtype.kind == "i"
        first = header.shorts(dicom.PADDING_VALUE, signed)
        last = header.shorts(dicom.PADDING_LIMIT, signed) or first
    except Malformed:
        return None
    if not first or not last:
        return None
    low, high = sorted((first[0], last[0]))
    return (stored >= low) & (stored <= high)


def _modality(header: Header) -> Transform:
    """Stored values to modality values, such as Hounsfield units."""
    try:
        signed = header.unsigned(dicom.PIXEL_REPRESENTATION) == 1
        lut = _first_lut(header, dicom.MODALITY_LUT, signed)
        slope, intercept = header.decimal(dicom.RESCALE_SLOPE), header.decimal(dicom.RESCALE_INTERCEPT)
    except Malformed:
        raise DataError("DICOM_RESCALE", "the modality LUT or rescale cannot be used") from None
    if lut:
        return lut
    slope, intercept = 1.0 if slope is None else slope, intercept or 0.0
    if slope == 0:
        raise DataError("DICOM_RESCALE", "the rescale slope is zero")
    return lambda values: values * slope + intercept


def _voi(header: Header) -> Transform | None:
    """Modality values to [0, 1] as the file asks for; None where it does not ask."""
    try:
        signed = header.unsigned(dicom.PIXEL_REPRESENTATION) == 1
        lut = _first_lut(header, dicom.VOI_LUT, signed)
        if lut:
            return lambda values: _stretch(lut(values))
        center, width = header.decimal(dicom.WINDOW_CENTER), header.decimal(dicom.WINDOW_WIDTH)
        function = header.text(dicom.WINDOW_FUNCTION) or "LINEAR"
    except Malformed:
        raise DataError("DICOM_WINDOW", "the VOI LUT or window cannot be used") from None
    if center is None or width is None:
        return None
    if width <= 0 or (width < 1 and function == "LINEAR"):
        raise DataError("DICOM_WINDOW", "the window is too narrow")
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise DataError("DICOM_WINDOW", "the window has an unknown function")
    return lambda values: _window(values, center, width, function)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, to [0, 1]."""
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -500.0, 500.0)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if width == 1:
        return (values > center - 0.5).astype(values.dtype)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _full_range(values: np.ndarray, padding: np.ndarray | None) -> np.ndarray:
    """[minimum, maximum] of the measured pixels to [0, 1]."""
    measured = values if padding is None else values[~padding]
    if measured.size == 0:
        raise _no_information()
    return np.clip(_stretch(values, measured.min(), measured.max()), 0.0, 1.0)


def _stretch(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    # Halved first: the range of float64 pixels may exceed the largest float64.
    span = high / 2 - low / 2
    if not np.isfinite(span) or span <= 0:
        raise _no_information()
    return (values / 2 - low / 2) / span


def _first_lut(header: Header, tag: int, signed: bool) -> Transform | None:
    """The first look-up table of a sequence; values outside of it take its first or last entry."""
    item = next(header.items(tag), None)
    if item is None:
        return None
    descriptor = item.shorts(_LUT_DESCRIPTOR, signed)
    data = item.raw(_LUT_DATA, "US", "SS", "OW", "OB")
    if descriptor is None or len(descriptor) != 3 or data is None:
        raise Malformed
    entries, first = (descriptor[0] & 0xFFFF) or 65_536, descriptor[1]
    if len(data) >= 2 * entries:
        table = np.array(item.shorts(_LUT_DATA), np.float64)[:entries]
    elif len(data) >= entries:  # 8-bit entries
        table = np.frombuffer(data, np.uint8)[:entries].astype(np.float64)
    else:
        raise Malformed
    return lambda values: table[np.clip(np.rint(values) - first, 0, entries - 1).astype(np.int64)]


def _inverted(image: DicomImage) -> bool:
    """MONOCHROME1 and the presentation LUT shape INVERSE say the same thing: low values are bright."""
    try:
        shape = image.header.text(dicom.PRESENTATION_SHAPE)
    except Malformed:
        shape = None
    return image.photometric == "MONOCHROME1" or shape == "INVERSE"


def _square(shown: np.ndarray, size: int) -> np.ndarray:
    """Values (H, W) in [0, 1] to float32 (1, S, S) in [-1, 1]."""
    rows, columns = shown.shape
    scale = size / max(rows, columns)
    height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
    resized = Image.fromarray(shown).resize((width, height), Image.Resampling.BICUBIC)
    picture = np.clip(np.asarray(resized), 0.0, 1.0)
    square = np.full((size, size), picture.min(), np.float32)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = picture
    return np.clip(2.0 * square - 1.0, -1.0, 1.0)[None].astype(np.float32)
