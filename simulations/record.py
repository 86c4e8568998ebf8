"""What a run folder says, read back: the one source of the report and of the progress display.

    study.json                       the study and its hash
    events.jsonl                     the coordinator's events
    hospitals/<site>/events.jsonl    a hospital's own events; they leave a hospital in a simulation only
    hospitals/<site>/samples/        the same latent points after each round, round-0000.png before training
    hospitals/<site>/real.png        some of the hospital's own images; in a simulation only
    hospitals/<site>/dicom/          there only if the hospital's images are phantoms
    hospitals/<site>/classes.json    images and patients by class; of phantoms and of shares of a pooled set only
    partition.json                   there only if a pooled set was split among the hospitals
    arms.json, arms/<name>.png       the comparison arms, once they have run; scores by what the recipe is for
    INSECURE-SEED                    there only if the noise was seeded

An unfinished run is read as far as it got: missing files and rounds, or a half-written last line.
Anything that is there must have exactly the agreed form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from fedmedgan.shared.errors import FedMedGanError, RunError
from fedmedgan.shared.study import Study, from_dict
from fedmedgan.simulations.events import (
    COORDINATOR,
    HOSPITAL,
    STRICT,
    CoordinatorEvent,
    Count,
    DataLoaded,
    Digest,
    Encrypted,
    HospitalEvent,
    NodeRefused,
    RoundAggregated,
    RoundApplied,
    RoundOpened,
    RunClosed,
    RunOpened,
    Seconds,
    SiteMissing,
    Trained,
    Trouble,
    UpdateAccepted,
    Updated,
)

E = TypeVar("E")
Share = Annotated[float, Field(ge=0, le=1)]


# ---- the comparison arms


@checked_dataclass(frozen=True, config=STRICT)
class Score:
    mean: float
    std: Annotated[float, Field(ge=0)]


@checked_dataclass(frozen=True, config=STRICT)
class Utility:
    """Train on synthetic, test on real: of a classifier that learned from generated images alone."""

    accuracy: Score
    auc: Score
    chance: Annotated[float, Field(ge=0, le=1)] | None = None
    """Accuracy of always answering the commonest class."""
    tested_on: Count | None = None
    """Number of real images."""


@checked_dataclass(frozen=True, config=STRICT)
class Similarity:
    """Image to image: how near outputs come to their targets, and the inputs as they are. Means over test images."""

    psnr: float
    """Peak signal-to-noise ratio, dB."""
    ssim: float
    """Structural similarity."""
    mae: Annotated[float, Field(ge=0)]
    """Mean absolute error, as a part of the range of values."""
    psnr_input: float
    ssim_input: float
    mae_input: Annotated[float, Field(ge=0)]
    dice: Share | None = None
    """Dice and IoU of what is brighter than the middle, where the targets are masks."""
    iou: Share | None = None
    dice_input: Share | None = None
    iou_input: Share | None = None
    tested_on: Count | None = None
    """Number of real images."""


@checked_dataclass(frozen=True, config=STRICT)
class Measured:
    """One measure of `fedmedgan.client.release.evaluate`."""

    name: str
    privacy: Literal["free", "public"]
    values: dict[str, float]
    settings: dict[str, float | str]
    """Numbers of images, the extractor's hash: what makes numbers comparable."""


@checked_dataclass(frozen=True, config=STRICT)
class NotMeasured:
    name: str
    privacy: Literal["free", "public"]
    reason: str


@checked_dataclass(frozen=True, config=STRICT)
class Quality:
    """An `Evaluation` of `fedmedgan.client.release`, as JSON; under the public rule, so nothing of it must stay."""

    rule: Literal["public"]
    must_stay: Literal[False]
    statement: str
    measurements: tuple[Measured, ...]
    not_measured: tuple[NotMeasured, ...]

    @property
    def numbers(self) -> dict[str, float]:
        return {name: value for m in self.measurements for name, value in m.values.items()}


@checked_dataclass(frozen=True, config=STRICT)
class Translation:
    """Held-out images of one domain beside those of the other, as they are and after the generator."""

    source: str
    target: str
    before: Quality
    after: Quality


