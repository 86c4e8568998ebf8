"""Everybody who takes bytes from a stranger, a line or a disk, and what comes of bytes that were mutated.

    python receivers.py RECEIVER START STOP        a line a message: its number and what came of it

A receiver makes one mutated message and takes it. Outcomes:

    refused CODE        a typed error: as it should be
    accepted            the bytes differ from what was sent, and the receiver took them
    untyped NAME        an exception that is none of ours

A crash or a hang ends this process, and `messages.py` sees it. Insiders (a hospital with its own signature, a server
with its own) can make bytes that are as valid as the honest ones: what they send is accepted only if a wrong
sum comes out.
"""

from __future__ import annotations

import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from faults import ledger as ledger_faults
from faults.cohort import Cohort
from faults.mutators import Rng, mutate
from fedmedgan.shared.errors import FedMedGanError
from fedmedgan.shared.messages import Envelope
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum import cipher, epochs, keys

SECONDS, MEMORY = 60, 8 << 30
"""What one message may cost: a hang and a memory bomb end the process."""
N_VALUES = 3000

Taken = Callable[[], bool]
"""Gives the message to the receiver; True if it was accepted though it is not what was sent."""


@cache
def _cohort() -> Cohort:
    return Cohort([1, 2, 1], N_VALUES, 8)


@cache
def _round() -> tuple[list[Envelope], Envelope, np.ndarray]:
    """Honest updates, the honest certificate, and the sums."""
    cohort, rng = _cohort(), np.random.default_rng(14)
    opened, levels = cohort.open_round(), [cohort.levels(rng) for _ in range(3)]
    updates = [cohort.update(site, values, opened) for site, values in enumerate(levels)]
    total = cohort.server(opened)
    for update in updates:
        total.add(update)
    certificate, payload = total.certify()
    expected = sum(w * values for w, values in zip(cohort.weights, levels, strict=True))
    return updates, cohort.signed_certificate(certificate.canonical(), payload), expected


def _sum_is_wrong(envelope: Envelope) -> bool:
    return not np.array_equal(_cohort().open_sum(envelope), _round()[2])


# ---- what arrives over the line


def _mutated_envelope(good: Envelope, rng: Rng) -> tuple[Envelope, str]:
    parts = {"kind": good.kind.encode(), "header": good.header, "signature": good.signature.encode()}
    parts |= {"payload": good.payload}
    name = str(rng.choice(["kind", "header", "header", "header", "signature", "signature", "payload", "payload"]))
    parts[name], how = mutate(parts[name], rng, is_json=name == "header")
    envelope = Envelope(
        kind=parts["kind"].decode("latin-1"),
        header=parts["header"],
        signature=parts["signature"].decode("latin-1"),
        payload=parts["payload"],
    )
    return envelope, f"{how} of the {name}"


def _mutated_record(good: Envelope, rng: Rng) -> tuple[RecordDict, str]:
    """The same message as Flower carries it, with another form."""
    fields: dict[str, Any] = {"kind": good.kind, "header": good.header, "signature": good.signature}
    arrays = dict(good.to_record().array_records["payload"])
    whole, half = good.payload, len(good.payload) // 2
    record, payload = RecordDict(), "payload"
    how = int(rng.integers(11))
    field = str(rng.choice(sorted(fields)))
    match how:
        case 0:
            del fields[field]
        case 1:
            fields["another"] = "x"
        case 2:
            fields[field] = [1, 1.5, True, "x", b"x", [1, 2], ["a"], [b"x"], [True]][int(rng.integers(9))]
        case 3:
            arrays["000000"] = Array("float64", (10**9, 10**9), "numpy.ndarray", whole)
        case 4:
            halves = (whole[:half], whole[half:])
            arrays = {f"{i:06d}": Array("bytes", (len(p),), "fedmedgan.v1", p) for i, p in enumerate(halves)}
        case 5:
            arrays[str(rng.choice(["000001", "zz", "-1", "", "000000 "]))] = Array("bytes", (0,), "fedmedgan.v1", b"")
        case 6:
            arrays = {f"part{name}": array for name, array in arrays.items()}
        case 7:
            payload = str(rng.choice(["Payload", "payload2", ""]))
        case 8:
            record["another"] = MetricRecord({"loss": 0.5})
        case 9:
            record["another"] = ConfigRecord({"header": b"x"})
        case _:
            arrays["000000"] = Array("bytes", (-1,), "fedmedgan.v1", whole)
    record["envelope"] = ConfigRecord(fields)
    record[payload] = ArrayRecord(arrays)
    return record, f"form {how} of the record, {field}"


def update_at_server(rng: Rng) -> tuple[Taken, str]:
    """A hospital's message, mutated on the way."""
    cohort, good = _cohort(), _round()[0][0]
    if rng.random() < 0.15:
        record, how = _mutated_record(good, rng)
    else:
        envelope, how = _mutated_envelope(good, rng)
        record = envelope.to_record()

    def take() -> bool:
        cohort.server(cohort.open_round()).add(Envelope.from_record(record, cohort.max_payload()))
        return True

    return take, how


