"""DICOM in: real files with quirks, the bad-input catalogue D01-D30, damage at every byte, and the picture
that results."""

from __future__ import annotations

import csv
import importlib.util
import io
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing
from pydicom.sequence import Sequence
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from fedmedgan.client.data import codestream, dicom, grayscale, structure
from fedmedgan.client.data.limits import Limits
from fedmedgan.client.data.patients import RADIOLOGY, check_folder
from fedmedgan.shared.errors import HINTS, DataError
from fedmedgan.shared.study import Images

LIMITS = Limits()
PACKAGED = Path(pydicom.__file__).parent / "data" / "test_files"
RULES = Images(classes=("image",), modalities=RADIOLOGY)

LOSSY_COLOUR = {"us_ybr422_jpeg_30frames.dcm", "xc_jpeg_with_icon.dcm"}
"""Their reference was made by another JPEG decoder, which rounds otherwise."""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        dicom.silence_pydicom()
        yield


def make(rows: int = 8, columns: int = 8, seed: int = 0, **changes) -> Dataset:
    """A small radiograph. A change of None deletes the element."""
    pixels = np.random.default_rng(seed).integers(0, 4096, (rows, columns), dtype=np.uint16)
    ds = Dataset()
    ds.SOPClassUID = ComputedRadiographyImageStorage
    ds.SOPInstanceUID = f"1.2.826.0.1.{seed + 1}"
    ds.PatientID, ds.PatientName, ds.Modality = f"patient-{seed}", "Nobody^Nora", "CR"
    ds.Rows, ds.Columns, ds.SamplesPerPixel = rows, columns, 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.add_new("PixelData", "OW", pixels.tobytes())
    for name, value in changes.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    return ds


