"""Drawn chest radiographs, so that a consortium can be tried without one patient.

A phantom is a frontal chest radiograph made of a few soft shapes: body, lungs, heart, spine, ribs, clavicles,
diaphragm. Two labels: ``clear``, and ``opacity`` with one to three soft bright patches in a lung. A patient
keeps the anatomy in every image; exposure, noise and position change from one image to the next. Hospitals
differ in vendor, contrast, body size and prevalence. `write_hospital` writes real DICOM, in several encodings, and on
request a mask of the lungs for each image, so that segmentation can be tried, too.

Nothing in here is learned from, or copied from, a real image. The pictures are suggestive, not diagnostic.
"""

from __future__ import annotations

import csv
import dataclasses
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from fedmedgan.shared.errors import DataError, RunError

CLASSES = ("clear", "opacity")
TARGETS = "targets"
"""Sub-folder of the masks."""
MOST_IMAGES = 4
"""A patient has one to four images."""
MOST_PATCHES = 3
CHUNK = 32
"""Images drawn at once: few enough for the cache, which is worth a factor of two."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


# --- anatomy -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Anatomy:
    """What stays the same in every image of a patient: arrays of shape (P,), or (P, 3) for the patches.

    Lengths are in half image sides: x runs from -1 (left of the image, the patient's right) to 1, y from -1
    (top) to 1.
    """

    body: Floats  # half width of the trunk
    shoulder: Floats  # height of the shoulder line at the neck
    lung: Floats  # half width of the rib cage, inside
    apex: Floats  # height of the lung tops
    diaphragm: Floats  # height of the right dome
    heart: Floats  # size of the heart relative to the average
    spine: Floats  # sideways position of the spine
    vertebra: Floats  # distance from one vertebra to the next
    rib: Floats  # distance from one rib to the next
    rib_phase: Floats
    slope: Floats  # how steeply the ribs fall
    clavicle: Floats  # height of the inner ends of the clavicles
    breast: Floats  # density of the breast shadows
    stomach: Floats  # how much gas there is under the left dome
    air: Floats  # how transparent the lungs are
    vessels: Floats  # phase of the pattern of vessels
    tilt: Floats  # rotation in radians
    patch_x: Floats
    patch_y: Floats
    patch_size: Floats
    patch_shape: Floats  # ratio of the axes
    patch_strength: Floats  # 0: there is no such patch; 1: the lung is as dense as soft tissue

    def take(self, patient_N: Integers) -> Anatomy:
        """The anatomy of each image, given the patient of each image."""
        return Anatomy(**{f.name: getattr(self, f.name)[patient_N] for f in dataclasses.fields(self)})


def draw_anatomy(rng: np.random.Generator, patients: int, build: float = 1.0) -> Anatomy:
    """Anatomy of `patients` people; `build` scales the width of bodies (children 0.9, adults 1)."""

    def between(low: float, high: float, *more: int) -> Floats:
        return rng.uniform(low, high, (patients, *more)).astype(np.float32)

    lung = between(0.70, 0.86) * np.float32(build)
    apex = between(-0.80, -0.66)
    diaphragm = between(0.40, 0.60)
    # Patches lie between the mediastinum and the rib cage; the heart covers the lower part of the left lung.
    left = rng.random((patients, MOST_PATCHES)) < 0.5
    patch_y = -0.42 + between(0, 1, MOST_PATCHES) * (diaphragm[:, None] + 0.30)
    inner = np.where(left & (patch_y > 0.0), 0.42, 0.27)
    above = np.clip((0.25 - patch_y) / (0.25 - apex[:, None]), 0, 1)
    outer = lung[:, None] * np.sqrt(1 - above**2.2) - 0.14
    patch_x = inner + between(0, 1, MOST_PATCHES) * np.maximum(outer - inner, 0.02)
    present = np.arange(MOST_PATCHES) < rng.integers(1, MOST_PATCHES + 1, (patients, 1))
    return Anatomy(
        body=lung + between(0.12, 0.30),
        shoulder=between(-0.98, -0.88),
        lung=lung,
        apex=apex,
        diaphragm=diaphragm,
        heart=between(0.85, 1.15),
        spine=between(-0.03, 0.03),
        vertebra=between(0.12, 0.15),
        rib=between(0.17, 0.215),
        rib_phase=between(0, 1),
        slope=between(0.16, 0.34),
        clavicle=between(-0.64, -0.52),
        breast=between(0, 0.06),
        stomach=between(0, 0.22),
        air=between(0.42, 0.52),
        vessels=between(0, 2 * np.pi),
        tilt=rng.normal(0, 0.025, patients).astype(np.float32),
        patch_x=np.where(left, patch_x, -patch_x).astype(np.float32),
        patch_y=patch_y.astype(np.float32),
        patch_size=between(0.11, 0.22, MOST_PATCHES),
        patch_shape=between(0.7, 1.5, MOST_PATCHES),
        patch_strength=(between(0.45, 0.85, MOST_PATCHES) * present).astype(np.float32),
    )


def radiographs(anatomy: Anatomy, labels_N: Integers, size: int, rng: np.random.Generator) -> Floats:
    """Draw one radiograph for each row of `anatomy`, in its own position, exposure and noise.

    Args:
        anatomy: N rows, one an image (`Anatomy.take`).
        labels_N: 0 ``clear``, 1 ``opacity``.
        size: side in pixels.
        rng: source of position, exposure and noise.

    Returns:
        (N, size, size) in [0, 1], dense is bright.
    """
    return radiographs_and_lungs(anatomy, labels_N, size, rng)[0]


def radiographs_and_lungs(
    anatomy: Anatomy, labels_N: Integers, size: int, rng: np.random.Generator
) -> tuple[Floats, NDArray[np.bool_]]:
    """The same radiographs, and which of their pixels are lung that neither heart nor vessels of the middle cover.

    Returns:
        Images as `radiographs` gives them, and masks (N, size, size).
    """
    parts = [
        _draw(anatomy.take(rows), labels_N[rows], size, rng)
        for rows in np.array_split(np.arange(len(labels_N)), max(1, -(-len(labels_N) // CHUNK)))
    ]
    return np.concatenate([images for images, _ in parts]), np.concatenate([lungs for _, lungs in parts])


def _step(distance: Any, width: float) -> Any:
    """0 outside, 1 inside, smooth over `width` about distance 0."""
    t = np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)
    return t * t * (3 - 2 * t)


def _bump(offset: Any, width: float) -> Any:
    """1 at offset 0, smooth, 0 from `width` on."""
    t = np.clip(1 - np.square(offset * np.float32(1 / width)), 0, 1)
    return t * t


def _draw(person: Anatomy, labels_N: Integers, size: int, rng: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    count = len(labels_N)
    a = {f.name: getattr(person, f.name)[:, None, None] for f in dataclasses.fields(person)}

    def per_image(low: float, high: float) -> Floats:
        return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)

    # Where each pixel lies in the patient: position and magnification differ a little from image to image.
    side = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    zoom = per_image(0.97, 1.04)
    x0 = side[None, None, :] * zoom - per_image(-0.05, 0.05)
    y0 = side[None, :, None] * zoom - per_image(-0.05, 0.05)
    x, y = x0 + a["tilt"] * y0 - a["spine"], y0 - a["tilt"] * x0
    across = np.abs(x)  # distance from the spine
    left = _step(x, 0.02)  # the patient's left is on the right of the image

    # Soft tissue: trunk, neck, and the fall of thickness towards the sides.
    width = across / (a["body"] + 0.05 * y)
    shoulders = a["shoulder"] + 0.10 * across - 0.30 * _bump(across, 0.55) + 0.42 * width**6
    body = _step(y - shoulders, 0.06) * _step(1 - width, 0.06)
    tissue = body * (0.76 - 0.24 * np.square(width))

    # The rib cage: round above, straight below.
    above = np.clip((0.25 - y) / (0.25 - a["apex"]), 0, 2)
    lateral = np.where(across > 0.26, (across - 0.26) / (a["lung"] - 0.26), (0.26 - across) / 0.32)
    cage_radius = np.square(lateral) + above * above
    cage = _step(1 - cage_radius, 0.16)
    dome = a["diaphragm"] + 0.05 * left + np.float32(0.85) * np.square(across - 0.38)

    # Mediastinum: great vessels with the aortic knob, hila, and a heart that leans to the left.
    middle = 0.12 + 0.05 * _bump(y + 0.36, 0.20) * left + 0.05 * _bump(y + 0.02, 0.30)
    heart_x, heart_y = x - 0.13, y - a["diaphragm"] + 0.17
    along, beside = 0.87 * heart_x + 0.5 * heart_y, 0.87 * heart_y - 0.5 * heart_x
    heart = _step(1 - np.square(along / (0.36 * a["heart"])) - np.square(beside / (0.27 * a["heart"])), 0.45)
    right_border = _bump(y - a["diaphragm"] + 0.22, 0.42)
    mediastinum = np.maximum(_step(middle + 0.08 * right_border - across, 0.06), heart)
    lung = cage * _step(dome - y, 0.05)
    open_lung = lung * (1 - mediastinum)

    # Vessels run out from the hila and thin out.
    out, up = across - 0.16, y - 0.02
    reach = np.sqrt(np.square(out) + np.square(up))
    angle = np.arctan2(up, out)
    angle += 0.35 * np.sin(8 * reach + a["vessels"] + 2 * left)
    branches = np.cos(11 * angle + a["vessels"]) + np.cos(17 * angle - 11 * reach + 2 * a["vessels"])
    vessels = np.maximum(branches - 0.2, 0) * _bump(reach, 0.62) * 0.06 + 0.10 * _bump(reach, 0.26)

    # Consolidation replaces air, so it can only be as dense as the air it replaces.
    filled = _filled(a, labels_N, x, y) if labels_N.any() else np.float32(0)
    air = a["air"] * open_lung * (1 - filled) * (0.82 + 0.18 * _step(0.15 - y, 1.0))
    air += 0.08 * lung * mediastinum

    # Bones.
    wall = np.clip(across / a["lung"], 0, 1.1)
    behind = np.cos(2 * np.pi * ((y - a["slope"] * wall * wall * wall) / a["rib"] + a["rib_phase"]))
    front = np.cos(2 * np.pi * ((y + 0.34 * wall * wall - 0.1) / (1.12 * a["rib"]) + 2 * a["rib_phase"]))
    chest = cage * _step(a["diaphragm"] + 0.25 - y, 0.6) * (1 - 0.7 * mediastinum)
    ribs = 0.095 * _step(behind - 0.35, 0.9) + 0.05 * _step(front - 0.45, 0.9) * _step(wall - 0.45, 0.3)
    edge = _bump(cage_radius - 1.06, 0.22) * _step(dome + 0.2 - y, 0.4) * _step(across - 0.3, 0.2)
    clavicle_y = a["clavicle"] - 0.16 * across + 0.035 * np.sin(7 * across)
    clavicles = _bump(y - clavicle_y, 0.05) * _step(across - 0.07, 0.04) * _step(a["lung"] - across, 0.1)
    discs = 0.75 + 0.25 * np.cos(2 * np.pi * y / a["vertebra"])
    spine = _step(0.085 - across, 0.04) * discs
    bones = chest * ribs + body * (0.06 * edge + 0.11 * clavicles + 0.11 * spine)
    trachea = 0.12 * _step(0.045 - np.abs(x + 0.01), 0.04) * _step(-0.22 - y, 0.1)

    # Below the diaphragm: liver, and gas in the stomach.
    belly = 0.06 * _step(y - dome, 0.10) * body
    bubble = np.square((x - 0.40) / 0.24) + np.square((y - a["diaphragm"] - 0.25) / 0.12)
    round_breast = np.square((across - 0.46) / 0.34) + np.square((y - 0.38) / 0.30)

    density = tissue - air + open_lung * vessels + 0.10 * mediastinum * body
    density += bones - trachea + belly - a["stomach"] * _bump(bubble, 1.0) + a["breast"] * _bump(round_breast, 1.0)

    # Exposure, then quantum noise, which is stronger where less radiation came through.
    shown = np.clip(density, 0, 1.2) * per_image(0.88, 1.10) + per_image(-0.05, 0.05)
    noise = rng.standard_normal(shown.shape, dtype=np.float32) * per_image(0.008, 0.022)
    return np.clip(shown + noise * (0.5 + shown), 0, 1, dtype=np.float32), open_lung > 0.5


def _filled(a: dict[str, Floats], labels_N: Integers, x: Floats, y: Floats) -> Floats:
    """Fraction of the air that opacities replace, shape (N, size, size)."""
    clear = np.ones_like(x)
    for k in range(MOST_PATCHES):
        px, py, size, shape, strength = (a[f"patch_{name}"][..., k] for name in ("x", "y", "size", "shape", "strength"))
        u, v = (x - px) / (size * shape), (y - py) / (size / shape)
        ragged = 0.25 * np.sin(3.1 * u + 17 * px) * np.cos(2.7 * v + 23 * py) + 0.12 * np.sin(5 * u - 4 * v)
        patch = _step(1.0 - np.sqrt(u * u + v * v) + ragged, 1.1)
        clear *= 1 - strength * labels_N[:, None, None].astype(np.float32) * patch
    return 1 - clear


# --- hospitals ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vendor:
    """How a hospital's equipment encodes an image, and how its images and patients look."""

    name: str
    manufacturer: str
    model: str
    modality: str
    """DX or CR."""
    transfer_syntax: str
    photometric: str
    bits_stored: int
    slope: float | None = None
    """RescaleSlope and RescaleIntercept; None writes neither. DX images have none (PS3.3 C.8.11.3)."""
    intercept: float | None = None
    window: bool = False
    """Writes WindowCenter and WindowWidth, in units after the modality LUT."""
    pixel_spacing: float = 3.0
    """Millimetres from one pixel centre to the next, at 128 pixels a side."""
    contrast: float = 1.0
    """Exponent of the tone curve: above 1 is darker."""
    build: float = 1.0
    """Width of the bodies, relative."""
    prevalence: float = 0.5
    """Fraction of patients with an opacity."""


VENDORS = (
    # Twelve bits in sixteen, a modality LUT and a window: the usual computed radiography.
    Vendor(
        name="plates",
        manufacturer="Phantom Plates",
        model="PP-12",
        modality="CR",
        transfer_syntax=ExplicitVRLittleEndian,
        photometric="MONOCHROME2",
        bits_stored=12,
        slope=0.5,
        intercept=-256.0,
        window=True,
        prevalence=0.5,
    ),
    # Inverted: the largest stored value is black.
    Vendor(
        name="inverse",
        manufacturer="Inverse Imaging",
        model="Negative 10",
        modality="DX",
        transfer_syntax=RLELossless,
        photometric="MONOCHROME1",
        bits_stored=10,
        window=True,
        pixel_spacing=2.8,
        contrast=1.25,
        build=0.96,
        prevalence=0.6,
    ),
    # Compressed, eight bits, nothing said about the window.
    Vendor(
        name="compact",
        manufacturer="Compact Radiology",
        model="C8",
        modality="DX",
        transfer_syntax=JPEGLSLossless,
        photometric="MONOCHROME2",
        bits_stored=8,
        pixel_spacing=3.1,
        contrast=0.85,
        build=1.02,
        prevalence=0.4,
    ),
)


def vendor_for(index: int) -> Vendor:
    """The vendor of hospital number `index`: `VENDORS` in turn, each further turn with a look of its own."""
    vendor, turn = VENDORS[index % len(VENDORS)], index // len(VENDORS)
    if turn == 0:
        return vendor
    rng = np.random.default_rng(index)
    return dataclasses.replace(
        vendor,
        model=f"{vendor.model} mark {turn + 1}",
        pixel_spacing=round(vendor.pixel_spacing * rng.uniform(0.9, 1.1), 3),
        contrast=vendor.contrast * rng.uniform(0.85, 1.15),
        build=vendor.build * rng.uniform(0.96, 1.02),
        prevalence=float(np.clip(vendor.prevalence + rng.uniform(-0.1, 0.1), 0.3, 0.7)),
    )


def write_hospital(
    folder: Path, *, patients: int, seed: int, vendor: Vendor, size: int = 128, paired: bool = False
) -> None:
    """Write the DICOM files of one drawn hospital, one sub-folder a class: ``clear/``, ``opacity/``.

    A patient has one to four images. One patient in ten who has an opacity is also seen once without it. The
    same arguments write the same bytes.

    Args:
        folder: new or empty.
        patients: number of patients, at least 1.
        seed: the hospital's own; two hospitals with the same seed have the same patients.
        vendor: encoding and look.
        size: rows and columns.
        paired: also write a mask of the lungs for each image, under ``targets/``, and labels.csv.

    Raises:
        RunError: RUN_PATH, the folder holds something.
        DataError: DATA_EMPTY, no patient was asked for.
    """
    folder = Path(folder)
    if patients < 1:
        raise DataError("DATA_EMPTY", f"{patients} patients", "phantoms", hint="ask for at least one patient")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError("RUN_PATH", "the folder for phantoms is not empty", str(folder))
    rng = np.random.default_rng(seed)
    anatomy = draw_anatomy(rng, patients, vendor.build)
    ill_P = rng.permutation(patients) < round(vendor.prevalence * patients)
    images_P = rng.choice(np.arange(1, MOST_IMAGES + 1), size=patients, p=(0.4, 0.3, 0.2, 0.1))
    patient_N = np.repeat(np.arange(patients), images_P)
    nth_N = np.arange(len(patient_N)) - np.repeat(np.cumsum(images_P) - images_P, images_P)
    recovers_P = ill_P & (images_P > 1) & (rng.random(patients) < 0.1)
    labels_N = (ill_P[patient_N] & ~(recovers_P[patient_N] & (nth_N == 0))).astype(np.int64)
    images, lungs = radiographs_and_lungs(anatomy.take(patient_N), labels_N, size, rng)
    images **= np.float32(vendor.contrast)

    for name in (*CLASSES, *([TARGETS] if paired else [])):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for image, mask, label, patient, nth in zip(images, lungs, labels_N, patient_N, nth_N, strict=True):
        identity = f"PHANTOM-{seed}-{patient + 1:04d}"
        origin = ["fedmedgan phantom", vendor.name, str(seed), identity, str(nth)]
        study = int(nth) + 1
        dataset = to_dicom(image, vendor, patient_id=identity, study=study, origin=origin, synthetic=True)
        file = f"{identity}-{nth + 1}.dcm"
        dataset.save_as(folder / CLASSES[label] / file, enforce_file_format=True)
        if paired:
            dataset = mask_to_dicom(mask, vendor, patient_id=identity, study=study, origin=origin)
            dataset.save_as(folder / TARGETS / file, enforce_file_format=True)
            rows.append((f"{CLASSES[label]}/{file}", CLASSES[label], f"{TARGETS}/{file}"))
    if paired:
        with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as table:
            csv.writer(table).writerows([("path", "label", "target"), *rows])


def to_dicom(
    image_HW: Floats, vendor: Vendor, *, patient_id: str, study: int, origin: list[str], synthetic: bool
) -> Dataset:
    """One frontal chest radiograph as a CR or DX image (PS3.3 A.2, A.26), lossless.

    Args:
        image_HW: values in [0, 1], dense is bright.
        vendor: encoding.
        patient_id: Patient ID; name, birth date and sex are written empty.
        study: number of the study of this patient.
        origin: what the UIDs are made from, so that the same image gets the same UIDs.
        synthetic: the value of Synthetic Data (0008,001C).
    """
    direct = vendor.modality == "DX"
    dataset = _whose(vendor, patient_id=patient_id, study=study, origin=origin)
    dataset.ImageType = ["DERIVED", "PRIMARY"]
    kind = DigitalXRayImageStorageForPresentation if direct else ComputedRadiographyImageStorage
    dataset.SOPClassUID = kind
    dataset.SOPInstanceUID = _uid(*origin, "image")
    dataset.SeriesInstanceUID = _uid(*origin, "series")
    dataset.SyntheticData = "YES" if synthetic else "NO"
    dataset.SeriesNumber = 1
    dataset.BodyPartExamined, dataset.ViewPosition = "CHEST", "AP"
    spacing = vendor.pixel_spacing * 128 / image_HW.shape[0]
    dataset.ImagerPixelSpacing = [round(spacing, 4), round(spacing, 4)]
    dataset.LossyImageCompression = "00"
    if direct:
        dataset.PresentationIntentType = "FOR PRESENTATION"
        dataset.ImageLaterality = "U"
        dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LOG", 1
        dataset.PresentationLUTShape = "INVERSE" if vendor.photometric == "MONOCHROME1" else "IDENTITY"
    block = dataset.private_block(0x0019, f"{vendor.manufacturer.upper()} 1.0", create=True)
    block.add_new(0x01, "LO", "TONE CURVE")
    block.add_new(0x02, "DS", f"{vendor.contrast:.4g}")
    _write_pixels(dataset, image_HW, vendor)
    if vendor.transfer_syntax != ExplicitVRLittleEndian:
        dataset.compress(vendor.transfer_syntax, generate_instance_uid=False)
    return dataset


def mask_to_dicom(
    mask_HW: NDArray[np.bool_], vendor: Vendor, *, patient_id: str, study: int, origin: list[str]
) -> Dataset:
    """A mask of one image as a secondary capture (PS3.3 A.8) of the image's study and modality: 255 in, 0 out."""
    dataset = _whose(vendor, patient_id=patient_id, study=study, origin=origin)
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = _uid(*origin, "mask")
    dataset.SeriesInstanceUID = _uid(*origin, "masks")
    dataset.SyntheticData = "YES"
    dataset.SeriesNumber, dataset.ConversionType = 2, "SYN"
    dataset.DerivationDescription = "Mask of the lungs"
    plain = Vendor("", "", "", vendor.modality, vendor.transfer_syntax, "MONOCHROME2", 8)
    _write_pixels(dataset, mask_HW.astype(np.float32), plain)
    if vendor.transfer_syntax != ExplicitVRLittleEndian:
        dataset.compress(vendor.transfer_syntax, generate_instance_uid=False)
    return dataset


def _whose(vendor: Vendor, *, patient_id: str, study: int, origin: list[str]) -> Dataset:
    """What an image and its mask say alike: patient, study and equipment."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.StudyInstanceUID = _uid(*origin, "study")
    for keyword in ("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "Laterality"):
        setattr(dataset, keyword, "")
    dataset.Modality = vendor.modality
    dataset.Manufacturer, dataset.ManufacturerModelName = vendor.manufacturer, vendor.model
    dataset.PatientID = patient_id
    for keyword in ("PatientName", "PatientBirthDate", "PatientSex"):
        setattr(dataset, keyword, "")
    dataset.PatientOrientation = ["L", "F"]
    dataset.StudyID, dataset.InstanceNumber = str(study), 1
    dataset.BurnedInAnnotation = "NO"
    return dataset


def _uid(*origin: str) -> UID:
    """A UID under root 2.25 (PS3.5 B.2) that is always the same for the same origin."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(origin)).int}")


