"""Is this byte string built like a DICOM file?

pydicom forgives much: it takes the 10 bytes that are left for an element that claims 4 GB, recurses as deep
as the file asks, and reports what it cannot read as one of nine kinds of exception. So the skeleton of a file
(tags, value representations, lengths, items) is walked here first, without looking at a value, and a damaged
one is refused with a code of its own. The walk follows pydicom where real files bend the standard: implicit
VR inside explicit files, sequences stored as UN, zero bytes after the last element.

Source: DICOM PS3.5 section 7 (elements, nested data sets), annex A.4 (fragments); PS3.10 section 7 (file
format).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

from fedmedgan.client.data.limits import Limits
from fedmedgan.shared.errors import DataError

MAX_DEPTH = 64
"""Levels of sequences. Real images use fewer than ten; Python's stack ends near a thousand frames."""

DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT = "1.2.840.10008.1.2"
BIG_ENDIAN = "1.2.840.10008.1.2.2"

PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA = 0x7FE00010, 0x7FE00008, 0x7FE00009
PIXEL_TAGS = (PIXEL_DATA, FLOAT_PIXEL_DATA, DOUBLE_PIXEL_DATA)

_GROUP_LENGTH, _MEDIA_CLASS, _SYNTAX = 0x00020000, 0x00020002, 0x00020010
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF

_SHORT_VR = frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VR = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_BULK_VR = frozenset(b"OB OD OF OL OV OW".split())


class Span(NamedTuple):
    """Where an element's value lies. `length` is 0xFFFFFFFF where it is undefined."""

    start: int
    length: int


@dataclass(frozen=True)
class Meta:
    """The file meta information, as far as it is needed."""

    syntax: str
    """Transfer Syntax UID."""
    sop_class: str
    """Media Storage SOP Class UID, "" where the file names none."""
    end: int
    """Where the data set starts."""


def read_meta(data: bytes) -> Meta:
    """The start of a file, up to its data set.

    Raises:
        DataError: DICOM_NOT_DICOM no preamble; DICOM_TRUNCATED it ends too early; DICOM_SYNTAX no transfer
        syntax;
            DICOM_VR an unknown value representation; DICOM_DECODE any other damage.
    """
    if data[128:132] != b"DICM":
        raise DataError("DICOM_NOT_DICOM", "the file does not start as a DICOM file does")
    walk = _Walk(data, little=True)
    end = walk.dataset(132, len(data), implicit=False, only_group=2)
    declared = walk.unsigned(_GROUP_LENGTH)
    if declared is not None and 144 + declared > len(data):
        raise _truncated("the file meta information")
    if end == len(data):
        raise _truncated("the file, after its meta information,")
    syntax = walk.text(_SYNTAX)
    if not syntax:
        raise DataError("DICOM_SYNTAX", "the file meta information names no transfer syntax")
    return Meta(syntax, walk.text(_MEDIA_CLASS), end)


def walk_dataset(data: bytes, meta: Meta, limits: Limits) -> frozenset[int]:
    """Walk the whole data set; return the tags of its top level.

    Raises:
        DataError: DICOM_TRUNCATED it ends too early; DICOM_TOO_LARGE it inflates beyond the limit; DICOM_VR
        an
            unknown value representation; DICOM_NESTING sequences too deep; DICOM_DECODE any other damage.
    """
    start = meta.end
    if meta.syntax == DEFLATED:
        data, start = _inflate(data[start:], limits.inflated_bytes), 0
    walk = _Walk(data, little=meta.syntax != BIG_ENDIAN)
    walk.dataset(start, len(data), implicit=meta.syntax == IMPLICIT)
    if not walk.found:
        raise _truncated("the data set")
    return frozenset(walk.found)


def fragments(value: bytes) -> list[bytes]:
    """The fragments of encapsulated pixel data, without the offset table.

    Raises:
        DataError: DICOM_DECODE, the value is not a list of items.
    """
    found, at = [], 0
    while at + 8 <= len(value):
        group, element, length = struct.unpack_from("<HHL", value, at)
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            break
        if tag != _ITEM or at + 8 + length > len(value):
            raise DataError("DICOM_DECODE", "the compressed pixel data is not a list of fragments")
        found.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return found[1:]


def _inflate(data: bytes, cap: int) -> bytes:
    """Inflate raw deflate data, counting first: a bomb is refused before anything is kept."""
    counter, size, pending = zlib.decompressobj(-zlib.MAX_WBITS), 0, data
    try:
        while not counter.eof:
            piece = counter.decompress(pending, 1 << 20)
            pending = counter.unconsumed_tail
            size += len(piece)
            if size > cap:
                raise DataError("DICOM_TOO_LARGE", f"the data set inflates to more than {cap >> 20} MiB")
            if not piece and not pending:
                raise _truncated("the deflated data set")
        return zlib.decompress(data, -zlib.MAX_WBITS, size or 1)
    except zlib.error:
        raise DataError("DICOM_DECODE", "the deflated data set is damaged") from None


def _truncated(what: str) -> DataError:
    return DataError("DICOM_TRUNCATED", f"{what} ends too early")


def _damaged(what: str) -> DataError:
    return DataError("DICOM_DECODE", what)