def encode(ds: Dataset, syntax: str = ExplicitVRLittleEndian) -> bytes:
    """The bytes of a file."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", ComputedRadiographyImageStorage)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", "1.2.3")
    buffer = io.BytesIO()
    implicit = syntax == ImplicitVRLittleEndian
    ds.save_as(buffer, enforce_file_format=True, implicit_vr=implicit, little_endian=True)
    return buffer.getvalue()


def element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    """An element of an explicit little endian file, as bytes."""
    head = tag.to_bytes(4, "big")
    head = head[1::-1] + head[:1:-1] + vr
    length = len(value) if length is None else length
    long = vr in (b"OB", b"OW", b"SQ", b"UN", b"UT")
    return head + (b"\0\0" + length.to_bytes(4, "little") if long else length.to_bytes(2, "little")) + value


def insert(data: bytes, extra: bytes) -> bytes:
    """Put bytes before the first element of the data set of a file."""
    at = structure.read_meta(data).end
    return data[:at] + extra + data[at:]


def relabel(data: bytes, syntax: str) -> bytes:
    """The same file, saying that it is of another transfer syntax."""
    uid = syntax.encode() + b"\0" * (len(syntax) % 2)
    return data[:132] + element(0x00020010, b"UI", uid) + data[structure.read_meta(data).end :]


def read(data: bytes) -> dicom.DicomImage:
    return dicom.read(data, LIMITS)


def code_from(do: Callable[[], object]) -> str:
    """The code of the DataError that `do` ends in, "" where it returns; any other exception is a failure."""
    code = ""
    try:
        do()
    except DataError as error:
        code = error.code
    assert code == "" or code in HINTS
    return code


def code_of(data: bytes) -> str:
    """The code that reading and showing a file ends in, "" where it is used."""
    return code_from(lambda: grayscale.to_frames(read(data), 32, 8))


# ---- real files


@pytest.fixture(scope="module")
def quirks(shared_data):
    folder = shared_data / "dicom-quirks"
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file)), {f.path: f for f in check_folder(folder, RULES).files}


def test_real_files_are_decoded_skipped_or_refused_as_the_index_says(quirks):
    index, found = quirks
    assert len(index) == 40
    for row in index:
        file = found[row["file"]]
        if row["file"] == "nm_jpeg_12bit_extended.dcm" and importlib.util.find_spec("libjpeg") is None:
            assert (file.outcome, file.code) == ("refused", "DICOM_CODEC_MISSING")
        elif row["expected"] == "decode":
            assert file.outcome == "decoded", row["file"]
            assert "x".join(str(n) for n in file.shape) == row["shape"], row["file"]
            assert file.pixel_sha256 == row["pixel_sha256"] or row["file"] in LOSSY_COLOUR, row["file"]
        elif row["expected"].startswith("skip"):
            assert (file.outcome, file.code) == ("skipped", "DICOM_NOT_IMAGE")
        else:
            assert file.outcome == "refused", row["file"]
            assert file.code in ("DICOM_NOT_DICOM", "DICOM_TRUNCATED")
        assert file.used == (file.code == "") == (file.reason == "")


def packaged_files() -> list[Path]:
    return sorted(p for p in PACKAGED.glob("*.dcm"))


def test_whatever_pydicom_decodes_is_decoded_to_the_same_pixels():
    compared = 0
    for path in packaged_files():
        try:
            expected = pydicom.dcmread(path).pixel_array
        except Exception:
            continue
        image = read(path.read_bytes())
        assert image.pixels.dtype.kind == expected.dtype.kind
        assert np.array_equal(image.pixels, expected), path.name
        compared += 1
    assert compared >= 50


def test_twelve_bit_jpeg_is_refused_rather_than_wrong():
    data = (PACKAGED / "JPGExtended.dcm").read_bytes()
    if importlib.util.find_spec("libjpeg") is None:
        with pytest.raises(DataError) as caught:
            read(data)
        assert caught.value.code == "DICOM_CODEC_MISSING"
        assert "fedmedgan[codecs-gpl]" in caught.value.hint
    stored = element(0x00280101, b"US", b"\x0c\0")
    assert data.count(stored) == 1
    assert code_of(data.replace(stored, element(0x00280101, b"US", b"\x08\0"))) == "DICOM_BITS"


# ---- the catalogue: SECURITY.md section 5, the part that concerns single files


def nested(depth: int, undefined: bool) -> bytes:
    ds = Dataset()
    ds.CodeValue = "x"
    for _ in range(depth):
        outer = Dataset()
        outer.ConceptNameCodeSequence = Sequence([ds])
        outer["ConceptNameCodeSequence"].is_undefined_length = undefined
        ds.is_undefined_length_sequence_item = undefined
        ds = outer
    image = make()
    image.ConceptNameCodeSequence = ds.ConceptNameCodeSequence
    image["ConceptNameCodeSequence"].is_undefined_length = undefined
    return encode(image)


def with_raw(tag: int, vr: bytes, value: bytes, **changes) -> bytes:
    """A file with an element that pydicom would refuse to write."""
    ds = make(**changes)
    ds.pop(tag, None)
    return insert(encode(ds), element(tag, vr, value))


def pixels(values, **changes) -> bytes:
    return encode(make(PixelData=np.asarray(values, np.uint16).tobytes(), **changes))


def float_pixels(values) -> bytes:
    ds = make(PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None, BitsAllocated=32)
    ds.FloatPixelData = np.asarray(values, np.float32).tobytes()
    return encode(ds)


def rtplan() -> bytes:
    return (PACKAGED / "rtplan.dcm").read_bytes()


def jpeg2000(rows: int = 0, columns: int = 0, **changes) -> bytes:
    """A JPEG 2000 file, its codestream changed to claim another size."""
    ds = pydicom.dcmread(PACKAGED / "MR_small_jp2klossless.dcm")
    if rows:
        at = ds.PixelData.find(b"\xff\x4f\xff\x51") + 8
        claim = columns.to_bytes(4, "big") + rows.to_bytes(4, "big")
        ds.PixelData = ds.PixelData[:at] + claim + ds.PixelData[at + 8 :]
    for name, value in changes.items():
        setattr(ds, name, value)
    return encode(ds, JPEG2000Lossless)


def rle(fragment: bytes, frames: int = 1) -> bytes:
    ds = make(NumberOfFrames=frames)
    ds.PixelData = encapsulate([fragment])
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    return encode(ds, RLELossless)


GOOD = encode(make())
RLE_HEAD = (2).to_bytes(4, "little") + (64).to_bytes(4, "little")

CATALOGUE = {
    "D03 nothing": (lambda: b"", "DICOM_NOT_DICOM"),
    "D04 png": (lambda: b"\x89PNG\r\n\x1a\n" + bytes(500), "DICOM_NOT_DICOM"),
    "D04 preamble missing": (lambda: GOOD[132:], "DICOM_NOT_DICOM"),
    "D05 cut in the header": (lambda: GOOD[:400], "DICOM_TRUNCATED"),
    "D05 cut in the meta information": (lambda: GOOD[:200], "DICOM_TRUNCATED"),
    "D06 cut in the pixels": (lambda: GOOD[:-20], "DICOM_TRUNCATED"),
    "D06 too few pixels": (lambda: encode(make(PixelData=bytes(100))), "DICOM_PIXEL_LENGTH"),
    "D08 no rows": (lambda: encode(make(Rows=0)), "DICOM_GEOMETRY"),
    "D08 no columns": (lambda: encode(make(Columns=0)), "DICOM_GEOMETRY"),
    "D08 rows is text": (lambda: with_raw(0x00280010, b"LO", b"eight!"), "DICOM_GEOMETRY"),
    "D09 huge": (lambda: encode(make(Rows=65535, Columns=65535)), "DICOM_TOO_LARGE"),
    "D09 huge by frames": (lambda: encode(make(NumberOfFrames=65536, Rows=4096)), "DICOM_TOO_LARGE"),
    "D10 frames 2^31-1": (lambda: encode(make(NumberOfFrames=2**31 - 1)), "DICOM_FRAMES"),
    "D10 frames -1": (lambda: encode(make(NumberOfFrames=-1)), "DICOM_FRAMES"),
    "D10 frames 0": (lambda: encode(make(NumberOfFrames=0)), "DICOM_FRAMES"),
    "D10 frames ab": (lambda: with_raw(0x00280008, b"IS", b"ab"), "DICOM_FRAMES"),
    "D11 four frames, one declared": (lambda: encode(make(PixelData=bytes(4 * 128))), "DICOM_PIXEL_LENGTH"),
    "D12 plan": (lambda: rtplan(), "DICOM_NOT_IMAGE"),
    "D12 report": (lambda: (PACKAGED / "reportsi.dcm").read_bytes(), "DICOM_NOT_IMAGE"),
    "D13 rows": (lambda: encode(make(Rows=None)), "DICOM_MISSING"),
    "D13 columns": (lambda: encode(make(Columns=None)), "DICOM_MISSING"),
    "D13 samples": (lambda: encode(make(SamplesPerPixel=None)), "DICOM_MISSING"),
    "D13 photometric": (lambda: encode(make(PhotometricInterpretation=None)), "DICOM_MISSING"),
    "D13 bits allocated": (lambda: encode(make(BitsAllocated=None)), "DICOM_MISSING"),
    "D13 bits stored": (lambda: encode(make(BitsStored=None)), "DICOM_MISSING"),
    "D13 representation": (lambda: encode(make(PixelRepresentation=None)), "DICOM_MISSING"),
    "D13 rows empty": (lambda: with_raw(0x00280010, b"US", b""), "DICOM_MISSING"),
    "D14 13 bits": (lambda: encode(make(BitsAllocated=13)), "DICOM_BITS"),
    "D14 more stored than allocated": (lambda: encode(make(BitsStored=17)), "DICOM_BITS"),
    "D14 nothing stored": (lambda: encode(make(BitsStored=0)), "DICOM_BITS"),
    "D14 representation 2": (lambda: encode(make(PixelRepresentation=2)), "DICOM_BITS"),
    "D16 rgb": (lambda: (PACKAGED / "SC_rgb_small_odd.dcm").read_bytes(), "DICOM_PHOTOMETRIC"),
    "D16 palette": (lambda: (PACKAGED / "examples_palette.dcm").read_bytes(), "DICOM_PHOTOMETRIC"),
    "D16 ybr": (lambda: (PACKAGED / "SC_ybr_full_422_uncompressed.dcm").read_bytes(), "DICOM_PHOTOMETRIC"),
    "D16 one sample of RGB": (lambda: encode(make(PhotometricInterpretation="RGB")), "DICOM_PHOTOMETRIC"),
    "D16 unknown": (lambda: encode(make(PhotometricInterpretation="SEPIA")), "DICOM_PHOTOMETRIC"),
    "D17 slope 0": (lambda: encode(make(RescaleSlope=0, RescaleIntercept=0)), "DICOM_RESCALE"),
    "D17 slope nan": (lambda: with_raw(0x00281053, b"DS", b"nan "), "DICOM_RESCALE"),
    "D17 slope inf": (lambda: with_raw(0x00281053, b"DS", b"1e999 "), "DICOM_RESCALE"),
    "D17 intercept text": (lambda: with_raw(0x00281052, b"DS", b"zero"), "DICOM_RESCALE"),
    "D17 window 0": (lambda: encode(make(WindowCenter=0, WindowWidth=0)), "DICOM_WINDOW"),
    "D17 window nan": (lambda: with_raw(0x00281051, b"DS", b"nan ", WindowCenter=0), "DICOM_WINDOW"),
    "D17 window function": (
        lambda: encode(make(WindowCenter=9, WindowWidth=9, VOILUTFunction="CUBIC")),
        "DICOM_WINDOW",
    ),
    "D18 video": (lambda: relabel(GOOD, "1.2.840.10008.1.2.4.102"), "DICOM_CODEC_MISSING"),
    "D19 junk": (lambda: rle(b"junk" * 40), "DICOM_DECODE"),
    "D19 junk behind a good start": (lambda: rle(RLE_HEAD + b"\xff" * 80), "DICOM_DECODE"),
    "D20 syntax unknown": (lambda: relabel(GOOD, "1.2.3.4"), "DICOM_SYNTAX"),
    "D20 syntax is something else": (lambda: relabel(GOOD, ComputedRadiographyImageStorage), "DICOM_SYNTAX"),
    "D20 syntax missing": (lambda: (PACKAGED / "meta_missing_tsyntax.dcm").read_bytes(), "DICOM_SYNTAX"),
    "D22 nesting": (lambda: nested(200, undefined=False), "DICOM_NESTING"),
    "D22 nesting without lengths": (lambda: nested(200, undefined=True), "DICOM_NESTING"),
    "D23 length": (
        lambda: insert(GOOD, element(0x00080001, b"UN", b"0123456789", 0xFFFFFFF0)),
        "DICOM_TRUNCATED",
    ),
    "D24 VR": (lambda: insert(GOOD, element(0x00080001, b"ZZ", b"ab")), "DICOM_VR"),
    "D25 constant": (lambda: pixels(np.full((8, 8), 7)), "DICOM_PIXEL_VALUES"),
    "D25 zeros": (lambda: pixels(np.zeros((8, 8))), "DICOM_PIXEL_VALUES"),
    "D25 nan": (lambda: float_pixels(np.full((8, 8), np.nan)), "DICOM_PIXEL_VALUES"),
    "D25 one infinity": (lambda: float_pixels(np.append(np.arange(63), np.inf)), "DICOM_PIXEL_VALUES"),
    "codestream of another size": (lambda: jpeg2000(rows=60000, columns=60000), "DICOM_GEOMETRY"),
    "codestream twice": (lambda: jpeg2000(NumberOfFrames=2), "DICOM_PIXEL_LENGTH"),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue(name):
    build, code = CATALOGUE[name]
    assert code_of(build()) == code


@pytest.mark.parametrize("missing", ["Rows", "BitsAllocated"])
def test_the_missing_element_is_named(missing):
    with pytest.raises(DataError, match=missing.replace("BitsA", "Bits A")):
        read(encode(make(**{missing: None})))


def test_padding_is_not_a_frame():
    values = make().PixelData
    assert code_of(encode(make(PixelData=values + bytes(126)))) == ""
    assert code_of(encode(make(PixelData=values + bytes(128)))) == "DICOM_PIXEL_LENGTH"
    odd = make(rows=3, columns=3, BitsAllocated=8, BitsStored=8, HighBit=7)
    odd.PixelData = bytes(range(9)) + b"\0"
    assert code_of(encode(odd)) == ""


def test_zero_bytes_after_the_data_set_are_let_pass():
    assert code_of(GOOD + bytes(512)) == code_of(GOOD + bytes(3)) == ""
    assert code_of(GOOD + b"\1\2\3") == "DICOM_TRUNCATED"


def test_frames_of_a_compressed_file_are_counted():
    ds = pydicom.dcmread(PACKAGED / "SC_rgb_rle_2frame.dcm")
    assert read(encode(ds, RLELossless)).pixels.shape[0] == 2
    ds.NumberOfFrames = 1
    assert code_of(encode(ds, RLELossless)) == "DICOM_PIXEL_LENGTH"


@pytest.mark.parametrize("depth", [1, 5, 60])
@pytest.mark.parametrize("undefined", [False, True])
def test_sequences_of_real_depth_pass(depth, undefined):
    assert code_of(nested(depth, undefined)) == ""


def test_damage_inside_a_bounded_private_sequence_is_let_pass():
    item = b"\xfe\xff\x00\xe0" + (12).to_bytes(4, "little") + element(0x00090001, b"ZZ", b"1234")
    assert code_of(insert(GOOD, element(0x00090010, b"SQ", item))) == ""


# ---- size


def bomb(mebibytes: int) -> bytes:
    """A deflated file whose data set inflates to so much."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    start = element(0x00080018, b"UI", b"1.2\0") + element(0x7FE00010, b"OW", b"", mebibytes << 20)
    body = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)
    body += mebibytes * (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH))
    good = encode(make(), DeflatedExplicitVRLittleEndian)
    return good[: structure.read_meta(good).end] + body + packer.flush()