@checked_dataclass(frozen=True, config=STRICT)
class Arm:
    name: Annotated[str, Field(pattern=r"^(federated|fedavg|no-privacy|alone-[a-z0-9][a-z0-9-]{0,30})$")]
    label: str
    private: bool
    epsilon: Annotated[float, Field(ge=0)] | None
    """None without privacy."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None
    picture: Annotated[str, Field(pattern=r"^arms/[a-z0-9-]+\.png$")]
    seconds: Seconds
    tstr: Utility | None = None
    similarity: Similarity | None = None
    quality: Quality | None = None
    """Of images made from noise, as sets."""
    translation: tuple[Translation, ...] | None = None
    images: Annotated[str, Field(pattern=r"^arms/[a-z0-9-]+\.npz$")] | None = None
    images_kept: Count | None = None
    """In that file, after near-duplicates were dropped; scores are of all images."""
    images_dropped: Count | None = None


@checked_dataclass(frozen=True, config=STRICT)
class RealBaseline:
    """The same of the hospitals' own images: what no synthetic image can be expected to beat."""

    label: str
    tstr: Utility | None = None
    """Of a classifier that learned from them."""
    quality: Quality | None = None


@checked_dataclass(frozen=True, config=STRICT)
class _Arms:
    arms: tuple[Arm, ...]
    real: RealBaseline | None = None


@checked_dataclass(frozen=True, config=STRICT)
class ClassCounts:
    """Of one hospital, in the order of the study's classes."""

    images: tuple[Count, ...]
    patients: tuple[Count, ...]
    """Each patient counts once, as the class that most of the patient's images have."""


@checked_dataclass(frozen=True, config=STRICT)
class Split:
    """How a pooled set was split."""

    partition: Annotated[str, Field(pattern=r"^(iid|(dirichlet|quantity):[0-9.e+-]{1,20})$")]
    seed: Count


@checked_dataclass(frozen=True, config=STRICT)
class _StudyFile:
    hash: Digest
    study: dict[str, Any]
    signatures: dict[str, str] = dataclasses.field(default_factory=dict)


# ---- the record


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One try to get a sum of one cohort."""

    number: int
    opened: float
    cohort: tuple[str, ...]
    accepted: dict[str, UpdateAccepted]
    missing: tuple[SiteMissing, ...]


@dataclasses.dataclass(frozen=True)
class Round:
    """One turn of the cycle; what has not happened yet is None."""

    number: int
    attempts: tuple[Attempt, ...]
    aggregated: RoundAggregated | None
    applied: RoundApplied | None

    @property
    def bytes_up(self) -> dict[str, int]:
        """site -> bytes of the update that is in the sum; empty before the sum is complete."""
        if self.aggregated is None:
            return {}
        number = self.aggregated.attempt
        attempt = next(a for a in self.attempts if a.number == number)
        return {site: update.bytes_up for site, update in attempt.accepted.items()}


@dataclasses.dataclass(frozen=True)
class Hospital:
    """One hospital's own view."""

    name: str
    loaded: DataLoaded | None
    trained: dict[int, Trained]
    """round -> event, in the order of the rounds; so are the two below"""
    encrypted: dict[int, Encrypted]
    """The last attempt of each round."""
    updated: dict[int, Updated]
    troubles: int
    samples: dict[int, Path]
    real: Path | None
    drawn: bool
    """Its images are phantoms that the simulation drew into the hospital's own folder, so nobody's."""
    classes: ClassCounts | None = None

    @property
    def last(self) -> Trained | None:
        """The latest round that this hospital trained."""
        return self.trained[max(self.trained)] if self.trained else None


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything that a run folder says. Hospitals are in the order of the study's roster."""

    folder: Path
    study: Study
    opened: RunOpened | None
    rounds: tuple[Round, ...]
    closed: RunClosed | None
    nodes_refused: int
    hospitals: tuple[Hospital, ...]
    arms: tuple[Arm, ...]
    real: RealBaseline | None
    insecure_seed: str | None
    """What the file INSECURE-SEED holds; None where there is no such file."""
    split: Split | None = None

    @property
    def finished_rounds(self) -> tuple[Round, ...]:
        """Rounds whose sum was applied."""
        return tuple(r for r in self.rounds if r.applied is not None)

    @property
    def rounds_done(self) -> int:
        return len(self.finished_rounds)

    @property
    def final_epsilon(self) -> dict[str, float] | None:
        """site -> epsilon spent so far, 0 for a hospital that has not trained; None in a study without privacy."""
        if not self.study.is_private:
            return None
        return {h.name: (h.last.epsilon if h.last else None) or 0.0 for h in self.hospitals}


