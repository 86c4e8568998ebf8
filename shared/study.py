"""The Study: the one agreement that every party holds, byte for byte.

A study is written in TOML, validated into frozen models, and named by the SHA-256 of its canonical JSON (RFC 8785).
That hash is bound into every message, ciphertext and ledger record: change one digit and it is another study.

Everything in here is public among the parties. Nothing in here is computed from patients: the sampling rate and
the number that gradients are divided by come from the DECLARED number of patients, never from the folder.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedmedgan.shared.errors import StudyError

MIN_SITES = 3
"""With two sites each could subtract its own update from the sum and read the other's."""
MAX_SITES = 100
"""Bound of the exactness argument for sums of seeded ciphertexts (docs/decisions/0002)."""
MAX_FILE_BYTES = 1 << 20

SiteName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,30}$")]
HexKey = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
WrappingKey = Annotated[str, Field(pattern=r"^([0-9a-f]{2432})?$")]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Site(_Part):
    """One hospital of the roster."""

    name: SiteName
    patients: Annotated[int, Field(ge=10, le=10_000_000)]
    """Number of patients that the hospital declares, rounded down; public. Its folder must hold at least as many."""
    weight: Annotated[int, Field(ge=1, le=1000)] = 1
    """Integer weight of this site's update in the mean."""
    signing_key: HexKey = ""
    """Ed25519 public key, 64 hex digits."""
    exchange_key: HexKey = ""
    """X25519 public key, 64 hex digits: pairwise masks."""
    wrapping_key: WrappingKey = ""
    """HPKE public key of ML-KEM-768 + X25519, 2432 hex digits: the key epoch is sent to this hospital under it."""


class Images(_Part):
    """What an image is, and which files of a folder are taken."""

    size: Literal[28, 32, 64, 128, 256] = 64
    """Side in pixels; images are square, one channel."""
    dimensions: int = 2
    """Images are slices or projections. Volumes (3) are not supported."""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=20)] = ("clear", "opacity")
    modalities: Annotated[tuple[str, ...], Field(min_length=1)] = ("CR", "DX")
    """DICOM Modality (0008,0060) values that are taken."""
    paired: bool = False
    """Whether each image has a target image: column `target` of labels.csv. For segmentation and paired translation."""


