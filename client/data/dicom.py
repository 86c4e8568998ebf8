"""One DICOM file, taken to be hostile, to native pixels.

The file is checked in the order magic, skeleton, transfer syntax, required elements, geometry, bits, frames,
length, codestream; only then pydicom decodes it. So each kind of damage has a code of its own, no error text
repeats a value of the file, and nothing large is allocated for a file that only claims to be large.
`grayscale.to_image` makes a training image of the pixels; `worker` runs both in a process that may crash.

Source: DICOM PS3.3 C.7.6.3 (Image Pixel module), C.7.6.6 (Multi-frame), PS3.5 section 8 and annex A
(encoding).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import get_decoder
from pydicom.uid import UID, UID_dictionary

from fedmedgan.client.data import codestream, structure
from fedmedgan.client.data.header import Header, Malformed
from fedmedgan.client.data.limits import Limits
from fedmedgan.shared.errors import DataError

SOP_INSTANCE_UID, MODALITY, PATIENT_ID = 0x00080018, 0x00080060, 0x00100020
BURNED_IN, PADDING_VALUE, PADDING_LIMIT = 0x00280301, 0x00280120, 0x00280121
WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION = 0x00281050, 0x00281051, 0x00281056
RESCALE_INTERCEPT, RESCALE_SLOPE = 0x00281052, 0x00281053
MODALITY_LUT, VOI_LUT, PRESENTATION_SHAPE = 0x00283000, 0x00283010, 0x20500020
PIXEL_REPRESENTATION = 0x00280103

_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES = 0x00280002, 0x00280004, 0x00280006, 0x00280008
_ROWS, _COLUMNS, _ALLOCATED, _STORED = 0x00280010, 0x00280011, 0x00280100, 0x00280101

_READ = [
    *(SOP_INSTANCE_UID, MODALITY, PATIENT_ID, BURNED_IN, PADDING_VALUE, PADDING_LIMIT, PRESENTATION_SHAPE),
    *(WINDOW_CENTER, WINDOW_WIDTH, WINDOW_FUNCTION, RESCALE_INTERCEPT, RESCALE_SLOPE, MODALITY_LUT, VOI_LUT),
    *(_SAMPLES, _PHOTOMETRIC, _PLANAR, _FRAMES, _ROWS, _COLUMNS, _ALLOCATED, _STORED, PIXEL_REPRESENTATION),
    *(0x00280102, 0x7FE00001, 0x7FE00002),  # high bit, extended offset table and its lengths: for pydicom
    *structure.PIXEL_TAGS,
]
"""The only elements that are ever read."""

_ALLOWED_BITS = {
    structure.PIXEL_DATA: (1, 8, 16, 32),
    structure.FLOAT_PIXEL_DATA: (32,),
    structure.DOUBLE_PIXEL_DATA: (64,),
}
_ONE_SAMPLE = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_THREE_SAMPLES = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
_MAX_FRAMES = 65_536
_IMAGE_CLASSES = ("Image Storage", "Segmentation Storage", "Parametric Map Storage", "RT Dose Storage")
"""How the names of the SOP classes end whose files hold pixels."""

_JPEG_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")
_FAMILIES = {
    **dict.fromkeys((*_JPEG_LOSSY, *(f"1.2.840.10008.1.2.4.{n}" for n in (57, 70, 80, 81))), "jpeg"),
    **dict.fromkeys((f"1.2.840.10008.1.2.4.{n}" for n in (90, 91, 201, 202, 203)), "j2k"),
    "1.2.840.10008.1.2.5": "rle",
}
"""Compressed transfer syntaxes that pydicom can decode, and the kind of their codestream."""


@dataclass(frozen=True)
class DicomImage:
    """An image file whose native pixels could be read."""

    pixels: np.ndarray
    """Stored values, shape (rows, columns[, 3]), or (frames, rows, columns[, 3]) for more than one frame."""
    frames: int
    photometric: str
    """Photometric Interpretation: MONOCHROME1, MONOCHROME2, PALETTE COLOR, RGB or a YBR one."""
    header: Header

    def sha256(self) -> str:
        """Hash of the native pixels: C order, little endian, 64 hex digits."""
        little = self.pixels.astype(self.pixels.dtype.newbyteorder("<"), copy=False)
        return hashlib.sha256(np.ascontiguousarray(little).data).hexdigest()


@dataclass(frozen=True)
class _Geometry:
    keyword: int  # which of the three pixel elements
    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int
    stored: int
    photometric: str

    @property
    def shape(self) -> tuple[int, ...]:
        frames = (self.frames,) if self.frames > 1 else ()
        return (*frames, self.rows, self.columns, *((3,) if self.samples == 3 else ()))


def silence_pydicom() -> None:
    """pydicom's warnings and log lines repeat values of the file: none of them is shown. For worker
    processes."""
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    logging.getLogger("pylibjpeg").setLevel(logging.CRITICAL + 1)


def read_bytes(path: str | os.PathLike[str], limits: Limits) -> bytes:
    """The content of a regular file; never waits for a pipe, never follows a link.

    Raises:
        DataError: DATA_UNSAFE_PATH not a regular file; DATA_PATH cannot be read; DICOM_TOO_LARGE.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError("DATA_UNSAFE_PATH", "not a regular file")
            if status.st_size > limits.file_bytes:
                raise DataError("DICOM_TOO_LARGE", f"the file is larger than {limits.file_bytes >> 20} MiB")
            return file.read(status.st_size)
    except OSError as error:
        raise DataError("DATA_PATH", f"the file cannot be read ({error.strerror})") from None


