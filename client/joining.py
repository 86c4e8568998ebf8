"""A hospital enters a study: its policy grants it, the noise is calibrated, the ledger is opened."""

from __future__ import annotations

import json
from pathlib import Path

from fedmedgan.client import checkpoint
from fedmedgan.client.policy import Policy
from fedmedgan.shared.errors import StudyError
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.secure_sum.keys import HospitalKeys
from fedmedgan.shared.study import Study

ATTEMPT = "attempt.json"
STATE = ("model.safetensors", "optimizers.safetensors", "update.safetensors", ATTEMPT, "samples")
"""What belongs to one study in a home folder, beside study.json."""


def join(home: Path, study: Study) -> None:
    """The hospital enters a study: checks it against its policy, calibrates the noise, opens the ledger.

    Raises:
        PrivacyError: BUDGET_EXHAUSTED, LEDGER_*.
        StudyError: STUDY_KEYS, the study has no keys or not this hospital's.
    """
    policy = Policy.load(home / "policy.toml")
    keys = HospitalKeys.load(home / "keys")
    site = study.site(policy.site)
    policy.grant(study)
    if (site.signing_key, site.exchange_key) != (keys.signing_public, keys.exchange_public):
        raise StudyError("STUDY_KEYS", "the study lists other keys for this hospital", site.name)
    sigma = calibrate_noise(
        epsilon=study.privacy.epsilon,
        delta=study.privacy.delta,
        sampling_rate=study.sampling_rate(site),
        steps=study.total_steps,
    )
    with Ledger(home / "ledger.jsonl", site.name) as ledger:
        ledger.open_study(study.hash, delta=study.privacy.delta, ceiling=study.privacy.epsilon)
    _put_away(home, study)
    agreed = {"study": study.model_dump(mode="json"), "hash": study.hash, "noise_multiplier": sigma}
    checkpoint.write_bytes(home / "study.json", json.dumps(agreed).encode())


def _put_away(home: Path, study: Study) -> None:
    """Move the state of an earlier study to ``past/<hash>``: ledger, keys and cache serve every study."""
    known = home / "study.json"
    earlier = json.loads(known.read_text(encoding="utf-8"))["hash"] if known.exists() else study.hash
    if earlier != study.hash:
        past = home / "past" / earlier[:16]
        past.mkdir(parents=True)
        for name in (*STATE, "study.json"):  # the agreement last: a crash before it repeats this
            if (home / name).exists():
                (home / name).rename(past / name)
