"""What a compressed frame says about itself, read before a decoder in C or Rust is given it.

Decoders believe the codestream, DICOM readers believe the header. A file in which the two differ is refused:
a header of 512 x 512 with a codestream of 60000 x 60000 would allocate 3.6 GB, and 12-bit JPEG read as 8-bit
is silently wrong.

Source: ITU-T T.81 B.2.2 (JPEG frame header), T.87 C.2.2 (JPEG-LS), T.800 A.5.1 (JPEG 2000 SIZ), PS3.5 G.5
(RLE).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedmedgan.shared.errors import DataError

_JP2_SIGNATURE = b"\x00\x00\x00\x0cjP  "
_J2K_START = b"\xff\x4f\xff\x51"
_JPEG_START = b"\xff\xd8\xff"
_NOT_FRAME_HEADERS = (0xC4, 0xC8, 0xCC)  # Huffman tables, reserved, arithmetic conditioning


@dataclass(frozen=True)
class FrameHeader:
    """Geometry that a codestream declares."""

    rows: int
    columns: int
    samples: int
    precision: int
    """Bits of one sample."""


def starts_frame(fragment: bytes, family: str, rle_segments: int) -> bool:
    """Does a new frame start with this fragment?

    Args:
        family: "jpeg" (JPEG-LS too), "j2k" or "rle".
        rle_segments: segments of one RLE frame: samples per pixel x bytes per sample.
    """
    if family == "jpeg":
        return fragment.startswith(_JPEG_START)
    if family == "j2k":
        return fragment.startswith((_J2K_START, _JP2_SIGNATURE))
    return fragment.startswith(struct.pack("<2L", rle_segments, 64))


def frame_header(frame: bytes, family: str) -> FrameHeader:
    """Read the header of a JPEG, JPEG-LS or JPEG 2000 codestream.

    Raises:
        DataError: DICOM_DECODE, there is none.
    """
    header = _jpeg(frame) if family == "jpeg" else _j2k(frame)
    if header is None:
        raise DataError("DICOM_DECODE", "a compressed frame has no readable header")
    return header


def _jpeg(frame: bytes) -> FrameHeader | None:
    at = 2
    while at + 10 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in _NOT_FRAME_HEADERS) or marker == 0xF7:
            precision, rows, columns, samples = struct.unpack_from(">BHHB", frame, at + 4)
            return FrameHeader(rows, columns, samples, precision)
        at += 2 + struct.unpack_from(">H", frame, at + 2)[0]
    return None


def _j2k(frame: bytes) -> FrameHeader | None:
    # A few writers wrap the codestream into a JP2 file, whose boxes take some hundred bytes.
    at = frame.find(_J2K_START, 0, 4096)
    if at < 0 or at + 45 > len(frame):
        return None
    right, bottom, left, top = struct.unpack_from(">4L", frame, at + 8)
    samples, depth = struct.unpack_from(">HB", frame, at + 40)
    return FrameHeader(bottom - top, right - left, samples, (depth & 0x7F) + 1)
