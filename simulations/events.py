"""What coordinator and hospitals write down while they work, in exactly this form (shared/eventlog.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass

from fedmedgan.shared.study import SiteName

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

RoundNumber = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ModelHash = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
"""Empty where no round was applied."""


# ---- the coordinator's events


@checked_dataclass(frozen=True, config=STRICT)
class RunOpened:
    """The hospitals have answered the roll call."""

    event: Literal["run_opened"]
    time: float
    study_hash: Digest
    sites: tuple[SiteName, ...]
    parameters: Count
    float32_bytes: Count
    """One update as plaintext float32, for comparison."""


@checked_dataclass(frozen=True, config=STRICT)
class RoundOpened:
    event: Literal["round_opened"]
    time: float
    round: RoundNumber
    attempt: RoundNumber
    cohort: tuple[SiteName, ...]


@checked_dataclass(frozen=True, config=STRICT)
class UpdateAccepted:
    event: Literal["update_accepted"]
    time: float
    round: RoundNumber
    attempt: RoundNumber
    site: SiteName
    bytes_up: Count
    generator_loss: float


@checked_dataclass(frozen=True, config=STRICT)
class SiteMissing:
    event: Literal["site_missing"]
    time: float
    round: RoundNumber
    attempt: RoundNumber
    site: SiteName
    reason: str


@checked_dataclass(frozen=True, config=STRICT)
class AggregationSeconds:
    local: Seconds
    """Wall time from opening the attempt to its last update."""
    aggregation: Seconds
    """Spent on verifying and adding; most of it while other hospitals still train, so inside `local`."""


@checked_dataclass(frozen=True, config=STRICT)
class RoundAggregated:
    event: Literal["round_aggregated"]
    time: float
    round: RoundNumber
    attempt: RoundNumber
    cohort: tuple[SiteName, ...]
    bytes_down: Count
    """One copy of the encrypted sum; every hospital is sent one."""
    seconds: AggregationSeconds


@checked_dataclass(frozen=True, config=STRICT)
class BroadcastSeconds:
    broadcast: Seconds
    """Wall time from sending the sum to the last answer, so the hospitals' phase 4 is inside."""


@checked_dataclass(frozen=True, config=STRICT)
class RoundApplied:
    event: Literal["round_applied"]
    time: float
    round: RoundNumber
    sites: tuple[SiteName, ...]
    model_hash: ModelHash
    generator_loss: float
    """Mean over the cohort."""
    seconds: BroadcastSeconds


@checked_dataclass(frozen=True, config=STRICT)
class NodeRefused:
    """Somebody called who could not show to be a hospital of the roster, or could not be given the key."""

    event: Literal["node_refused"]
    time: float
    reason: str
    site: SiteName = "unknown"


@checked_dataclass(frozen=True, config=STRICT)
class EpochOpened:
    """The hospitals have a new key."""

    event: Literal["epoch_opened"]
    time: float
    epoch: RoundNumber
    leader: SiteName
    members: tuple[SiteName, ...]


@checked_dataclass(frozen=True, config=STRICT)
class EpochFailed:
    """A leader could not give everybody a key; the next one is asked."""

    event: Literal["epoch_failed"]
    time: float
    epoch: RoundNumber
    leader: SiteName
    reason: str


@checked_dataclass(frozen=True, config=STRICT)
class SiteLeft:
    event: Literal["site_left"]
    time: float
    site: SiteName


@checked_dataclass(frozen=True, config=STRICT)
class WorkerRestarted:
    """An upload ended the process that adds."""

    event: Literal["worker_restarted"]
    time: float
    round: RoundNumber
    site: SiteName


@checked_dataclass(frozen=True, config=STRICT)
class RunClosed:
    event: Literal["run_closed"]
    time: float
    rounds: Count
    reason: Literal["rounds", "converged", "budget", "quorum", "failed"]
    model_hash: ModelHash


# ---- a hospital's events


@checked_dataclass(frozen=True, config=STRICT)
class DataLoaded:
    event: Literal["data_loaded"]
    time: float
    images: Count
    patients: Count
    refused: dict[str, Count]
    """Why files were left out: code -> number."""
    seconds: Seconds


Verdict = Literal["passed", "failed", "too-few", "not-run"]


@checked_dataclass(frozen=True, config=STRICT)
class Trained:
    event: Literal["trained"]
    time: float
    round: RoundNumber
    steps: Count
    seconds: Seconds
    generator_loss: float
    discriminator_fake_loss: float
    epsilon: Annotated[float, Field(ge=0)] | None
    """Spent in this study after this round; None in a study without privacy, like the next two."""
    ceiling: Annotated[float, Field(gt=0)] | None
    noise_multiplier: Annotated[float, Field(ge=0)] | None
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    checks: dict[Literal["noise", "clipping", "rows", "sampling"], Verdict]
    """What the tests of noise, clipping, rows and sampling said."""
    method: str
    """How gradients of single records were found (client/training/private_step.py)."""
    quantize_seconds: Seconds = 0.0


@checked_dataclass(frozen=True, config=STRICT)
class EncryptSeconds:
    seal: Seconds
    encrypt: Seconds
    quantize: Seconds = 0.0


@checked_dataclass(frozen=True, config=STRICT)
class Encrypted:
    event: Literal["encrypted"]
    time: float
    round: RoundNumber
    attempt: RoundNumber
    seconds: EncryptSeconds
    saturated: Count
    """Values that were limited to the study's update range."""
    values: Annotated[int, Field(ge=1)]
    bytes_up: Count


@checked_dataclass(frozen=True, config=STRICT)
class UpdateSeconds:
    decrypt: Seconds
    check: Seconds
    apply: Seconds


@checked_dataclass(frozen=True, config=STRICT)
class Updated:
    event: Literal["updated"]
    time: float
    round: RoundNumber
    seconds: UpdateSeconds
    model_hash: Digest


@checked_dataclass(frozen=True, config=STRICT)
class Trouble:
    """A request that the hospital refused or failed. The text is the hospital's own: it is never shown."""

    event: Literal["refused", "failed"]
    time: float
    error: str


CoordinatorEvent = (
    RunOpened
    | RoundOpened
    | UpdateAccepted
    | SiteMissing
    | RoundAggregated
    | RoundApplied
    | NodeRefused
    | RunClosed
    | EpochOpened
    | EpochFailed
    | SiteLeft
    | WorkerRestarted
)
HospitalEvent = DataLoaded | Trained | Encrypted | Updated | Trouble

_BY_NAME = Field(discriminator="event")
COORDINATOR: TypeAdapter[CoordinatorEvent] = TypeAdapter(Annotated[CoordinatorEvent, _BY_NAME])
HOSPITAL: TypeAdapter[HospitalEvent] = TypeAdapter(Annotated[HospitalEvent, _BY_NAME])
