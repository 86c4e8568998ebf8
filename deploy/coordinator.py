"""The coordinator's folder: its kit, its key, the signed study; and what anybody may ask about it.

folder/kit/                  the start-up kit
folder/coordinator.key       its signing key: it signs instructions and opens nothing
folder/study.json            the agreement, signed by every hospital
folder/events.jsonl          what happened
folder/journal.db, sums/ ... what a killed server goes on from      fedmedgan.server.journal
folder/state.db, flwr/       the SuperLink's own
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmedgan.deploy import kit_config, kits, processes
from fedmedgan.deploy.kit_config import COORDINATOR_TOML, Consortium
from fedmedgan.server.app import KEY_FILE, refuse_secrets
from fedmedgan.shared.agreement import Agreement, Identity
from fedmedgan.shared.errors import RunError, StudyError
from fedmedgan.shared.secure_sum import keys

KIT, STUDY, EVENTS, LOCK = "kit", "study.json", "events.jsonl", "flwr/server.lock"
FINAL = ("rounds", "converged", "budget")
"""Reasons of ``run_closed`` after which no further run is to be started."""


def init(kit: Path, folder: Path, passphrase: bytes | None = None) -> Identity:
    """Make the coordinator's folder from its kit; again, with a newer kit, only the kit is replaced.

    Raises:
        RunError: KIT_*, RUN_PATH. CryptoError: KEY_*, HE_SECRET_AT_SERVER.
    """
    kits.require_unchanged(kit)
    kit_config.load(kit / COORDINATOR_TOML)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_secrets(folder)
        path = folder / KEY_FILE
        if not path.exists():
            keys.save_signing_key(path, Ed25519PrivateKey.generate(), passphrase)
        private = keys.load_signing_key(path, passphrase)
        kits.copy(kit, folder / KIT)
        public = private.public_key().public_bytes_raw().hex()
        identity = Identity(role="coordinator", name="coordinator", signing_key=public).signed(private)
        identity.save(folder / "coordinator.identity.json")
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(folder)) from None
    return identity


def take_study(folder: Path, study: Path | None) -> tuple[Consortium, Agreement]:
    """Check that everything is there for a start, and keep the study in the folder.

    Args:
        study: the signed study; None: the one that the folder holds already.

    Raises:
        StudyError: STUDY_SIGNATURE, STUDY_KEYS, STUDY_HASH, CONFIG_*.
        RunError: KIT_*; RUN_PATH, the folder holds another study.
        CryptoError: KEY_*, HE_SECRET_AT_SERVER.
    """
    refuse_secrets(folder)
    kits.require_unchanged(folder / KIT)
    consortium = kit_config.load(folder / KIT / COORDINATOR_TOML)
    agreement = Agreement.load(study or folder / STUDY)
    agreement.require_all()
    own = keys.load_signing_key(folder / KEY_FILE).public_key().public_bytes_raw().hex()
    if agreement.study.coordinator_key != own:
        raise StudyError("STUDY_KEYS", "the study lists another key for the coordinator", STUDY)
    without = sorted({site.name for site in agreement.study.sites} - set(consortium.names))
    if without:
        hint = "`fedmedgan kit make` with these hospitals, then `fedmedgan server init` with the new kit"
        raise RunError("KIT_CONFIG", f"no kit was made for {', '.join(without)}", COORDINATOR_TOML, hint=hint)
    if (folder / STUDY).exists() and Agreement.load(folder / STUDY).study.hash != agreement.study.hash:
        raise RunError("RUN_PATH", "the folder holds another study", str(folder), hint="one folder for each study")
    part = folder / f".{STUDY}.part"
    part.write_bytes(agreement.to_json())
    os.replace(part, folder / STUDY)
    return consortium, agreement


def events(folder: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """What happened from a place in the file on: (where the next event begins, event). A torn last line is left."""
    path = folder / EVENTS
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, json.loads(line)
            except ValueError:  # torn by a crash, then written on
                continue


def ending(folder: Path) -> str:
    """Why the study has ended for good, "" if it has not."""
    closed = ""
    for _, event in events(folder):
        if event.get("event") == "run_closed":
            closed = event.get("reason", "")
        elif event.get("event") == "run_opened":
            closed = ""
    return closed if closed in FINAL else ""


def status(folder: Path) -> dict[str, Any]:
    """Study, rounds, who took part last, and whether the server runs.

    Raises:
        RunError: RUN_PATH, the folder holds no study. StudyError: it is damaged.
    """
    if not (folder / STUDY).exists():
        hint = "`fedmedgan server init` makes the folder, `server start --study` gives it a study"
        raise RunError("RUN_PATH", "the coordinator has no study yet", str(folder), hint=hint)
    agreement = Agreement.load(folder / STUDY)
    last: dict[str, dict[str, Any]] = {}
    for _, event in events(folder):
        last[str(event.get("event"))] = event
    applied = last.get("round_applied", {})
    return {
        "study": agreement.study.name,
        "hash": agreement.study.hash,
        "running": processes.is_running(folder / LOCK),
        "ended": ending(folder),
        "rounds": agreement.study.training.rounds,
        "round": applied.get("round", 0),
        "model_hash": applied.get("model_hash", ""),
        "sites": applied.get("sites", []),
        "last_missing": last.get("site_missing", {}),
    }