def read(data: bytes, limits: Limits) -> DicomImage:
    """Native pixels and header of one DICOM file.

    Args:
        data: the whole file.

    Raises:
        DataError: with exactly one of these codes, checked in this order.
            DICOM_NOT_DICOM, DICOM_TRUNCATED, DICOM_SYNTAX, DICOM_TOO_LARGE, DICOM_VR, DICOM_NESTING: see
            `structure`. DICOM_NOT_IMAGE: no pixels, and none were promised. DICOM_MISSING: a required
            element is absent or empty. DICOM_GEOMETRY, DICOM_BITS, DICOM_FRAMES, DICOM_PHOTOMETRIC:
            impossible values. DICOM_TOO_LARGE: more samples than `limits`. DICOM_CODEC_MISSING: no installed
            decoder. DICOM_PIXEL_LENGTH: too few bytes, or whole frames too many (less than a frame is
            padding). DICOM_DECODE: the decoder failed.
    """
    meta = structure.read_meta(data)
    uid = UID(meta.syntax)
    if uid.is_private or uid not in UID_dictionary or uid.type != "Transfer Syntax":
        raise DataError("DICOM_SYNTAX", "the transfer syntax is not one of the DICOM standard")
    tags = structure.walk_dataset(data, meta, limits)
    keywords = [tag for tag in structure.PIXEL_TAGS if tag in tags]
    if not keywords:
        raise _no_pixels(meta.sop_class, tags)
    if len(keywords) > 1:
        raise DataError("DICOM_DECODE", "the file holds several kinds of pixel data")
    _check_codec(uid)
    try:
        dataset = pydicom.dcmread(BytesIO(data), specific_tags=_READ)
        header = Header(dataset)
        value = dataset.get_item(keywords[0]).value or b""
    except MemoryError:
        raise _too_large() from None
    except Exception:
        raise DataError("DICOM_DECODE", "the data set cannot be parsed") from None

    geometry = _geometry(header, keywords[0], limits)
    plugin = ""
    if uid.is_encapsulated:
        plugin = _check_codestream(value, geometry, meta.syntax)
    else:
        _check_length(len(value), geometry)
    return DicomImage(_decode(dataset, geometry, plugin), geometry.frames, geometry.photometric, header)


def _no_pixels(sop_class: str, tags: frozenset[int]) -> DataError:
    """Not an image, or an image that was cut off just before its pixels."""
    promised = UID(sop_class).name.endswith(_IMAGE_CLASSES) or _ROWS in tags
    if promised and max(tags) < structure.FLOAT_PIXEL_DATA:
        return DataError("DICOM_TRUNCATED", "the file ends before its pixel data")
    return DataError("DICOM_NOT_IMAGE", "the file holds no image")


def _check_codec(uid: UID) -> None:
    try:
        if get_decoder(uid).is_available:
            return
        hint = 'pip install "fedmedgan[hospital]"'
    except NotImplementedError:
        hint = "export the file again, uncompressed if possible"
    raise DataError("DICOM_CODEC_MISSING", "no installed decoder reads this transfer syntax", hint=hint)


def _geometry(header: Header, keyword: int, limits: Limits) -> _Geometry:
    """The Image Pixel module, element by element."""
    rows = _unsigned(header, _ROWS, "Rows", "DICOM_GEOMETRY")
    columns = _unsigned(header, _COLUMNS, "Columns", "DICOM_GEOMETRY")
    allocated = _unsigned(header, _ALLOCATED, "Bits Allocated", "DICOM_BITS")
    stored = allocated
    if keyword == structure.PIXEL_DATA:
        stored = _unsigned(header, _STORED, "Bits Stored", "DICOM_BITS")
        if _unsigned(header, PIXEL_REPRESENTATION, "Pixel Representation", "DICOM_BITS") > 1:
            raise DataError("DICOM_BITS", "the pixel representation is neither signed nor unsigned")
    samples = _unsigned(header, _SAMPLES, "Samples per Pixel", "DICOM_PHOTOMETRIC")
    photometric = _photometric(header, samples)
    if rows == 0 or columns == 0:
        raise DataError("DICOM_GEOMETRY", "the image has no rows or no columns")
    if allocated not in _ALLOWED_BITS[keyword] or not 1 <= stored <= allocated:
        raise DataError("DICOM_BITS", "impossible bits allocated or stored")
    try:
        frames = header.integer(_FRAMES)
    except Malformed:
        frames = 0
    frames = 1 if frames is None else frames
    if not 1 <= frames <= _MAX_FRAMES:
        raise DataError("DICOM_FRAMES", f"the number of frames is not between 1 and {_MAX_FRAMES}")
    if rows * columns * samples * frames > limits.samples:
        raise _too_large()
    return _Geometry(keyword, rows, columns, samples, frames, allocated, stored, photometric)