class Gan(_Part):
    """The networks."""

    recipe: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,30}$")] = "cdcgan"
    """A file of the hospitals' installed package: docs/recipes.md."""
    private: Literal["discriminator", "both"] = "discriminator"
    """Networks whose training reads patients, as the recipe declares them. Steps of each are charged."""
    task: Annotated[str, Field(pattern=r"^([a-z][a-z0-9-]{0,30})?$")] = ""
    """What an image-to-image recipe learns, one of those that it knows; empty for all others."""
    latent: Annotated[int, Field(ge=2, le=1024)] = 64
    """Length of the latent vector."""
    generator_width: Annotated[int, Field(ge=4, le=256)] = 16
    """Channels of the generator's finest layer; doubled by each coarser one."""
    discriminator_width: Annotated[int, Field(ge=4, le=256)] = 8
    """Channels of the discriminator's first layer; doubled by each further one. Noise grows with its weights."""
    norm: Literal["group", "instance", "none", "batch"] = "group"
    """Normalisation of the discriminator. "batch" mixes patients: without privacy only."""
    generator_norm: Literal["group", "instance", "none", "batch"] = "group"
    """Normalisation of the generator. "batch" is safe where the generator sees no patient."""
    attention: bool = False
    """Self-attention at the 8 x 8 grid, 7 x 7 at 28 pixels (SAGAN, Zhang et al. 2019)."""
    weight_norm: bool = False
    """Weight normalisation of the convolutions of the discriminator's trunk (Salimans and Kingma 2016)."""
    minibatch_stddev: bool = False
    """Minibatch standard deviation (Karras et al. 2018): mixes patients, without privacy only."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay per round of the generator's moving average, which is what is released; 0: the last generator."""
    init_seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of the initial weights, which are public: every site starts from the same ones."""
    pretrained: HexKey = ""
    """SHA-256 of a file of initial weights that were trained on public images: `fedmedgan pretrain`."""
    pretrained_on: Annotated[str, Field(max_length=200)] = ""
    """Which public images, in words."""


class Training(_Part):
    """What one hospital does in one round."""

    rounds: Annotated[int, Field(ge=1, le=10_000)] = 10
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Private discriminator steps a round."""
    patients_per_step: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Expected patients in one Poisson batch; also the fixed number of fakes, and what sums are divided by."""
    discriminator_steps: Annotated[int, Field(ge=1, le=1000)] = 5
    """Discriminator steps for each generator step."""
    adaptive: bool = False
    """Raise `discriminator_steps` once the discriminator no longer tells fakes (Bie et al. 2023); reads fakes only."""
    discriminator_lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    generator_lr: Annotated[float, Field(gt=0, le=1)] = 5e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.5
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    real_label: Annotated[float, Field(ge=0.5, le=1)] = 1.0
    """One-sided label smoothing (Salimans et al. 2016): what the discriminator is to say of a real image."""
    views: Annotated[int, Field(ge=1, le=16)] = 1
    """Augmentation multiplicity (De et al. 2022): gradients of so many shifted copies are averaged, then clipped."""
    replay: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of a step's fakes that earlier generators of the round made. Never where fakes are made of patients."""
    fake_penalty: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight of the gradient penalty on generated images alone: no patient is in it, so it is not clipped."""
    spectral_projection: bool = False
    """After a step, divide each weight matrix of the discriminator by its largest singular value if that exceeds 1."""


class Aggregation(_Part):
    """What is shared, and what hospitals do with the mean of their updates, each by itself and all the same."""

    share: Literal["both", "generator"] = "both"
    """With "generator", each discriminator stays at its hospital, and its bytes too: `study check` says how many."""
    optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    """Outer optimiser: McMahan et al. 2017; Hsu et al. 2019; Reddi et al. 2021."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of fedavgm and fedadam."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of fedadam."""
    adaptivity: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Of fedadam: tau, added to the root of the second moment."""


class Privacy(_Part):
    """The promise to every patient of every site, over ALL rounds. In short, `privacy = "none"` for no promise."""

    unit: Literal["patient", "none"] = "patient"
    """Whom differential privacy protects. "none": nobody; for public images in simulations, no hospital grants it."""
    epsilon: Annotated[float, Field(ge=0.01, le=100)] = 8.0
    delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """C: L2 bound of one record's gradient."""


class SecureSum(_Part):
    """How an update becomes integers. Encryption itself has no settings: docs/decisions/0002."""

    bits: Annotated[int, Field(ge=4, le=16)] = 8
    """Bits of one quantised value."""
    update_range: Annotated[float, Field(gt=0, le=100)] = 0.05
    """Values of an update are limited to [-update_range, update_range]; how many were limited is counted and shown."""
    rotate_every: Annotated[int, Field(ge=0, le=10_000)] = 50
    """Rounds under one key epoch; 0: no rotation by schedule."""


class Convergence(_Part):
    """When to stop before the last round, judged on generated images only, so at no privacy cost."""

    patience: Annotated[int, Field(ge=0, le=1000)] = 0
    """Stop once the generator's loss has stayed within `tolerance` for this many rounds; 0 never stops early."""
    tolerance: Annotated[float, Field(ge=0, le=10)] = 0.01