@pytest.mark.parametrize(
    "build",
    [
        lambda: bomb(500),
        lambda: encode(make(Rows=65535, Columns=65535)),
        lambda: jpeg2000(rows=60000, columns=60000),
    ],
    ids=["deflate bomb", "rows and columns", "codestream"],
)
def test_what_only_claims_to_be_large_is_refused_without_allocating(build):
    data = build()
    assert len(data) < 600_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code in ("DICOM_TOO_LARGE", "DICOM_GEOMETRY")
    assert peak < 8 << 20


def test_deflated_files_are_read():
    expected = read(GOOD).sha256()
    deflated = encode(make(), DeflatedExplicitVRLittleEndian)
    assert read(deflated).sha256() == expected
    assert code_of(deflated[:-30]) == "DICOM_TRUNCATED"


def test_large_files_are_not_loaded(tmp_path):
    path = tmp_path / "a.dcm"
    path.write_bytes(GOOD)
    with pytest.raises(DataError, match="DICOM_TOO_LARGE"):
        dicom.read_bytes(path, Limits(file_bytes=len(GOOD) - 1))
    assert dicom.read_bytes(path, Limits(file_bytes=len(GOOD))) == GOOD


# ---- damage anywhere (R15)


def intact(name: str) -> bytes:
    return GOOD if name == "made" else (PACKAGED / name).read_bytes()