@dataclass
class _Walk:
    """One pass over a data set; `found` collects the elements of the top level."""

    data: bytes
    little: bool
    found: dict[int, Span] = field(default_factory=dict)

    def __post_init__(self) -> None:
        order = "<" if self.little else ">"
        self._tag_and_long = struct.Struct(order + "HHL").unpack_from
        self._tag_and_short = struct.Struct(order + "HH2sH").unpack_from
        self._long = struct.Struct(order + "L").unpack_from

    def text(self, tag: int) -> str:
        span = self.found.get(tag, Span(0, 0))
        return self.data[span.start : span.start + span.length].strip(b"\0 ").decode("ascii", "replace")

    def unsigned(self, tag: int) -> int | None:
        span = self.found.get(tag, Span(0, 0))
        return int(self._long(self.data, span.start)[0]) if span.length == 4 else None

    def dataset(
        self,
        at: int,
        end: int,
        implicit: bool,
        depth: int = 0,
        open_ended: bool = False,
        only_group: int | None = None,
    ) -> int:
        """Walk the elements from `at`; return the place after the last.

        Args:
            open_ended: the data set is an item of undefined length, so a delimiter ends it.
            only_group: stop before the first element of another group.
        """
        if depth > MAX_DEPTH:
            raise DataError("DICOM_NESTING", f"sequences are nested more than {MAX_DEPTH} deep")
        data = self.data
        if only_group is None and not (implicit and depth):
            # Explicit files may hold implicit items, and some writers mistake the syntax: the first element
            # tells.
            vr = data[at + 4 : at + 6]
            implicit = not (len(vr) == 2 and 0x40 < vr[0] < 0x5B and 0x40 < vr[1] < 0x5B)
        while at < end:
            if at + 8 > end:
                if depth == 0 and not any(data[at:end]):
                    return end
                raise _truncated("an element's header")
            group, element, length = self._tag_and_long(data, at)
            tag = group << 16 | element
            if only_group is not None and group != only_group:
                return at
            if tag == _ITEM_END:
                if open_ended:
                    return at + 8
                raise _damaged("an item ends where none began")
            if tag == 0 and depth == 0 and data.count(0, at, end) == end - at:
                return end
            vr, start = b"", at + 8
            if not implicit:
                vr, length, start = self._explicit(at, end)
            if depth == 0:
                self.found[tag] = Span(start, length)
            if length == _UNDEFINED:
                at = self._undefined(tag, vr, start, end, implicit, depth)
                continue
            if start + length > end:
                raise _truncated("the pixel data" if tag in PIXEL_TAGS and depth == 0 else "an element")
            if vr == b"SQ" and length:
                self._bounded_sequence(start, start + length, implicit, depth)
            at = start + length
        if open_ended:
            raise _truncated("a sequence item")
        return at

    def _explicit(self, at: int, end: int) -> tuple[bytes, int, int]:
        """VR, length and start of the value of an element with explicit VR."""
        _, _, vr, length = self._tag_and_short(self.data, at)
        if vr in _SHORT_VR:
            return vr, length, at + 8
        if vr in _LONG_VR:
            if at + 12 > end:
                raise _truncated("an element's header")
            return vr, self._long(self.data, at + 8)[0], at + 12
        if b"AA" <= vr <= b"ZZ":
            raise DataError("DICOM_VR", "an element has a value representation that DICOM does not know")
        return b"", self._long(self.data, at + 4)[0], at + 8

    def _undefined(self, tag: int, vr: bytes, at: int, end: int, implicit: bool, depth: int) -> int:
        if vr in _BULK_VR or (not vr and tag == PIXEL_DATA):
            return self._fragment_list(at, end)
        if vr in (b"", b"SQ", b"UN"):
            return self._items(at, end, implicit, depth)
        raise _damaged("an element of text has no length")

    def _items(self, at: int, end: int, implicit: bool, depth: int) -> int:
        """Walk the items of a sequence of undefined length; return the place after its delimiter."""
        while True:
            if at + 8 > end:
                raise _truncated("a sequence")
            group, element, length = self._tag_and_long(self.data, at)
            tag, at = group << 16 | element, at + 8
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise _damaged("a sequence holds something that is not an item")
            if length == _UNDEFINED:
                at = self.dataset(at, end, implicit, depth + 1, open_ended=True)
            elif at + length > end:
                raise _truncated("a sequence item")
            else:
                self.dataset(at, at + length, implicit, depth + 1)
                at += length

    def _bounded_sequence(self, at: int, end: int, implicit: bool, depth: int) -> None:
        """Walk a sequence of defined length, for its depth only.

        Nothing in it can shift what follows and pydicom reads it only when asked, so other damage is let
        pass: vendors' private sequences are full of it.
        """
        try:
            while at + 8 <= end:
                _, _, length = self._tag_and_long(self.data, at)
                open_ended = length == _UNDEFINED
                stop = end if open_ended else min(at + 8 + length, end)
                at = self.dataset(at + 8, stop, implicit, depth + 1, open_ended)
        except DataError as error:
            if error.code == "DICOM_NESTING":
                raise

    def _fragment_list(self, at: int, end: int) -> int:
        while True:
            if at + 8 > end:
                raise _truncated("the compressed pixel data")
            group, element, length = self._tag_and_long(self.data, at)
            tag, at = group << 16 | element, at + 8
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise _damaged("the compressed pixel data is not a list of fragments")
            if at + length > end:
                raise _truncated("the compressed pixel data")
            at += length
