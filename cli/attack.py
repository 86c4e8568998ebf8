"""``fedmedgan audit attack``: try to break the promise, and say how much such a try can show."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from fedmedgan.cli import output
from fedmedgan.cli.site import Home, Passphrase, use_passphrase
from fedmedgan.shared.agreement import Agreement
from fedmedgan.shared.errors import ModelError, PrivacyError, StudyError
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.study import Site, Study, load

if TYPE_CHECKING:
    from fedmedgan.audit.bounds import Finding

app = typer.Typer(help="Try to break the promise. Each prints its confidence and its ceiling.", no_args_is_help=True)

Keep = Annotated[
    Path | None, typer.Option("--home", help="The hospital's own folder; the result is kept there for its report.")
]


@app.command("one-run")
def one_run(
    study_file: Annotated[
        Path | None, typer.Argument(metavar="[STUDY]", help="Study file, TOML or study.json; or give --home.")
    ] = None,
    home: Keep = None,
    site: Annotated[str | None, typer.Option(help="Whose rate and noise; the first of the study.")] = None,
    canaries: Annotated[int, typer.Option(min=10, max=100_000, help="Planted images; more can show more.")] = 1000,
) -> None:
    """Plant made-up images in a mirror of the study's training, and guess which were in.

    No patient's image is used. The study's own code, noise and sampling run on made-up patients for some steps.
    """
    from fedmedgan.audit.one_run import one_run_audit

    study, own, sigma = _settings(study_file, home, site)
    finding = one_run_audit(study, own, noise_multiplier=sigma, canaries=canaries)
    _tell("one-run", study.hash, [finding], home)


@app.command("many-run")
def many_run(
    runs: Annotated[int, typer.Option(min=20, max=100_000, help="Small trainings, half with the target.")] = 200,
    epsilon: Annotated[float, typer.Option(min=0.1, max=10, help="What they promise; smaller is sharper.")] = 1.0,
    home: Keep = None,
) -> None:
    """Train a toy network many times, with and without one image, where theory knows exactly what noise allows.

    It tests the code of this installation, not one study.
    """
    from fedmedgan.audit.many_run import many_run_audit

    _tell("many-run", "", many_run_audit(runs=runs, epsilon=epsilon), home)


@app.command()
def generator(
    home: Home,
    holdout: Annotated[
        Path, typer.Option(help="Folder with DICOM of OTHER patients of the same source, as many as were trained on.")
    ],
    images: Annotated[int, typer.Option(min=100, max=100_000, help="Images that the generator makes.")] = 4000,
    passphrase_file: Passphrase = None,
) -> None:
    """Does the generator make images that lie nearer to patients whom it was trained on than to others?

    Runs on patients' images and stays here: no epsilon covers what it finds. Do not publish it.
    """
    from fedmedgan.audit.generator_attacks import generator_attacks
    from fedmedgan.client.data.patients import PatientImages, load_patients
    from fedmedgan.client.home import Home as Hospital
    from fedmedgan.client.release.generate import generate

    use_passphrase(passphrase_file)
    hospital = Hospital(home)
    study = hospital.study
    if hospital.applied_round == 0:
        raise ModelError("MODEL_MISMATCH", "no round was applied yet: there is no generator to attack", str(home))
    trained = hospital.load_patients()
    others = load_patients(holdout, study.images, pseudonym_key=hospital.book.pseudonym_key)
    made, _ = generate(hospital.released_generator(), study, images, seed=secrets.randbits(31))

    def names(of: PatientImages) -> list[str]:
        return [of.pseudonyms[number] for number in of.patient_N]

    findings = generator_attacks(made, trained.images_N1HW, names(trained), others.images_N1HW, names(others))
    _tell("generator", study.hash, findings, home)


def _settings(study_file: Path | None, home: Path | None, name: str | None) -> tuple[Study, Site, float]:
    """Study, site and noise: those of the home's ledger, or what the study would be given."""
    if (study_file is None) == (home is None):
        raise StudyError("CONFIG_NOT_FOUND", "give a study or a home, one of the two", "STUDY or --home")
    if home is not None:
        study, history = Agreement.load(home / "study.json").study, read_ledger(home / "ledger.jsonl")
        terms = history.terms(study.hash)
        if terms is None:
            hint = "sign the study first, `fedmedgan study sign`"
            raise StudyError("STUDY_SIGNATURE", "the study was never opened in this ledger", "ledger.jsonl", hint=hint)
        return study, study.site(history.hospital), terms.noise_multiplier
    assert study_file is not None
    study = Agreement.load(study_file).study if study_file.suffix == ".json" else load(study_file)
    own = study.site(name) if name else study.sites[0]
    p, rate = study.privacy, study.sampling_rate(own)
    sigma = calibrate_noise(epsilon=p.epsilon, delta=p.delta, sampling_rate=rate, steps=study.total_steps)
    return study, own, sigma


def _tell(
    attack: Literal["one-run", "many-run", "generator"], study: str, findings: Sequence[Finding], home: Path | None
) -> None:
    """Print what an attack found, keep it, and end with AUDIT_FAILED if it broke the promise."""
    from fedmedgan.audit import results, words

    shown = [asdict(finding) for finding in findings]
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result = results.Result.model_validate({"attack": attack, "study": study, "time": time, "findings": tuple(shown)})
    kept = results.keep(home, result) if home is not None else None

    def human(console: Console) -> None:
        for finding in shown:
            console.print(f"[bold]{finding['name']}: {words.VERDICTS[finding['verdict']]}[/bold]")
            console.print(finding["explanation"], soft_wrap=True, markup=False)
            for line in words.meaning(finding):
                console.print(f"  {line}", soft_wrap=True, markup=False)
            console.print(f"  took      {finding['seconds']:.0f} s")
        if kept:
            console.print(f"kept in {kept}: it will be in the next report", soft_wrap=True, markup=False)

    error = None
    if result.verdict == "failed":
        broken = ", ".join(finding["name"] for finding in shown if finding["verdict"] == "failed")
        hint = "do not release what this code trained; repeat it, then report it as a bug"
        error = PrivacyError("AUDIT_FAILED", f"an attack broke the promise: {broken}", attack, hint=hint)
    output.emit(result.as_dict() | {"kept": str(kept) if kept else None}, human, error)