@pytest.mark.parametrize(
    "name", ["made", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_RLE.dcm", "image_dfl.dcm"]
)
def test_every_prefix_is_refused_as_cut_or_is_whole(name):
    data = intact(name)
    expected = read(data).sha256()
    places = {*range(min(len(data), 1500)), *range(1500, len(data), max(1, len(data) // 200))}
    for place in sorted(places):
        code = code_from(lambda cut=data[:place]: read(cut))
        if code:
            assert code in ("DICOM_NOT_DICOM", "DICOM_TRUNCATED"), place
        else:  # only what follows the pixels was cut
            assert read(data[:place]).sha256() == expected


@pytest.mark.parametrize("name", ["made", "MR_small.dcm", "MR_small_implicit.dcm", "image_dfl.dcm"])
def test_flipped_bytes_end_in_a_typed_error_or_an_image(name):
    data, random = intact(name), np.random.default_rng(1)
    header = min(len(data), 1600)
    for n in range(300):
        broken = bytearray(data)
        place = random.integers(128, header if n % 3 else len(data))
        broken[place] ^= 1 << random.integers(8) if n % 2 else random.integers(1, 256)
        code_of(bytes(broken))


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=150)
def test_any_bytes_behind_a_good_start_end_in_a_typed_error(tail):
    code_of(GOOD[: structure.read_meta(GOOD).end] + tail)
    code_of(GOOD[:132] + tail)


@given(st.binary(max_size=120))
@settings(deadline=None, max_examples=150)
def test_codestream_headers_end_in_a_typed_error(tail):
    for family, start in (("jpeg", b"\xff\xd8\xff"), ("j2k", b"\xff\x4f\xff\x51")):
        found = code_from(lambda f=family, s=start: codestream.frame_header(s + tail, f))
        assert found in ("", "DICOM_DECODE")


# ---- the picture


def shown(size: int = 8, **changes) -> np.ndarray:
    return grayscale.to_image(read(encode(make(**changes))), size)[0]


def ramp(**changes) -> Dataset:
    """8 x 8 pixels with the values 0, 10, .. 630."""
    return make(PixelData=(10 * np.arange(64, dtype=np.uint16)).tobytes(), **changes)


def test_full_range_without_a_window():
    picture = grayscale.to_image(read(encode(ramp())), 8)
    assert picture.shape == (1, 8, 8)
    assert picture.dtype == np.float32
    assert np.allclose(picture.ravel(), np.linspace(-1, 1, 64), atol=1e-6)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(function):
    ds = ramp(RescaleSlope=2, RescaleIntercept=-300, VOILUTFunction=function)
    ds.WindowCenter, ds.WindowWidth = [100, 5], [400.5, 7]
    stored = ds.PixelData
    expected = apply_windowing(apply_modality_lut(np.frombuffer(stored, np.uint16).reshape(8, 8), ds), ds)
    # pydicom's range after rescaling: 12 bits x 2 - 300.
    expected = (expected + 300) / (2 * 4095)
    picture = grayscale.to_image(read(encode(ds)), 8)[0]
    assert np.allclose((picture + 1) / 2, expected, atol=1e-6)


def test_a_window_of_width_one_is_a_threshold():
    picture = shown(WindowCenter=315.5, WindowWidth=1, PixelData=ramp().PixelData)
    assert set(np.unique(picture)) == {-1.0, 1.0}
    assert (picture.ravel() > 0).tolist() == (10 * np.arange(64) > 315).tolist()


def lut(first: int, table: list[int]) -> Sequence:
    item = Dataset()
    item.add(DataElement(0x00283002, "US", [len(table), first, 16]))
    item.add(DataElement(0x00283006, "US", table))
    return Sequence([item])


def test_voi_lut_agrees_with_pydicom():
    table = [int(1000 * np.sqrt(n)) for n in range(500)]
    ds = ramp(VOILUTSequence=lut(50, table), WindowCenter=1, WindowWidth=2)
    expected = apply_voi(np.frombuffer(ds.PixelData, np.uint16).reshape(8, 8), ds).astype(float)
    picture = grayscale.to_image(read(encode(ds)), 8)[0]
    assert np.allclose((picture + 1) / 2, (expected - expected.min()) / np.ptp(expected), atol=1e-6)


def test_modality_lut_agrees_with_pydicom():
    table = [n * n for n in range(200)]
    ds = ramp(ModalityLUTSequence=lut(0, table))
    expected = apply_modality_lut(np.frombuffer(ds.PixelData, np.uint16).reshape(8, 8), ds).astype(float)
    picture = grayscale.to_image(read(encode(ds)), 8)[0]
    assert np.allclose((picture + 1) / 2, (expected - expected.min()) / np.ptp(expected), atol=1e-6)


@pytest.mark.parametrize("table", [b"", b"\1\2"])
def test_a_damaged_lut_is_refused(table):
    ds = ramp(VOILUTSequence=lut(0, [1, 2, 3, 4]))
    ds.VOILUTSequence[0][0x00283006] = DataElement(0x00283006, "OW", table)
    assert code_of(encode(ds)) == "DICOM_WINDOW"


@pytest.mark.parametrize(
    "changes",
    [
        {"PhotometricInterpretation": "MONOCHROME1"},
        {"PresentationLUTShape": "INVERSE"},
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ],
)
def test_inversion_happens_once(changes):
    assert np.allclose(shown(**changes), -shown(), atol=1e-6)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_pixels_are_black_and_do_not_stretch_the_range(photometric):
    values = np.arange(64, dtype=np.uint16) + 100
    values[:8] = 4000
    ds = make(PixelData=values.tobytes(), PhotometricInterpretation=photometric)
    ds.add_new("PixelPaddingValue", "US", 3990)
    ds.add_new("PixelPaddingRangeLimit", "US", 4095)
    picture = grayscale.to_image(read(encode(ds)), 8)[0].ravel()
    assert np.allclose(picture[:8], -1)
    ascending = np.linspace(-1, 1, 56)
    assert np.allclose(picture[8:], ascending if photometric == "MONOCHROME2" else -ascending, atol=1e-6)


def test_signed_pixels():
    values = np.linspace(-1000, 1000, 64).astype(np.int16)
    changes = {"BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}
    picture = shown(PixelData=values.tobytes(), **changes).ravel()
    assert np.allclose(picture, values / 1000, atol=1e-3)


def test_float_pixels_of_any_size():
    values = np.linspace(-1, 1, 64) * 3e38
    picture = grayscale.to_image(read(float_pixels(values)), 8)[0].ravel()
    assert np.allclose(picture, np.linspace(-1, 1, 64), atol=1e-6)


def test_the_aspect_ratio_is_kept_and_the_rest_is_black():
    values = np.full((20, 40), 500, np.uint16)
    values[5:15, 10:30] = 1500
    ds = make(rows=20, columns=40, PixelData=values.tobytes())
    picture = grayscale.to_image(read(encode(ds)), 32)[0]
    assert np.allclose(picture[:8], -1)
    assert np.allclose(picture[24:], -1)
    assert np.allclose(picture[14:18, 12:20], 1, atol=0.02)
    assert np.allclose(picture, picture[::-1, ::-1], atol=1e-5)


def test_shrinking_averages_instead_of_picking_pixels():
    values = np.zeros((64, 64), np.uint16)
    values[::2] = 1000
    ds = make(rows=64, columns=64, PixelData=values.tobytes())
    picture = grayscale.to_image(read(encode(ds)), 8)[0]
    assert np.abs(picture).max() < 0.2


def test_frames_without_information_are_left_out_and_many_are_thinned():
    frames = np.random.default_rng(0).integers(0, 4096, (10, 8, 8), dtype=np.uint16)
    frames[3] = 7
    image = read(encode(make(NumberOfFrames=10, PixelData=frames.tobytes())))
    assert image.pixels.shape == (10, 8, 8)
    every = grayscale.to_frames(image, 8, 64)
    assert list(every) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert {picture.shape for picture in every.values()} == {(1, 8, 8)}
    few = grayscale.to_frames(image, 8, 5)
    assert list(few) == [0, 2, 4, 6, 8]
    assert all(np.array_equal(few[place], every[place]) for place in few)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([28, 32, 64]), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_every_picture_is_square_and_in_range(rows, columns, size, seed):
    image = read(encode(make(rows=rows, columns=columns, seed=seed)))
    if image.pixels.min() == image.pixels.max():
        assert code_from(lambda: grayscale.to_image(image, size)) == "DICOM_PIXEL_VALUES"
        return
    picture = grayscale.to_image(image, size)
    assert picture.shape == (1, size, size)
    assert np.isfinite(picture).all()
    assert np.abs(picture).max() <= 1
