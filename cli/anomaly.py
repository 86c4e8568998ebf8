"""``fedmedgan site anomaly``: how unlike normal images each image of a folder is, to a trained model."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedmedgan.cli import output
from fedmedgan.cli.evaluate import trained_hospital
from fedmedgan.cli.site import Home, Passphrase, use_passphrase
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import Study

if TYPE_CHECKING:
    import numpy as np

    from fedmedgan.client.data.any_images import AnyImages
    from fedmedgan.client.release.rule import Evaluation, NotMeasured, Value

COLUMNS = ("image", "path", "label", "score")


def anomaly(
    home: Home,
    images: Annotated[Path, typer.Option(help="Folder with the DICOM to score; labels are not needed.")],
    normal: Annotated[
        str | None, typer.Option(help="Class of the study that counts as normal; the first one if not given.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="CSV to write, mode 0600, one line an image: path, label, score. Must not exist."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps of the encoder, on generated images.")] = 1500,
    passphrase_file: Passphrase = None,
) -> None:
    """Score images against what the model takes for normal: the higher, the less like it.

    Nothing is charged: the encoder learns from generated images alone. Scores are of patients, so they must stay here.
    Where the folder's labels name normal images and others, the area under the ROC curve says how well they are told
    apart.
    """
    import numpy as np

    from fedmedgan.client.data.any_images import load_any
    from fedmedgan.client.release.anomaly import AnomalyScorer

    use_passphrase(passphrase_file)
    hospital = trained_hospital(home)
    study = hospital.study
    held_against = study.images.classes[0] if normal is None else normal
    place = _place(study, held_against)
    if out is not None:
        output.refuse_existing(out)
    given = load_any(images, study.images.size, study.images.modalities)
    discriminator = None if study.gan.minibatch_stddev else hospital.own_discriminator()
    log = Console(stderr=True, highlight=False)
    log.print(f"the encoder learns from generated images, {steps} steps: a minute or so at 28 pixels", soft_wrap=True)
    scorer = AnomalyScorer(hospital.released_generator(), discriminator, study, steps=steps)
    score_N = scorer.scores(given.images_N1HW, np.full(len(given.labels_N), place))
    settings: dict[str, Value] = {"normal": held_against, "looks_at": scorer.looks_at, "encoder_steps": steps}
    found = _evaluation(score_N, given.labels_N, held_against, settings)
    if out is not None:
        _write(out, given, score_N)
    left_out = given.report.left_out

    def human(console: Console) -> None:
        lines = [f"{len(score_N)} images held against {held_against}, by {scorer.looks_at}", found.text()]
        lines += [f"not scored: {count} files, {code}" for code, count in left_out.items()]
        lines.append(f"scores are in {out}, for this hospital alone" if out else "each score goes into --out FILE")
        console.print(escape("\n".join(lines)), soft_wrap=True)

    output.emit({**found.record(), "scores": str(out) if out else None, "left_out": left_out}, human)


def _place(study: Study, name: str) -> int:
    classes = study.images.classes
    if name not in classes:
        hint = f"one of {', '.join(classes)}"
        raise RunError("RUN_USAGE", "the study has no such class", "--normal", hint=hint)
    return classes.index(name)


def _evaluation(score_N: np.ndarray, labels: Sequence[str], normal: str, settings: dict[str, Value]) -> Evaluation:
    """Under the local rule, whose numbers stay: how scores lie and, where labels say what is normal, the AUC."""
    import numpy as np

    from fedmedgan.client.release.anomaly import normal_against_rest
    from fedmedgan.client.release.images import NotMeasurable
    from fedmedgan.client.release.rule import Evaluation, Measurement, NotMeasured, Rule

    is_known_N = np.array([bool(label) for label in labels])
    is_normal_N = np.array([label == normal for label in labels])
    spread = {"score_median": float(np.median(score_N)), "score_highest": float(score_N.max())}
    found = [Measurement("anomaly_scores", "sensitive", spread, {**settings, "real_images": len(score_N)})]
    missed: list[NotMeasured] = []
    counts = {"normal_images": int(is_normal_N.sum()), "other_images": int((is_known_N & ~is_normal_N).sum())}
    try:
        auc = normal_against_rest(score_N[is_known_N], is_normal_N[is_known_N])
        found.append(Measurement("anomaly_auc", "sensitive", {"anomaly_auc": auc, **counts}, settings))
    except NotMeasurable as error:
        missed.append(NotMeasured("anomaly_auc", "sensitive", f"{error.what}; {error.where}"))
    return Evaluation(Rule.LOCAL, tuple(found), tuple(missed))


def _write(out: Path, given: AnyImages, score_N: np.ndarray) -> None:
    """Readable by the hospital's user alone: paths and labels are the hospital's own, scores are of its patients."""
    from fedmedgan.client import checkpoint

    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    rows = zip(given.paths_N, given.labels_N, score_N, strict=True)
    writer.writerows((number, path, label, f"{score:.6g}") for number, (path, label, score) in enumerate(rows, 1))
    try:
        checkpoint.write_bytes(out, table.getvalue().encode())
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(out)) from None