class Study(_Part):
    """The whole agreement. `hash` names it."""

    name: SiteName
    version: Literal[1] = 1
    sites: Annotated[tuple[Site, ...], Field(min_length=1, max_length=MAX_SITES)]
    coordinator_key: HexKey = ""
    """Ed25519 public key of the coordinator, 64 hex digits: its instructions are signed with it."""
    round_timeout: Annotated[float, Field(ge=1, le=604_800)] = 3600.0
    """Seconds that the coordinator waits for each answer of a hospital."""
    images: Images = Images()
    gan: Gan = Gan()
    training: Training = Training()
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    secure_sum: SecureSum = SecureSum()
    convergence: Convergence = Convergence()

    @field_validator("privacy", mode="before")
    @classmethod
    def _in_short(cls, value: Any) -> Any:
        return {"unit": "none"} if value == "none" else value

    @model_validator(mode="after")
    def _recipe_is_private(self) -> Study:
        """What is known of a recipe without reading it; its own file is probed by whoever has it installed."""
        if self.images.dimensions != 2:
            what, hint = "3-D recipes are not there: images have two dimensions", "train on slices"
            raise StudyError("CONFIG_RANGE", what, "images.dimensions", hint=hint)
        gan, t = self.gan, self.training
        if bool(gan.pretrained) != bool(gan.pretrained_on.strip()):
            what = "initial weights are named together with the public images that they were trained on"
            raise StudyError("CONFIG_RANGE", what, "gan.pretrained_on", hint="set both, or neither")
        both = gan.private == "both"
        if self.is_private:
            mixing = {"gan.norm": gan.norm == "batch", "gan.minibatch_stddev": gan.minibatch_stddev}
            mixing["gan.generator_norm"] = both and gan.generator_norm == "batch"
            if where := [key for key, mixes in mixing.items() if mixes]:
                what = "the layer mixes the patients of a batch, so one patient's part cannot be bounded"
                raise StudyError("PRIVACY_MODEL", what, where[0], hint='choose another, or set privacy = "none"')
            if both and t.replay:
                what = "fakes are made of patients: replayed ones would use patients who were not sampled"
                raise StudyError("PRIVACY_MODEL", what, "training.replay", hint="set it to 0")
            if both and (t.adaptive or t.local_steps % t.discriminator_steps):
                what = "steps of the generator are charged, so their number in a round must be fixed"
                hint = "make local_steps a multiple of discriminator_steps, and adaptive false"
                raise StudyError("CONFIG_RANGE", what, "training.discriminator_steps", hint=hint)
        if both and (t.fake_penalty or t.adaptive or t.replay):
            raise StudyError("CONFIG_RANGE", "needs a generator that is not private", "gan.private")
        return self

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Study:
        names = [s.name for s in self.sites]
        if len(names) < MIN_SITES:
            raise StudyError("STUDY_ROSTER", f"{len(names)} sites, at least {MIN_SITES} are needed", "sites")
        if len(set(names)) != len(names):
            raise StudyError("STUDY_ROSTER", "two sites have the same name", "sites")
        if len(set(self.images.classes)) != len(self.images.classes):
            raise StudyError("CONFIG_RANGE", "two classes have the same name", "images.classes")
        keys = [k for s in self.sites for k in (s.signing_key, s.exchange_key, s.wrapping_key) if k]
        keys += [self.coordinator_key] if self.coordinator_key else []
        if len(set(keys)) != len(keys):
            raise StudyError("STUDY_ROSTER", "two parties have the same key", "sites")
        for site in self.sites:
            if self.training.patients_per_step > site.patients:
                raise StudyError(
                    "CONFIG_RANGE",
                    f"patients_per_step = {self.training.patients_per_step} is more than the"
                    f" {site.patients} patients of {site.name}",
                    "training.patients_per_step",
                )
            if self.privacy.delta * site.patients >= 1:
                raise StudyError(
                    "CONFIG_DELTA",
                    f"delta = {self.privacy.delta:g} is not below 1/{site.patients} ({site.name})",
                    "privacy.delta",
                )
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON (RFC 8785), 64 hex digits."""
        return hashlib.sha256(self.canonical()).hexdigest()

    def canonical(self) -> bytes:
        """The study as canonical JSON, UTF-8."""
        return rfc8785.dumps(self.model_dump(mode="json"))

    def site(self, name: str) -> Site:
        """The site of that name.

        Raises:
            StudyError: STUDY_ROSTER, no site has that name.
        """
        return self.sites[self.index(name)]

    def index(self, name: str) -> int:
        """Place of a site in the roster."""
        names = [s.name for s in self.sites]
        if name not in names:
            raise StudyError("STUDY_ROSTER", f"no site is called {name!r}", "sites")
        return names.index(name)

    def sampling_rate(self, site: Site) -> float:
        """q: chance of each patient to be in one step, from the DECLARED number of patients."""
        return self.training.patients_per_step / site.patients

    @property
    def is_private(self) -> bool:
        """Whether patients are promised anything."""
        return self.privacy.unit != "none"

    @property
    def steps_per_round(self) -> int:
        """Private steps of one site in one round, each with a Poisson batch of its own: what is charged."""
        t = self.training
        return t.local_steps + (t.local_steps // t.discriminator_steps if self.gan.private == "both" else 0)

    @property
    def total_steps(self) -> int:
        """Private steps of one site over all rounds."""
        return self.training.rounds * self.steps_per_round


def load(path: Path) -> Study:
    """Read and validate a study.

    Raises:
        StudyError: one clear line; see the codes CONFIG_* and STUDY_*.
    """
    try:
        if not path.is_file():
            raise StudyError("CONFIG_NOT_FOUND", "there is no such file", str(path))
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StudyError("CONFIG_TOO_LARGE", "the file is larger than 1 MiB", str(path))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise StudyError("CONFIG_ENCODING", "the file is not UTF-8", str(path)) from None
    except OSError as error:
        raise StudyError("CONFIG_NOT_FOUND", f"cannot be read ({error.strerror})", str(path)) from None
    return parse(text, where=str(path))


def parse(text: str, where: str = "study") -> Study:
    """Validate a study given as TOML text. Raises StudyError like `load`."""
    if not text.strip():
        raise StudyError("CONFIG_EMPTY", "the file is empty", where)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise StudyError("CONFIG_SYNTAX", f"not valid TOML: {error}", where) from None
    return from_dict(values, where)


def from_dict(values: dict[str, Any], where: str = "study") -> Study:
    """Validate a study given as plain values (of TOML or JSON). Raises StudyError like `load`."""
    try:
        return Study.model_validate(_lists_to_tuples(values))
    except ValidationError as error:
        raise _first_problem(error, values, where) from None


def from_agreed(agreed: dict[str, Any], where: str) -> Study:
    """A study as parties keep it, ``{"study": ..., "hash": ...}``.

    Raises:
        StudyError: like `load`; STUDY_HASH, the values are not those that the hash names.
    """
    study = from_dict(agreed["study"], where)
    if study.hash != agreed["hash"]:
        raise StudyError("STUDY_HASH", "the study is not the one that its hash names", where)
    return study


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists_to_tuples(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(_lists_to_tuples(v) for v in value)
    return value


def _first_problem(error: ValidationError, values: dict[str, Any], where: str) -> StudyError:
    """Pydantic's complaint as one of ours; an unknown key first, because it explains a missing one."""
    problem = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    kind, location, given = problem["type"], problem["loc"], problem.get("input")
    place = f"{where}: {'.'.join(str(p) for p in location)}"
    if kind == "extra_forbidden":
        known = _keys_at(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        guess = f", did you mean {close[0]!r}?" if close else ""
        return StudyError("CONFIG_UNKNOWN_KEY", f"unknown key {str(location[-1])!r}{guess}", place)
    if kind == "missing":
        return StudyError("CONFIG_MISSING_KEY", f"the key {str(location[-1])!r} is missing", place)
    if isinstance(given, float) and not math.isfinite(given):
        return StudyError("CONFIG_NOT_FINITE", f"{given} is not a finite number", place)
    message = problem["msg"][0].lower() + problem["msg"][1:]
    if location and location[-1] == "delta":
        return StudyError("CONFIG_DELTA", message, place)
    if location and location[0] == "sites" and (len(location) == 1 or location[-1] == "name"):
        return StudyError("STUDY_ROSTER", message, place)
    code = "CONFIG_TYPE" if kind.endswith(("_type", "_parsing", "_from_float")) else "CONFIG_RANGE"
    return StudyError(code, message, place)


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that are allowed at a place of the study."""
    model: type[BaseModel] = Study
    for step in location:
        if step == "sites":
            model = Site
        elif isinstance(step, str) and step in model.model_fields:
            annotation = model.model_fields[step].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
    return list(model.model_fields)
