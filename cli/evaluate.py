"""``fedmedgan site evaluate``: how good the model is, compared with patients; so most of it must stay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fedmedgan.cli import output
from fedmedgan.cli.site import Home, Passphrase, use_passphrase
from fedmedgan.shared.errors import ModelError, RunError, StudyError

if TYPE_CHECKING:
    from fedmedgan.client.data.patients import PatientImages
    from fedmedgan.client.home import Home as Hospital
    from fedmedgan.client.release.features import FeatureExtractor
    from fedmedgan.client.release.rule import Evaluation

    Evaluations = dict[str, Evaluation]
    """By what each is of, in words."""


def evaluate(
    home: Home,
    holdout: Annotated[
        Path | None,
        typer.Option(help="Folder with labelled DICOM of OTHER patients, to test on. Image-to-image recipes need it."),
    ] = None,
    extractor: Annotated[
        Path | None,
        typer.Option(
            help="Declared feature extractor, for FID, KID and coverage: `fedmedgan site extractor` makes one."
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=100, max=100_000, help="Images that the generator makes, where it makes them of noise.")
    ] = 2000,
    passphrase_file: Passphrase = None,
) -> None:
    """How good is the model? Compared with this hospital's patients, so most numbers must stay here.

    Nothing is charged, because nothing may leave. What was computed from synthetic images alone is marked "free".
    """
    from fedmedgan.client.data.patients import load_patients
    from fedmedgan.client.release.features import load_extractor
    from fedmedgan.client.release.holdout import refuse_same_patients

    use_passphrase(passphrase_file)
    hospital = trained_hospital(home)
    _refuse_unknown(hospital, holdout)
    features = load_extractor(extractor) if extractor else None
    real, others = hospital.load_patients(), None
    if holdout is not None:
        others = load_patients(holdout, hospital.study.images, pseudonym_key=hospital.book.pseudonym_key)
        refuse_same_patients(real.pseudonyms, others.pseudonyms)
    if others is None or hospital.recipe.judged == "images":
        found = _of_noise(hospital, real, others, features, images)
    elif hospital.recipe.judged == "pairs":
        found = _of_pairs(hospital, others)
    else:
        found = _of_domains(hospital, others, features)
    output.emit(_record(found), lambda console: _draw(found, console))


def trained_hospital(home: Path) -> Hospital:
    """The hospital of a home that has a model.

    Raises:
        ModelError: MODEL_MISMATCH, no round was applied yet. What opening a home raises.
    """
    from fedmedgan.client.home import Home as Hospital

    hospital = Hospital(home)
    if hospital.applied_round == 0:
        raise ModelError("MODEL_MISMATCH", "no round was applied yet: there is no generator to evaluate", str(home))
    return hospital


def _refuse_unknown(hospital: Hospital, holdout: Path | None) -> None:
    judged, where = hospital.recipe.judged, f"gan.recipe: {hospital.study.gan.recipe}"
    if not judged:
        what, hint = "the recipe does not say what its images are to be compared with", "see docs/write-a-recipe.md"
        raise StudyError("CONFIG_RANGE", what, where, hint=hint)
    if judged != "images" and holdout is None:
        what = "this recipe makes images of images, so it is judged on those of other patients"
        raise RunError("RUN_USAGE", what, where, hint="give a folder of them: --holdout FOLDER")


def _of_noise(
    hospital: Hospital,
    real: PatientImages,
    others: PatientImages | None,
    features: FeatureExtractor | None,
    images: int,
) -> Evaluations:
    from fedmedgan.client.release.evaluate import Rule
    from fedmedgan.client.release.evaluate import evaluate as measure
    from fedmedgan.client.release.generate import generate

    study = hospital.study
    made, labels = generate(hospital.released_generator(), study, images, seed=study.gan.init_seed)
    found = measure(
        made,
        labels,
        rule=Rule.LOCAL,
        real=real.images_N1HW,
        real_labels=real.labels_N,
        holdout=others.images_N1HW if others else None,
        holdout_labels=others.labels_N if others else None,
        extractor=features,
    )
    return {f"{images} images made of noise": found}


def _of_pairs(hospital: Hospital, others: PatientImages) -> Evaluations:
    from fedmedgan.client.release import translations
    from fedmedgan.client.release.rule import Rule

    found = translations.of_pairs(
        hospital.recipe,
        hospital.released_generator(),
        others.images_N1HW,
        others.labels_N,
        others.images_N1HW if others.targets_N1HW is None else others.targets_N1HW,
        rule=Rule.LOCAL,
    )
    return {"what the model makes, beside the targets": found.made, "its inputs as they are": found.given}


def _of_domains(hospital: Hospital, others: PatientImages, features: FeatureExtractor | None) -> Evaluations:
    from fedmedgan.client.release import translations
    from fedmedgan.client.release.rule import Rule

    ways = translations.of_translation(
        features,
        hospital.released_generator(),
        others.images_N1HW,
        others.labels_N,
        rule=Rule.LOCAL,
    )
    names, found = hospital.study.images.classes, {}
    for way in ways:
        source, target = names[way.source], names[way.target]
        found[f"{source} as it is, beside {target}"] = way.before
        found[f"{source} brought to {target}, beside {target}"] = way.after
    return found


def _record(found: Evaluations) -> dict[str, Any]:
    """One evaluation as it is; several under the rule and the statement that all of them have."""
    records = [{"of": of, **evaluation.record()} for of, evaluation in found.items()]
    if len(records) == 1:
        return records[0]
    shared = ("rule", "must_stay", "statement")
    return {**{key: records[0][key] for key in shared}, "evaluations": records}


def _draw(found: Evaluations, console: Console) -> None:
    first = next(iter(found.values()))
    lines = [f"rule: {first.rule.value}", first.statement]
    for of, evaluation in found.items():
        lines += ["", f"{of}:", *evaluation.lines()]
    console.print(escape("\n".join(lines)), soft_wrap=True)
