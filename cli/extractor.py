"""``fedmedgan site extractor``: the declared features that FID, KID and coverage look through."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.console import Console
from rich.markup import escape

from fedmedgan.cli import output
from fedmedgan.shared.errors import DataError, RunError
from fedmedgan.shared.study import Images

if TYPE_CHECKING:
    from fedmedgan.client.release.features import FeatureExtractor

SIZES = tuple(get_args(Images.model_fields["size"].annotation))


def extractor(
    out: Annotated[Path, typer.Option(help="File to write; must not exist.")],
    size: Annotated[int, typer.Option(help=f"Side of the study's images, one of {SIZES}; above 64 it looks at 64.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of PUBLIC labelled DICOM, NEVER of patients: the extractor is sent about. Without, phantoms."
        ),
    ] = None,
    modality: Annotated[
        list[str] | None, typer.Option(help="With --data: take this modality; may be given several times.")
    ] = None,
) -> None:
    """Train a feature extractor on drawn phantoms or on public images, for `site evaluate --extractor`.

    Prints its hash. Only numbers under one hash can be compared: one party makes the file and hands it round. No
    hospital's patient is read.
    """
    if size not in SIZES:
        hint = f"one of {', '.join(map(str, SIZES))}"
        raise RunError("RUN_USAGE", f"no study has images of {size} pixels", "--size", hint=hint)
    if modality and data is None:
        raise RunError("RUN_USAGE", "phantoms are of one modality", "--modality", hint="give --data, or leave it out")
    output.refuse_existing(out)
    found = _of_phantoms(size) if data is None else _of_public_images(data, size, modality)
    try:
        digest = found.save(out)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(out)) from None

    def human(console: Console) -> None:
        lines = [f"wrote {out}, SHA-256 of the weights {digest}", f"trained on {found.trained_on}"]
        lines.append(f"tells their classes apart with accuracy {found.accuracy:.3g}")
        console.print(escape("\n".join(lines)), soft_wrap=True)

    of = {"trained_on": found.trained_on, "accuracy": found.accuracy, "side": found.side}
    output.emit({"extractor": str(out), "sha256": digest, **of}, human)


def _of_phantoms(size: int) -> FeatureExtractor:
    from fedmedgan.simulations import quality

    return quality.extractor(size)


def _of_public_images(folder: Path, size: int, modality: list[str] | None) -> FeatureExtractor:
    """Classes are the labels of labels.csv, or the sub-folders; images without one are left out."""
    import numpy as np

    from fedmedgan.client.data.any_images import load_any
    from fedmedgan.client.data.patients import RADIOLOGY
    from fedmedgan.client.release.features import train_extractor

    found = load_any(folder, size, tuple(name.upper() for name in modality or RADIOLOGY))
    is_labelled_N = np.array([bool(label) for label in found.labels_N])
    if not is_labelled_N.any():
        raise DataError("DATA_LABEL", "no image of the folder has a label", "--data")
    _, class_N = np.unique(np.array(found.labels_N)[is_labelled_N], return_inverse=True)
    words = f"{len(class_N)} public images of the folder {folder.resolve().name[:100]}"
    return train_extractor(found.images_N1HW[is_labelled_N], class_N, trained_on=words)
