"""Values of a DICOM header, read from their raw bytes.

pydicom's own conversion raises many kinds of exception, whose texts hold the value. Here a value is what it
should be, or None where it is absent or empty, or `Malformed`, which says nothing.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from fedmedgan.client.data.structure import PIXEL_TAGS

_NUMBER = re.compile(rb"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf(inity)?|nan)", re.IGNORECASE)


class Malformed(Exception):
    """An element is there, and is not what its definition says."""


class Header:
    """Typed access to the elements of a data set, by tag."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        # Taken now, because pydicom replaces raw elements by converted ones whenever it looks at them.
        self._raw = {int(tag): raw for tag, raw in dataset.items() if tag not in PIXEL_TAGS}

    def raw(self, tag: int, *representations: str) -> bytes | None:
        """The bytes of a value; None where the element is absent or empty.

        Raises:
            Malformed: the element states another value representation than those that are allowed.
        """
        element = self._raw.get(tag)
        if element is None:
            return None
        if not isinstance(element, RawDataElement):
            raise Malformed
        if representations and element.VR not in (None, "UN", *representations):
            raise Malformed
        return element.value or None

    def text(self, tag: int) -> str | None:
        """A text of the default character set, without padding."""
        value = self.raw(tag)
        return (value.strip(b"\0 ").decode("ascii", "replace") or None) if value else None

    def shorts(self, tag: int, signed: bool = False) -> list[int] | None:
        """The values of a US or SS element. An element that states SS is signed whatever the caller
        thinks."""
        value = self.raw(tag, "US", "SS", "OW")
        if value is None:
            return None
        if len(value) % 2:
            raise Malformed
        element = self._raw[tag]
        signed = element.VR == "SS" or (signed and element.VR != "US")
        order = "<" if element.is_little_endian else ">"
        return list(struct.unpack(f"{order}{len(value) // 2}{'h' if signed else 'H'}", value))

    def unsigned(self, tag: int) -> int | None:
        """The one value of a US element."""
        values = self.shorts(tag)
        if values is None:
            return None
        if len(values) != 1 or values[0] < 0:
            raise Malformed
        return values[0]

    def integer(self, tag: int) -> int | None:
        """The one value of an IS element."""
        value = self.raw(tag, "IS")
        text = value.strip(b"\0 ") if value else b""
        if not text:
            return None
        if not re.fullmatch(rb"[+-]?\d{1,12}", text):
            raise Malformed
        return int(text)

    def decimal(self, tag: int) -> float | None:
        """The first value of a DS element.

        Raises:
            Malformed: not a number, or not finite.
        """
        value = self.raw(tag, "DS")
        text = value.split(b"\\")[0].strip(b"\0 ") if value else b""
        if not text:
            return None
        if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            raise Malformed
        return float(text)

    def items(self, tag: int) -> Iterator[Header]:
        """The items of a sequence; none where it is absent."""
        if tag not in self._raw:
            return
        try:
            element = self._dataset[tag]
            sequence = list(element.value or []) if element.VR == "SQ" else None
        except Exception:
            raise Malformed from None
        if sequence is None:
            raise Malformed
        yield from (Header(item) for item in sequence)
