"""The coordinator's memory on disk: what was opened, accepted and certified, so that a killed server goes on.

SQLite (WAL, synchronous=FULL) holds signed headers; ciphertexts lie beside it as files, because they are megabytes and
are deleted early. A file is on the disk before the row that names it, so no row is a promise without bytes; a file
without a row does not count.

case                                        what happens
killed at any moment                        an update or certificate is there as a whole or not at all
killed between a certificate and deleting   the updates of that round are deleted on opening
the same update again                       nothing: it is held already
another update of the hospital, one attempt MSG_EQUIVOCATION
an update for an attempt that is over       MSG_ROUND
a stored update is damaged or gone          it counts as not accepted: the hospital is asked again
a stored sum is damaged or gone             RUN_JOURNAL: nobody can make it again
another study, another coordinator at work  RUN_JOURNAL
journal.db was deleted, the rest was not    RUN_JOURNAL

What is held, and when it is deleted: docs/decisions/0008-server-journal.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedmedgan.server.storage import Database, disk, lock, problem, sync, write
from fedmedgan.shared import crash
from fedmedgan.shared.errors import MessageError, ModelError
from fedmedgan.shared.messages import Certificate, Envelope, H, RoundOpen, Signed, Update, parse

FORMAT = 1
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    """CREATE TABLE attempts (round INTEGER, attempt INTEGER, header TEXT NOT NULL,
        PRIMARY KEY (round, attempt)) STRICT, WITHOUT ROWID""",
    # held: 1 while the ciphertext is in updates/. The signed header stays: it anchors the hospital's ledger.
    """CREATE TABLE updates (round INTEGER, attempt INTEGER, hospital TEXT, header TEXT NOT NULL,
        signature TEXT NOT NULL, ledger_seq INTEGER NOT NULL, held INTEGER NOT NULL CHECK (held IN (0, 1)),
        PRIMARY KEY (round, attempt, hospital),
        FOREIGN KEY (round, attempt) REFERENCES attempts) STRICT, WITHOUT ROWID""",
    "CREATE INDEX held ON updates (held) WHERE held = 1",
    """CREATE TABLE certificates (round INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, header TEXT NOT NULL,
        FOREIGN KEY (round, attempt) REFERENCES attempts) STRICT""",
    """CREATE TABLE applied (round INTEGER, hospital TEXT, model_hash TEXT NOT NULL,
        PRIMARY KEY (round, hospital)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE offers (number INTEGER PRIMARY KEY, leader TEXT NOT NULL, header TEXT NOT NULL,
        signature TEXT NOT NULL) STRICT""",
    """CREATE TABLE wrapped (number INTEGER REFERENCES offers, hospital TEXT, blob BLOB NOT NULL,
        PRIMARY KEY (number, hospital)) STRICT""",
    """CREATE TABLE readies (number INTEGER REFERENCES offers, hospital TEXT, header TEXT NOT NULL,
        signature TEXT NOT NULL, PRIMARY KEY (number, hospital)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE epochs (number INTEGER PRIMARY KEY, key_id TEXT NOT NULL, members TEXT NOT NULL,
        since_round INTEGER NOT NULL) STRICT""",
    """CREATE TABLE leaves (hospital TEXT PRIMARY KEY, header TEXT NOT NULL,
        signature TEXT NOT NULL) STRICT, WITHOUT ROWID""",
)


@dataclass(frozen=True)
class EpochRow:
    """A key epoch that every member has confirmed."""

    number: int
    key_id: str
    members: tuple[str, ...]
    since_round: int


class Journal:
    """The journal in the coordinator's folder: close it, or use it as a context manager. For one thread.

    What a method stores is on the disk when it returns. Each may be called again with the same arguments.

    Args:
        folder: `journal.db`, `journal.lock`, `updates/` and `sums/` in it are the journal's own.
        study_hash: of the study that it belongs to.

    Raises:
        RunError: RUN_JOURNAL; every method raises it when the disk is full or the journal is damaged.
    """

    def __init__(self, folder: Path, study_hash: str) -> None:
        self._updates, self._sums = folder / "updates", folder / "sums"
        with ExitStack() as undo, disk():
            for path in (folder, self._updates, self._sums):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            undo.callback(os.close, lock(folder / "journal.lock"))
            self._db = Database(folder / "journal.db")
            undo.callback(self._db.close)
            self._prepare(study_hash)
            self._delete_unheld()
            sync(folder)
            self._open = undo.pop_all()

    def close(self) -> None:
        """Let another process open it. Nothing is left to be saved."""
        self._open.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- rounds

    def open_attempt(self, opened: RoundOpen) -> None:
        """Note an attempt before anybody hears of it. Updates of earlier attempts, now useless, are deleted.

        A round whose sum no hospital could use is opened again under a later key epoch; that certificate is deleted.

        Raises:
            RunError: RUN_JOURNAL, the attempt was opened otherwise, or a later one or the certificate is there.
        """
        place, header = (opened.round, opened.attempt), opened.canonical().decode()
        if self._db.value("SELECT header FROM attempts WHERE (round, attempt) = (?, ?)", *place) == header:
            return
        if place <= self._newest() or (opened.round <= self.last_round() and not self._unusable(opened)):
            raise problem(f"attempt {opened.attempt} of round {opened.round} was opened otherwise, or is over")
        with self._db.transaction() as db:
            db.execute("INSERT INTO attempts VALUES (?, ?, ?)", (*place, header))
            db.execute("UPDATE updates SET held = 0 WHERE held = 1")
            db.execute("DELETE FROM certificates WHERE round = ?", (opened.round,))
        self._delete_unheld()

    def _unusable(self, again: RoundOpen) -> bool:
        """Was this round certified under an earlier key epoch, and has nobody applied its sum?"""
        header = self._db.value("SELECT header FROM certificates WHERE round = ?", again.round)
        newest = again.round == self.last_round() and not self.model_hash(again.round)
        return newest and _parsed(header, Certificate).epoch < again.epoch

    def attempt_under_way(self) -> RoundOpen | None:
        """The newest attempt, unless its round has a certificate."""
        place = self._newest()
        if place[0] <= self.last_round():
            return None
        return _parsed(self._db.value("SELECT header FROM attempts WHERE (round, attempt) = (?, ?)", *place), RoundOpen)

    def accept(self, opened: RoundOpen, envelope: Envelope, update: Update) -> None:
        """Keep one hospital's update, already verified by the caller (aggregation.RoundSum).

        Raises:
            MessageError: MSG_EQUIVOCATION, this hospital sent another update for this attempt before; MSG_ROUND, the
                attempt is not the one under way.
        """
        place, header = (opened.round, opened.attempt), envelope.header.decode()
        query = "SELECT header, held FROM updates WHERE (round, attempt, hospital) = (?, ?, ?)"
        stored, held = self._db.row(query, *place, update.hospital) or ("", 0)
        if stored not in ("", header):
            raise MessageError("MSG_EQUIVOCATION", f"{update.hospital} sent two updates for one attempt", "Update")
        under_way = place == self._newest() and opened.round > self.last_round()
        if held or (stored and not under_way):
            return
        if not under_way or place != (update.round, update.attempt):
            raise MessageError("MSG_ROUND", "the update is of an attempt that is over", "Update")
        with disk():
            write(self._updates / _update_name(*place, update.hospital), envelope.payload)
            crash.point("server.update-file")
            row = (*place, update.hospital, header, envelope.signature, update.ledger_seq, 1)
            with self._db.transaction() as db:
                db.execute("INSERT OR REPLACE INTO updates VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        crash.point("server.update-row")

    def accepted(self, opened: RoundOpen) -> Iterator[Envelope]:
        """The updates held for an attempt, by hospital; each is read when it is asked for.

        One whose file is damaged or gone is left out, and counts as not accepted from then on.
        """
        query = """SELECT hospital, header, signature FROM updates
            WHERE held = 1 AND (round, attempt) = (?, ?) ORDER BY hospital"""
        for hospital, header, signature in self._db.rows(query, opened.round, opened.attempt):
            path = self._updates / _update_name(opened.round, opened.attempt, hospital)
            payload = _read(path, _parsed(header, Update))
            if payload is None:
                self.drop(opened, hospital)
            else:
                yield Envelope(kind="Update", header=header.encode(), signature=signature, payload=payload)

    def drop(self, opened: RoundOpen, hospital: str) -> None:
        """Delete an update that cannot be added, as if it had not been accepted. Its signed header stays."""
        with self._db.transaction() as db:
            row = (opened.round, opened.attempt, hospital)
            db.execute("UPDATE updates SET held = 0 WHERE (round, attempt, hospital) = (?, ?, ?)", row)
        self._delete_unheld()

    def certify(self, certificate: Certificate, payload: bytes) -> None:
        """Keep a round's encrypted sum and certificate; then delete the updates. Their signed headers stay.

        Raises:
            RunError: RUN_JOURNAL, the attempt is not the newest, or the round has another certificate.
        """
        place, header = (certificate.round, certificate.attempt), certificate.canonical().decode()
        stored = self._db.value("SELECT header FROM certificates WHERE round = ?", certificate.round)
        if stored == header:
            return
        if stored is not None or place != self._newest():
            raise problem(f"round {certificate.round} has another certificate, or another attempt is under way")
        with disk():
            write(self._sum_path(certificate.round), payload)
            crash.point("server.certificate-file")
            with self._db.transaction() as db:
                db.execute("INSERT INTO certificates VALUES (?, ?, ?)", (*place, header))
                db.execute("UPDATE updates SET held = 0 WHERE held = 1")
        crash.point("server.certificate-row")
        self._delete_unheld()

    def certificate(self, round: int) -> tuple[Certificate, bytes] | None:
        """A round's certificate and encrypted sum, for a hospital that missed it."""
        header = self._db.value("SELECT header FROM certificates WHERE round = ?", round)
        if header is None:
            return None
        certificate = _parsed(header, Certificate)
        payload = _read(self._sum_path(round), certificate)
        if payload is None:
            raise problem(f"the sum of round {round} is damaged or gone")
        return certificate, payload

    def last_round(self) -> int:
        """The newest round that has a certificate, 0 before the first."""
        return self._db.value("SELECT max(round) FROM certificates") or 0

    def note_applied(self, round: int, hospital: str, model_hash: str) -> None:
        """Note which model a hospital says it holds.

        Raises:
            ModelError: MODEL_DIVERGED, another hospital said otherwise.
        """
        query = "SELECT hospital FROM applied WHERE round = ? AND hospital <> ? AND model_hash <> ?"
        if self._db.value(query, round, hospital, model_hash):
            raise ModelError("MODEL_DIVERGED", f"{hospital} holds another model after round {round}", "model hash")
        with self._db.transaction() as db:
            db.execute("INSERT OR REPLACE INTO applied VALUES (?, ?, ?)", (round, hospital, model_hash))

    def model_hash(self, round: int) -> str:
        """Of the model that hospitals hold after a round, "" where none has said so."""
        return self._db.value("SELECT model_hash FROM applied WHERE round = ?", round) or ""

    def anchors(self) -> tuple[Signed, ...]:
        """The signed Update of each hospital with the highest ledger number: how long its ledger was, in its word."""
        # SQLite takes the other columns from the row of the maximum (sqlite.org/lang_select.html#bareagg).
        query = "SELECT header, signature, max(ledger_seq) FROM updates GROUP BY hospital ORDER BY hospital"
        return tuple(_signed(header, signature) for header, signature, _ in self._db.rows(query))

    # ---- key epochs

    def store_offer(self, number: int, leader: str, offer: Signed, blobs: Mapping[str, bytes]) -> None:
        """Keep a leader's offer of a key and the wrapped key of each member, until the epoch is sealed.

        Raises:
            MessageError: MSG_EQUIVOCATION, another offer for this epoch is there.
        """
        stored = self._db.value("SELECT header FROM offers WHERE number = ?", number)
        if stored not in (None, offer.header):
            raise MessageError("MSG_EQUIVOCATION", f"a second offer for key epoch {number}", "KeyOffer")
        if stored is None:
            with self._db.transaction() as db:
                row = (number, leader, offer.header, offer.signature)
                db.execute("INSERT INTO offers VALUES (?, ?, ?, ?)", row)
                rows = [(number, hospital, blob) for hospital, blob in blobs.items()]
                db.executemany("INSERT INTO wrapped VALUES (?, ?, ?)", rows)
        crash.point("server.offer-stored")

    def offer(self, number: int) -> Signed | None:
        """The leader's signed KeyOffer, or None."""
        row = self._db.row("SELECT header, signature FROM offers WHERE number = ?", number)
        return _signed(*row) if row else None

    def blob(self, number: int, hospital: str) -> bytes | None:
        """A member's wrapped key; None before the offer, and again once the epoch is sealed and the member has it."""
        return self._db.value("SELECT blob FROM wrapped WHERE (number, hospital) = (?, ?)", number, hospital)

    def note_ready(self, number: int, hospital: str, ready: Signed) -> None:
        """Keep a member's word that it holds the offered key.

        Raises:
            MessageError: MSG_EQUIVOCATION, it said something else before.
        """
        query = "SELECT header FROM readies WHERE (number, hospital) = (?, ?)"
        stored = self._db.value(query, number, hospital)
        if stored not in (None, ready.header):
            raise MessageError("MSG_EQUIVOCATION", f"{hospital} confirmed two keys for epoch {number}", "KeyReady")
        if stored is None:
            with self._db.transaction() as db:
                row = (number, hospital, ready.header, ready.signature)
                db.execute("INSERT INTO readies VALUES (?, ?, ?, ?)", row)
                _delete_wrapped(db)
            self._db.truncate_log()

    def readies(self, number: int) -> dict[str, Signed]:
        """The signed KeyReady of each member that has answered."""
        query = "SELECT hospital, header, signature FROM readies WHERE number = ? ORDER BY hospital"
        return {hospital: _signed(*signed) for hospital, *signed in self._db.rows(query, number)}

    def seal_epoch(self, number: int, key_id: str, members: tuple[str, ...], since_round: int) -> None:
        """Enough members have confirmed. A request for rotation is answered.

        Wrapped keys are deleted, but those of members that were away: they need them for the sums that they missed.

        Raises:
            RunError: RUN_JOURNAL, the epoch was sealed otherwise, or a later one is there.
        """
        epoch, current = EpochRow(number, key_id, tuple(members), since_round), self.current_epoch()
        if current and current != epoch and number <= current.number:
            raise problem(f"key epoch {number} was sealed otherwise, or is over")
        if current != epoch:
            with self._db.transaction() as db:
                row = (number, key_id, json.dumps(epoch.members), since_round)
                db.execute("INSERT INTO epochs VALUES (?, ?, ?, ?)", row)
                _delete_wrapped(db)
                db.execute("DELETE FROM meta WHERE name = 'rotation'")
        crash.point("server.epoch-sealed")
        self._db.truncate_log()

    def current_epoch(self) -> EpochRow | None:
        """The newest sealed epoch."""
        epochs = self.epochs()
        return epochs[-1] if epochs else None

    def epochs(self) -> list[EpochRow]:
        """All sealed epochs, oldest first."""
        rows = self._db.rows("SELECT number, key_id, members, since_round FROM epochs ORDER BY number")
        return [EpochRow(number, key_id, tuple(json.loads(names)), since) for number, key_id, names, since in rows]

    def newest_number(self) -> int:
        """Highest number of an epoch that was offered or sealed, 0 before the first."""
        query = "SELECT max(number) FROM (SELECT number FROM offers UNION SELECT number FROM epochs)"
        return self._db.value(query) or 0

    def note_leave(self, hospital: str, leave: Signed) -> None:
        """Keep a hospital's first word that it leaves."""
        with self._db.transaction() as db:
            row = (hospital, leave.header, leave.signature)
            db.execute("INSERT OR IGNORE INTO leaves VALUES (?, ?, ?)", row)
            db.execute("DELETE FROM wrapped WHERE hospital = ?", (hospital,))
        self._db.truncate_log()

    def leaves(self) -> dict[str, Signed]:
        """The signed Leave of each hospital that has left."""
        rows = self._db.rows("SELECT hospital, header, signature FROM leaves ORDER BY hospital")
        return {hospital: _signed(*signed) for hospital, *signed in rows}

    def request_rotation(self) -> None:
        """Ask for a new key epoch; `seal_epoch` answers."""
        with self._db.transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('rotation', 'requested')")

    def rotation_requested(self) -> bool:
        """Was a new key epoch asked for, and none sealed since?"""
        return self._db.value("SELECT value FROM meta WHERE name = 'rotation'") is not None

    # ---- inside

    def _prepare(self, study_hash: str) -> None:
        version, tables = self._db.value("PRAGMA user_version"), self._db.value("SELECT count(*) FROM sqlite_master")
        if version == tables == 0:
            if any(self._sums.iterdir()) or any(self._updates.iterdir()):
                raise problem("journal.db is gone, but rounds are stored beside it")
            with self._db.transaction() as db:
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('study', ?)", (study_hash,))
                db.execute(f"PRAGMA user_version = {FORMAT}")
        elif version != FORMAT:
            raise problem("it is of another version of fedmedgan")
        if self._db.value("PRAGMA quick_check") != "ok":
            raise problem("it is damaged")
        if self._db.value("SELECT value FROM meta WHERE name = 'study'") != study_hash:
            raise problem("it belongs to another study")
        self._db.truncate_log()

    def _delete_unheld(self) -> None:
        """Delete every file that no row speaks for: settled rounds, and what a crash left behind."""
        rows = self._db.rows("SELECT round, attempt, hospital FROM updates WHERE held = 1")
        held = {_update_name(*row) for row in rows}
        with disk():
            gone = [path for path in self._updates.iterdir() if path.name not in held]
            for path in (*gone, *self._sums.glob("*.tmp")):
                path.unlink()
            if gone:
                sync(self._updates)

    def _newest(self) -> tuple[int, int]:
        query = "SELECT round, attempt FROM attempts ORDER BY round DESC, attempt DESC LIMIT 1"
        return self._db.row(query) or (0, 0)

    def _sum_path(self, round: int) -> Path:
        return self._sums / f"round-{round:04d}.bin"


def _delete_wrapped(db: sqlite3.Connection) -> None:
    """Keys of offers that came to nothing, and keys of sealed epochs that their members have by now."""
    db.execute(
        """DELETE FROM wrapped WHERE number <= (SELECT max(number) FROM epochs) AND
        (number NOT IN (SELECT number FROM epochs) OR (number, hospital) IN (SELECT number, hospital FROM readies))"""
    )


def _read(path: Path, header: Update | Certificate) -> bytes | None:
    """The payload that a header announces, or None where the file is not exactly that."""
    try:
        payload = path.read_bytes() if path.stat().st_size == header.payload_bytes else b""
    except OSError:
        return None
    return payload if hashlib.sha256(payload).hexdigest() == header.payload_sha256 else None


def _update_name(round: int, attempt: int, hospital: str) -> str:
    return f"r{round:04d}-a{attempt:02d}-{hospital}.bin"


def _signed(header: str, signature: str) -> Signed:
    return Signed(header=header, signature=signature)


def _parsed(header: str, model: type[H]) -> H:
    try:
        return parse(header.encode(), model)
    except MessageError:
        raise problem(f"a stored {model.__name__} cannot be read") from None
