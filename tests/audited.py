"""A consortium on paper for tests of the audit: real keys, ledgers, signatures and certificates; nothing is trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from ledgers import PROOF

from fedmedgan.audit import verify_alone
from fedmedgan.shared.agreement import Agreement, sign
from fedmedgan.shared.messages import Certificate, Envelope, Signed, Update
from fedmedgan.shared.privacy.accounting import calibrate_noise
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.ledger import Ledger
from fedmedgan.shared.privacy.records import DOMAIN, Terms, canonical
from fedmedgan.shared.study import Study, from_dict

NAMES = ("clinic-a", "clinic-b", "clinic-c")
KEYS = {name: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate(NAMES, start=1)}
COORDINATOR = Ed25519PrivateKey.from_private_bytes(b"\x09" * 32)
BOOKS = {name: f"{i:064x}" for i, name in enumerate(NAMES, start=1)}
DATA = {name: f"{100 + i:064x}" for i, name in enumerate(NAMES)}
OWNER = Ed25519PrivateKey.from_private_bytes(b"\x0a" * 32)

Bodies = list[dict[str, Any]]


def public(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


@lru_cache
def study(name: str = "paper", rounds: int = 4, epsilon: float = 4.0) -> Study:
    return from_dict(
        {
            "name": name,
            "sites": [{"name": n, "patients": 1000, "signing_key": public(KEYS[n])} for n in NAMES],
            "coordinator_key": public(COORDINATOR),
            "training": {"rounds": rounds, "local_steps": 25, "patients_per_step": 50},
            "privacy": {"epsilon": epsilon, "delta": 1e-4},
        }
    )


def agreement(of: Study) -> Agreement:
    agreed = Agreement(of)
    for name, key in KEYS.items():
        agreed = agreed.with_signature(name, sign(of, key))
    return agreed


@lru_cache
def sigma(of: Study) -> float:
    p, rate = of.privacy, of.sampling_rate(of.sites[0])
    return calibrate_noise(epsilon=p.epsilon, delta=p.delta, sampling_rate=rate, steps=of.total_steps)


def terms(of: Study, name: str, **changes: Any) -> Terms:
    values: dict[str, Any] = {
        "delta": of.privacy.delta,
        "ceiling": of.privacy.epsilon,
        "total_ceiling": 10.0,
        "noise_multiplier": sigma(of),
        "sampling_rate": of.sampling_rate(of.site(name)),
        "clip_norm": of.privacy.clip_norm,
        "steps": of.total_steps,
        "dataset": DATA[name],
        "patients": of.site(name).patients,
    }
    return Terms(**{**values, **changes})


class Hospital:
    """One home folder, written as the real client writes it."""

    def __init__(self, home: Path, name: str) -> None:
        self.home, self.name, self.path = home, name, home / "ledger.jsonl"

    def ledger(self) -> Ledger:
        return Ledger(self.path, self.name, signing=KEYS[self.name], book=BOOKS[self.name])

    def join(self, of: Study, **changes: Any) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        known = self.home / "study.json"
        if known.exists():
            past = self.home / "past" / json.loads(known.read_text())["hash"][:16]
            past.mkdir(parents=True)
            for path in (known, self.home / "certificates"):
                if path.exists():
                    path.rename(past / path.name)
        known.write_bytes(agreement(of).to_json())
        with self.ledger() as ledger:
            ledger.open_study(of.hash, terms(of, self.name, **changes))

    def train(self, of: Study, round: int, **changes: Any) -> None:
        """Reserve and charge a round. `changes` go into the charge."""
        event = TrainingSteps(sigma(of), of.sampling_rate(of.site(self.name)), of.training.local_steps)
        with self.ledger() as ledger:
            ledger.charge(ledger.reserve(of.hash, round, [event]), event.steps, **{**PROOF, **changes})

    def send(self, of: Study, round: int) -> Signed:
        """Release an update; its signed header."""
        payload = f"{self.name} {round}".encode()
        digest = hashlib.sha256(payload).hexdigest()
        with self.ledger() as ledger:
            ledger.release(of.hash, round=round, attempt=1, sha256=digest, size=len(payload))
            seq, head = ledger.history.seq, ledger.history.head
        header = Update(
            study=of.hash, round=round, attempt=1, cohort=NAMES, epoch=1, key_id="a" * 32, hospital=self.name,
            weight=1, model_hash="b" * 64, payload_bytes=len(payload), payload_sha256=digest,
            ledger_seq=seq, ledger_head=head, generator_loss=1.0,
        )  # fmt: skip
        return Envelope.seal(header, KEYS[self.name], payload).shown()

    def keep(self, of: Study, certificate: Signed, heads: dict[str, tuple[int, str]], round: int) -> None:
        folder = self.home / "certificates"
        folder.mkdir(exist_ok=True)
        (folder / f"round-{round:04d}.json").write_text(certificate.model_dump_json())
        digest = hashlib.sha256(certificate.header.encode()).hexdigest()
        with self.ledger() as ledger:
            ledger.anchor(of.hash, round=round, certificate=digest, heads=heads)

    def rewrite(self, change: Callable[[Bodies], Bodies]) -> None:
        """What a hospital can do to its own ledger: change records, then number, chain and sign all of them again."""
        bodies = change([json.loads(line)["body"] for line in self.path.read_bytes().splitlines()])
        self.path.write_bytes(chained(bodies, KEYS[self.name]))


def chained(bodies: Bodies, key: Ed25519PrivateKey, others: Mapping[int, Ed25519PrivateKey] | None = None) -> bytes:
    """Records numbered, chained and signed; some by other keys, by their number."""
    lines, previous = [], "0" * 64
    for seq, body in enumerate(bodies, start=1):
        line = canonical({**body, "seq": seq, "prev": previous})
        line = (
            b'{"body":'
            + line
            + b',"signature":"'
            + (others or {}).get(seq, key).sign(DOMAIN + line).hex().encode()
            + b'"}\n'
        )
        lines.append(line)
        previous = hashlib.sha256(line).hexdigest()
    return b"".join(lines)


class Consortium:
    """Three hospitals and a coordinator; `folder` looks like a simulation's run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hospitals = {name: Hospital(folder / "hospitals" / name, name) for name in NAMES}

    def join(self, of: Study, **changes: Any) -> None:
        for hospital in self.hospitals.values():
            hospital.join(of, **changes)

    def round(self, of: Study, round: int, *, uncharged: str = "") -> None:
        """All of them train and send; `uncharged` sends without a record of it."""
        shown = []
        for name, hospital in self.hospitals.items():
            if name != uncharged:
                hospital.train(of, round)
            kept = hospital.path.read_bytes()
            if name == uncharged:
                hospital.train(of, round)
            shown.append(hospital.send(of, round))
            if name == uncharged:
                hospital.path.write_bytes(kept)
                shown[-1] = self._reheaded(shown[-1], hospital)
        header = Certificate(
            study=of.hash, round=round, attempt=1, cohort=NAMES, epoch=1, key_id="a" * 32,
            updates=tuple(shown), payload_bytes=0, payload_sha256=hashlib.sha256(b"").hexdigest(),
        )  # fmt: skip
        updates = [Update.model_validate_json(signed.header) for signed in shown]
        heads = {public(KEYS[u.hospital]): (u.ledger_seq, u.ledger_head) for u in updates}
        certificate = Envelope.seal(header, COORDINATOR).shown()
        for hospital in self.hospitals.values():
            hospital.keep(of, certificate, heads, round)

    @staticmethod
    def _reheaded(signed: Signed, hospital: Hospital) -> Signed:
        """The update again, with the ledger's present head."""
        with hospital.ledger() as ledger:
            seq, head = ledger.history.seq, ledger.history.head
        header = Update.model_validate_json(signed.header).model_copy(update={"ledger_seq": seq, "ledger_head": head})
        return Envelope.seal(header, KEYS[hospital.name]).shown()

    def anchors_of(self, name: str) -> list[dict[str, Any]]:
        """The heads of one ledger that the others hold, as anchors.json lists them."""
        found = []
        for by, hospital in self.hospitals.items():
            for line in hospital.path.read_bytes().splitlines() if by != name else ():
                body = json.loads(line)["body"]
                if body["kind"] == "anchor":
                    seq, head = body["heads"][public(KEYS[name])]
                    found.append({"by": by, "study": body["study"], "round": body["round"], "seq": seq, "head": head})
        return found

    def bundle(self, name: str, target: Path) -> Path:
        """One hospital's audit bundle as a folder, sealed."""
        home = self.hospitals[name].home
        shutil.copytree(home, target)
        (target / "anchors.json").write_text(json.dumps(self.anchors_of(name)))
        shutil.copy(verify_alone.__file__, target / "verify.py")
        seal(target, KEYS[name])
        return target


def seal(bundle: Path, key: Ed25519PrivateKey) -> None:
    """SHA256SUMS and its signature, anew."""
    for name in ("SHA256SUMS", "SHA256SUMS.sig"):
        (bundle / name).unlink(missing_ok=True)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(bundle).as_posix()}\n" for p in files]
    (bundle / "SHA256SUMS").write_text("".join(lines))
    signature = key.sign(verify_alone.BUNDLE_DOMAIN + (bundle / "SHA256SUMS").read_bytes()).hex()
    (bundle / "SHA256SUMS.sig").write_text(signature + "\n")