def load(run_folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        RunError: RUN_RECORD, something that is there does not have the agreed form.
    """
    study = _read_study(run_folder / "study.json")
    events = EventFile.of_coordinator(run_folder).new()
    names = {site.name for site in study.sites}
    for event in events:
        _check_sites(event, names)
    opened = [e for e in events if isinstance(e, RunOpened)]
    closed = [e for e in events if isinstance(e, RunClosed)]
    if any(e.study_hash != study.hash for e in opened):
        raise RunError("RUN_RECORD", "the events belong to another study", "events.jsonl")
    arms = _read_json(run_folder / "arms.json", TypeAdapter(_Arms)) or _Arms(())
    seed = run_folder / "INSECURE-SEED"
    return RunRecord(
        folder=run_folder,
        study=study,
        opened=opened[0] if opened else None,
        rounds=_rounds(events),
        closed=closed[-1] if closed else None,
        nodes_refused=sum(isinstance(e, NodeRefused) for e in events),
        hospitals=tuple(_hospital(run_folder, site.name, study) for site in study.sites),
        arms=arms.arms,
        real=arms.real,
        insecure_seed=seed.read_text(encoding="utf-8", errors="replace").strip() if seed.exists() else None,
        split=_read_json(run_folder / "partition.json", TypeAdapter(Split)),
    )


class EventFile(Generic[E]):
    """An events.jsonl that may still be growing. A line is given out once, and only when it is complete."""

    def __init__(self, path: Path, events: TypeAdapter[E], where: str) -> None:
        self._path, self._events, self._where = path, events, where
        self._offset = self._line = 0

    @staticmethod
    def of_coordinator(run_folder: Path) -> EventFile[CoordinatorEvent]:
        return EventFile(run_folder / "events.jsonl", COORDINATOR, "events.jsonl")

    @staticmethod
    def of_hospital(run_folder: Path, site: str) -> EventFile[HospitalEvent]:
        where = f"hospitals/{site}/events.jsonl"
        return EventFile(run_folder / where, HOSPITAL, where)

    def new(self) -> list[E]:
        """The events since the last call; none while there is no file.

        Raises:
            RunError: RUN_RECORD.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        found = []
        for line in complete.splitlines():
            self._line += 1
            found.append(_validate(line, self._events, f"{self._where}:{self._line}"))
        return found


def _validate(data: bytes, kind: TypeAdapter[E], where: str) -> E:
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        # The message of pydantic would repeat the value; a hospital's own log is nobody else's.
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise RunError("RUN_RECORD", f"{problem['type']} at {place or 'the start'}", where) from None


def _read_json(path: Path, kind: TypeAdapter[E]) -> E | None:
    try:
        return _validate(path.read_bytes(), kind, path.name)
    except FileNotFoundError:
        return None


def _read_study(path: Path) -> Study:
    found = _read_json(path, TypeAdapter(_StudyFile))
    if found is None:
        hint = "give the folder of a run"
        raise RunError("RUN_RECORD", "there is no study.json", str(path.parent), hint)
    try:
        study = from_dict(found.study, where=path.name)
    except FedMedGanError as error:
        raise RunError("RUN_RECORD", f"not a valid study ({error.code})", path.name) from None
    if study.hash != found.hash:
        raise RunError("RUN_RECORD", "the study does not have the hash that is written beside it", path.name)
    return study


def _check_sites(event: CoordinatorEvent, known: set[str]) -> None:
    named = [*getattr(event, "sites", ()), *getattr(event, "cohort", ())]
    if isinstance(event, UpdateAccepted | SiteMissing):
        named.append(event.site)
    if not known.issuperset(named):
        raise RunError("RUN_RECORD", f"{event.event} names a site that is not in the study", "events.jsonl")


def _check_privacy(event: HospitalEvent, study: Study, where: str) -> None:
    """What was spent is told where the study promises privacy, and nowhere else: no epsilon is no epsilon of 0."""
    if isinstance(event, Trained):
        told = {value is not None for value in (event.epsilon, event.ceiling, event.noise_multiplier)}
        if told != {study.is_private}:
            raise RunError("RUN_RECORD", "a round's epsilon does not fit what the study promises", where)


def _rounds(events: Iterable[CoordinatorEvent]) -> tuple[Round, ...]:
    """Put the coordinator's events into rounds and attempts."""
    opened: dict[int, dict[int, RoundOpened]] = {}
    accepted: dict[tuple[int, int], dict[str, UpdateAccepted]] = {}
    missing: dict[tuple[int, int], list[SiteMissing]] = {}
    aggregated: dict[int, RoundAggregated] = {}
    applied: dict[int, RoundApplied] = {}
    for event in events:
        if isinstance(event, RoundOpened):
            opened.setdefault(event.round, {})[event.attempt] = event
        elif isinstance(event, UpdateAccepted | SiteMissing | RoundAggregated):
            if event.attempt not in opened.get(event.round, {}):
                what = f"{event.event} of an attempt that was never opened"
                raise RunError("RUN_RECORD", what, "events.jsonl")
            if isinstance(event, UpdateAccepted):
                accepted.setdefault((event.round, event.attempt), {})[event.site] = event
            elif isinstance(event, SiteMissing):
                missing.setdefault((event.round, event.attempt), []).append(event)
            else:
                aggregated[event.round] = event
        elif isinstance(event, RoundApplied):
            if event.round not in aggregated:
                raise RunError("RUN_RECORD", "a round was applied without a sum", "events.jsonl")
            applied[event.round] = event
    return tuple(
        Round(
            number=number,
            attempts=tuple(
                Attempt(
                    number=attempt,
                    opened=event.time,
                    cohort=event.cohort,
                    accepted=accepted.get((number, attempt), {}),
                    missing=tuple(missing.get((number, attempt), ())),
                )
                for attempt, event in sorted(opened[number].items())
            ),
            aggregated=aggregated.get(number),
            applied=applied.get(number),
        )
        for number in sorted(opened)
    )


def _hospital(run_folder: Path, name: str, study: Study) -> Hospital:
    events = EventFile.of_hospital(run_folder, name).new()
    home, n_classes = run_folder / "hospitals" / name, len(study.images.classes)
    for event in events:
        _check_privacy(event, study, f"hospitals/{name}/events.jsonl")
    samples = {}
    for path in sorted(home.glob("samples/round-*.png")):
        digits = path.stem.removeprefix("round-")
        if not (digits.isascii() and digits.isdigit()):
            where = f"hospitals/{name}/samples"
            raise RunError("RUN_RECORD", "a picture is not called round-NNNN.png", where)
        samples[int(digits)] = path
    classes = _read_json(home / "classes.json", TypeAdapter(ClassCounts))
    if classes and {len(classes.images), len(classes.patients)} != {n_classes}:
        raise RunError("RUN_RECORD", "not as many classes as the study has", f"hospitals/{name}/classes.json")
    return Hospital(
        name=name,
        loaded=next((e for e in events if isinstance(e, DataLoaded)), None),
        trained={e.round: e for e in events if isinstance(e, Trained)},
        encrypted={e.round: e for e in events if isinstance(e, Encrypted)},
        updated={e.round: e for e in events if isinstance(e, Updated)},
        troubles=sum(isinstance(e, Trouble) for e in events),
        samples=samples,
        real=home / "real.png" if (home / "real.png").is_file() else None,
        drawn=(home / "dicom").is_dir(),
        classes=classes,
    )


# ---- figures in words, the same on the terminal and in the report


def seconds_text(seconds: float) -> str:
    """``0.02 s``, ``4.1 s``, ``75 s``, ``12 min 5 s``: two digits are enough to compare by."""
    if seconds >= 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 0.001:
        return f"{float(f'{seconds:.2g}'):g} s"
    return "under 0.001 s" if seconds > 0 else "0 s"


def bytes_text(count: float) -> str:
    """``850 B``, ``412 kB``, ``1.24 MB``; 1 kB is 1000 bytes."""
    if count < 999.5:
        return f"{count:.0f} B"
    if count < 999_500:
        return f"{count / 1e3:.3g} kB"
    return f"{count / 1e6:.3g} MB" if count < 999_500_000 else f"{count / 1e9:.3g} GB"