def update_of_insider(rng: Rng) -> tuple[Taken, str]:
    """A hospital signs and frames damaged ciphertexts; the server adds them, and hospitals open the sum."""
    cohort, opened = _cohort(), _cohort().open_round()
    updates = list(_round()[0])
    blobs = cohort.blobs(updates[0].payload, "update", opened)
    if rng.random() < 0.5:
        payload, how = mutate(updates[0].payload, rng)
    else:
        blob, how = mutate(blobs[0], rng)
        payload = cohort.update_payload([blob, *blobs[1:]], opened)
    updates[0] = cohort.signed_payload(0, payload, opened)

    def take() -> bool:
        total = cohort.server(opened)
        for update in updates:
            total.add(update)
        certificate, summed = total.certify()
        return _sum_is_wrong(cohort.signed_certificate(certificate.canonical(), summed))

    return take, how


def certificate_at_hospital(rng: Rng) -> tuple[Taken, str]:
    """The server's message, mutated on the way."""
    cohort, good = _cohort(), _round()[1]
    if rng.random() < 0.15:
        record, how = _mutated_record(good, rng)
    else:
        envelope, how = _mutated_envelope(good, rng)
        record = envelope.to_record()

    def take() -> bool:
        cohort.open_sum(Envelope.from_record(record, 1 << 30))
        return True

    return take, how


def sum_of_insider(rng: Rng) -> tuple[Taken, str]:
    """The server signs a damaged sum, or a certificate with damaged words of a hospital."""
    cohort, opened = _cohort(), _cohort().open_round()
    updates, good, _ = _round()
    payload, shown = good.payload, list(updates)
    blobs = cohort.blobs(payload, "sum", opened)
    choice = int(rng.integers(3))
    if choice == 0:
        payload, how = mutate(payload, rng)
    elif choice == 1:
        blob, how = mutate(blobs[0], rng)
        payload = cohort.sum_payload([blob, *blobs[1:]], opened)
    else:
        damaged, how = _mutated_envelope(updates[0], rng)
        if damaged.kind == updates[0].kind and damaged.payload == updates[0].payload:
            shown[0] = damaged
    if payload == good.payload and shown[0] is updates[0]:
        return sum_of_insider(rng)
    return lambda: _certified(cohort, shown, payload), how


def _certified(cohort: Cohort, shown: list[Envelope], payload: bytes) -> bool:
    opened = cohort.open_round()
    try:
        envelope = cohort.certificate(opened, shown, payload)
    except ValueError:  # not even the server's own program would send this; so send it by hand
        raise FedMedGanError("MSG_FORMAT", "no certificate can say this") from None
    cohort.open_sum(envelope)
    return shown[0] is not _round()[0][0] or _sum_is_wrong(envelope)


# ---- what lies on a disk


def stored_update(rng: Rng) -> tuple[Taken, str]:
    """An update as the hospital's outbox and the server's journal keep it."""
    cohort, opened = _cohort(), _cohort().open_round()
    raw, how = mutate(_round()[0][0].to_bytes(), rng)

    def take() -> bool:
        cohort.server(opened).add(Envelope.from_bytes(raw))
        return True

    return take, how


def wrapped_key(rng: Rng) -> tuple[Taken, str]:
    """A key epoch on its way to a member."""
    cohort = _cohort()
    sender, recipient = cohort.names[0], cohort.names[1]
    blob, how = mutate(_wrapped(), rng)

    def take() -> bool:
        epochs.unwrap(
            cohort.keys[1],
            blob,
            study_hash=cohort.study.hash,
            number=cohort.epoch.number,
            key_id=cohort.epoch.key_id,
            members=cohort.epoch.members,
            sender=sender,
            recipient=recipient,
        )
        return True

    return take, how


def wrapped_key_of_insider(rng: Rng) -> tuple[Taken, str]:
    """A leader wraps damaged keys as it should. Whatever opens is a key of the leader's choice, as any is."""
    cohort = _cohort()
    good = cohort.epoch
    secret, how = mutate(good.he_secret, rng)
    damaged = SimpleNamespace(
        number=1,
        members=good.members,
        mac_root=good.mac_root,
        he_secret=secret,
        key_id=cipher.key_id(secret + good.mac_root),
    )
    about = {"study_hash": cohort.study.hash, "sender": cohort.names[0], "recipient": cohort.names[1]}
    blob = epochs.wrap(damaged, cohort.keys[1].wrapping_public, **about)  # type: ignore[arg-type]

    def take() -> bool:
        epochs.unwrap(cohort.keys[1], blob, number=1, key_id=damaged.key_id, members=good.members, **about)
        return False

    return take, how


@cache
def _wrapped() -> bytes:
    cohort = _cohort()
    public = cohort.keys[1].wrapping_public
    how = {"study_hash": cohort.study.hash, "sender": cohort.names[0], "recipient": cohort.names[1]}
    return epochs.wrap(cohort.epoch, public, **how)