def _unsigned(header: Header, tag: int, name: str, code: str) -> int:
    try:
        value = header.unsigned(tag)
    except Malformed:
        raise DataError(code, f"{name} is not a number") from None
    if value is None:
        raise _missing(tag, name)
    return value


def _photometric(header: Header, samples: int) -> str:
    try:
        photometric = header.text(_PHOTOMETRIC)
    except Malformed:
        photometric = ""
    if photometric is None:
        raise _missing(_PHOTOMETRIC, "Photometric Interpretation")
    if photometric not in {1: _ONE_SAMPLE, 3: _THREE_SAMPLES}.get(samples, ()):
        raise DataError("DICOM_PHOTOMETRIC", "impossible photometric interpretation or samples per pixel")
    return photometric


def _missing(tag: int, name: str) -> DataError:
    return DataError("DICOM_MISSING", f"({tag >> 16:04X},{tag & 0xFFFF:04X}) {name} is missing")


def _too_large() -> DataError:
    return DataError("DICOM_TOO_LARGE", "the image has more samples than the limit")


def _check_length(length: int, geometry: _Geometry) -> None:
    """Uncompressed pixel data must hold every frame, and less than one frame more."""
    frame_bits = geometry.rows * geometry.columns * geometry.samples * geometry.allocated
    if geometry.photometric == "YBR_FULL_422":  # two chroma samples for every two pixels
        frame_bits = frame_bits * 2 // 3
    needed = (frame_bits * geometry.frames + 7) // 8
    if length < needed:
        raise DataError("DICOM_PIXEL_LENGTH", "the pixel data is shorter than its frames")
    if length - needed - needed % 2 >= max(frame_bits // 8, 1):
        raise DataError("DICOM_PIXEL_LENGTH", "the pixel data holds more frames than it declares")


def _check_codestream(value: bytes, geometry: _Geometry, syntax: str) -> str:
    """Compressed pixel data must hold as many frames as declared, each of the declared geometry.

    Returns:
        The decoding plugin that must be used, "" for any.
    """
    family = _FAMILIES[syntax]
    fragments = structure.fragments(value)
    segments = geometry.samples * ((geometry.allocated + 7) // 8)
    starts = [n for n, part in enumerate(fragments) if codestream.starts_frame(part, family, segments)]
    if not starts or starts[0] != 0:
        raise DataError("DICOM_DECODE", "the compressed pixel data does not start with a frame")
    if len(starts) != geometry.frames:
        raise DataError("DICOM_PIXEL_LENGTH", "the compressed pixel data does not hold the declared frames")
    if family == "rle":
        return ""
    plugin = ""
    for first, last in zip(starts, [*starts[1:], len(fragments)], strict=True):
        frame = fragments[first] if last == first + 1 else b"".join(fragments[first:last])
        found = codestream.frame_header(frame, family)
        if (found.rows, found.columns) != (geometry.rows, geometry.columns):
            raise DataError(
                "DICOM_GEOMETRY",
                "the compressed image has other rows or columns than the header",
                hint="export the file again, uncompressed if possible",
            )
        if found.samples != geometry.samples or found.precision > geometry.allocated:
            raise DataError("DICOM_BITS", "the compressed image has other samples or bits than the header")
        if syntax in _JPEG_LOSSY:
            plugin = _lossy_jpeg_plugin(found.precision, geometry.stored)
    return plugin


def _lossy_jpeg_plugin(precision: int, stored: int) -> str:
    """12-bit lossy JPEG needs the one decoder that reads it; others decode it to a wrong picture."""
    if (precision > 8) != (stored > 8):
        raise DataError("DICOM_BITS", "the compressed image has other bits than the header")
    if precision <= 8:
        return ""
    if importlib.util.find_spec("libjpeg") is None:
        raise DataError(
            "DICOM_CODEC_MISSING",
            "12-bit JPEG needs a decoder under the GPL, which is not installed",
            hint='pip install "fedmedgan[codecs-gpl]"',
        )
    return "pylibjpeg"


def _decode(dataset: Dataset, geometry: _Geometry, plugin: str) -> np.ndarray:
    try:
        if plugin:
            dataset.pixel_array_options(decoding_plugin=plugin)
        pixels = np.asarray(dataset.pixel_array)
        del dataset[geometry.keyword]
    except MemoryError:
        raise _too_large() from None
    except Exception:
        raise DataError("DICOM_DECODE", "the pixel data cannot be decoded") from None
    if pixels.shape != geometry.shape:
        raise DataError("DICOM_DECODE", "the decoder returned another shape than the header declares")
    return pixels