def _write_pixels(dataset: Dataset, image_HW: Floats, vendor: Vendor) -> None:
    # Detectors leave head room at both ends; the window says which values are meant to be seen.
    top = 2**vendor.bits_stored - 1
    lowest, highest = (round(0.06 * top), round(0.94 * top)) if vendor.window else (0, top)
    stored = lowest + np.clip(image_HW, 0, 1) * (highest - lowest)
    if vendor.photometric == "MONOCHROME1":
        stored = lowest + highest - stored
    allocated = 8 if vendor.bits_stored <= 8 else 16
    pixels = np.rint(stored).astype(np.uint8 if allocated == 8 else np.uint16)

    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, vendor.photometric
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored = allocated, vendor.bits_stored
    dataset.HighBit, dataset.PixelRepresentation = vendor.bits_stored - 1, 0
    slope, intercept = 1.0, 0.0
    if vendor.slope is not None and vendor.intercept is not None:
        slope, intercept = vendor.slope, vendor.intercept
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = slope, intercept, "US"
    if vendor.window:
        # A linear window (PS3.3 C.11.2.1.2) shows centre - width/2 as black, centre + width/2 - 1 as white.
        low, high = lowest * slope + intercept, highest * slope + intercept
        dataset.WindowCenter, dataset.WindowWidth = (low + high + 1) / 2, high - low + 1
    dataset.PixelData = pixels.tobytes()
    dataset["PixelData"].VR = "OB" if allocated == 8 else "OW"