@cache
def _folder() -> Path:
    """Of this process; it goes when the process ends."""
    _folder.keep = tempfile.TemporaryDirectory(prefix="faults-")  # type: ignore[attr-defined]
    return Path(_folder.keep.name)  # type: ignore[attr-defined]


@cache
def _key_files(passphrase: bytes | None) -> Path:
    folder = _folder() / ("sealed" if passphrase else "plain")
    keys.generate_identity().save(folder, passphrase)
    keys.store_next(folder, _cohort().epoch, passphrase)
    keys.activate_next(folder, 1, passphrase)
    return folder


def key_file_plain(rng: Rng) -> tuple[Taken, str]:
    """A hospital's key files."""
    return _key_file(rng, None)


def key_file_sealed(rng: Rng) -> tuple[Taken, str]:
    """A hospital's key files under a passphrase."""
    return _key_file(rng, b"a long passphrase")


def _key_file(rng: Rng, passphrase: bytes | None) -> tuple[Taken, str]:
    folder = _key_files(passphrase)
    path = folder / str(rng.choice(["identity.key", "epoch.key"]))
    good = path.read_bytes()
    raw, how = mutate(good, rng, is_json=passphrase is None)

    def take() -> bool:
        path.write_bytes(raw)
        try:
            keys.HospitalKeys.load(folder, passphrase)
        finally:
            path.write_bytes(good)
        return True

    return take, f"{how} of {path.name}"


def model_file(rng: Rng) -> tuple[Taken, str]:
    """A hospital's checkpoint."""
    from fedmedgan.client import checkpoint  # imports torch

    good, path = _model(), _folder() / "changed.safetensors"
    if rng.random() < 0.4:  # in the header, which is JSON behind its length
        size = int.from_bytes(good[:8], "little")
        header, how = mutate(good[8 : 8 + size], rng, is_json=True)
        raw, how = len(header).to_bytes(8, "little") + header + good[8 + size :], f"{how} of the header"
    else:
        raw, how = mutate(good, rng)
    path.write_bytes(raw)

    def take() -> bool:
        checkpoint.read(path)
        return True

    return take, how


@cache
def _model() -> bytes:
    from fedmedgan.client import checkpoint

    rng, path = np.random.default_rng(2), _folder() / "model.safetensors"
    arrays = {
        "generator.0.weight": rng.standard_normal((8, 4)).astype(np.float32),
        "generator.0.bias": rng.standard_normal(4).astype(np.float32),
        "discriminator.levels": rng.integers(0, 255, 50).astype(np.uint16),
        "discriminator.loss": np.array(0.5),
    }
    checkpoint.write(path, arrays, round=3, study="1a" * 32, ledger_seq=12, ledger_head="2b" * 32)
    return path.read_bytes()


def ledger_file(rng: Rng) -> tuple[Taken, str]:
    """A hospital's ledger.

    Not counted: an older beginning of it, which verifies alone and is for anchors to find; and the whole of it with a
    torn write behind it, which readers report as such.
    """
    good = _ledger()
    path = _folder() / "changed.jsonl"
    if rng.random() < 0.4:  # one line, which is JSON
        lines = good.splitlines(keepends=True)
        which = int(rng.integers(len(lines)))
        lines[which], how = mutate(lines[which], rng, is_json=True)
        raw, how = b"".join(lines), f"{how} of a line"
    else:
        raw, how = mutate(good, rng)
    path.write_bytes(raw)

    def take() -> bool:
        history = read_ledger(path)
        torn = history.torn_bytes > 0 and history.head == _whole().head
        return not (torn or ledger_faults.is_older(history, _whole()))

    return take, how


@cache
def _ledger() -> bytes:
    return ledger_faults.sample(_folder() / "ledger.jsonl")


@cache
def _whole() -> Any:
    _ledger()
    return read_ledger(_folder() / "ledger.jsonl")


RECEIVERS: dict[str, Callable[[Rng], tuple[Taken, str]]] = {
    receiver.__name__: receiver
    for receiver in (
        update_at_server,
        update_of_insider,
        certificate_at_hospital,
        sum_of_insider,
        stored_update,
        wrapped_key,
        wrapped_key_of_insider,
        key_file_plain,
        key_file_sealed,
        model_file,
        ledger_file,
    )
}


def outcomes(receiver: str, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """What came of the messages with these numbers. The same numbers mutate in the same way."""
    for number in range(start, stop):
        rng = np.random.default_rng([14, sum(receiver.encode()), number])
        take, how = RECEIVERS[receiver](rng)
        yield number, outcome(take, how)


def outcome(take: Taken, how: str) -> str:
    try:
        return f"accepted {how}" if take() else "refused harmless"
    except FedMedGanError as error:
        return f"refused {error.code}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"untyped {type(error).__name__} in {Path(place.filename).name}:{place.lineno}, {how}"


def main() -> None:
    receiver, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number, came in outcomes(receiver, start, stop):
        print(number, came, flush=True)
        signal.alarm(SECONDS)


if __name__ == "__main__":
    main()
