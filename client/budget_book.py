"""The budget book of one hospital: which of its ledgers touch the same patients, so that all of them share one budget.

A hospital may have several homes (several consortia, several studies), each with a ledger. A patient who is in two of
them pays for both, so neither ledger alone says what that patient has paid. The book is a folder of the HOSPITAL,
beside its homes and outside of each of them:

    book.key              32 random bytes (mode 0600), made once      shared/secure_sum/key_file.py
    ledgers/<id>.json     one entry for each ledger: where it lies, how long it was, every patient it ever touched
    index.json            which entries there are
    book.lock             held while the book is read or changed

Patients' pseudonyms are keyed with the book's key, so they are the same in every home of the hospital and mean nothing
elsewhere. Entries and index are sealed with HMAC-SHA256 under the book's key and replaced as a whole. Nothing of the
book ever leaves the hospital but its public id (a hash of the key) and the commitments that `commitment` makes.

A ledger is entered before it may open a study. It is refused where another ledger touched one of its patients, unless
the data owner signed that the two may stand side by side (shared/privacy/data_owner.py), in either ledger. From then on
each one's budget holds what the other spent. Reading the other's spending and writing one's own reservation is ONE
change: do both inside `locked`, or two homes could spend the same rest of the budget at once.

The seals find damage and slips. They do not stop a hospital that means to cheat: it holds the key, and can make a new
book. Then all its new ledgers name another book (`begin`), which auditors and peers of both studies see.

    case                                                 result
    no patient                                           DATA_EMPTY
    one of 100 patients is known to another ledger       LEDGER_SAME_PATIENTS
    the same patients again in the same ledger           nothing new
    patients who left the data folder                    stay in the entry: what was spent on them stays spent
    override of other ledgers, for another reason, or
      signed by another key; no data owner's key         LEDGER_SAME_PATIENTS
    the book's key is lost, entries are left             LEDGER_BOOK, no new key is made
    book deleted and made anew, or another hospital's    LEDGER_BOOK for every ledger begun under the old one
    book copied by a hospital that has no ledger yet     not seen here; its ledgers name the other hospital's book
    a ledger with a study that the book does not know    LEDGER_BOOK
    a known ledger at another path (a copy of it too)    LEDGER_BOOK; a symbolic link at the old path is enough
    book and homes moved or copied together              as before: paths are relative to the book
    another ledger at a known path (the old one gone)    LEDGER_BOOK
    book and homes moved, or mounted elsewhere, together nothing: paths are kept relative to the book
    book and homes copied together                       not seen here; whoever sees both ledgers: LEDGER_FORK
    this ledger is shorter than the book saw it          LEDGER_ROLLBACK, LEDGER_FORK
    a ledger of the same patients is gone, moved,
      unreadable, shorter, damaged, of another book      LEDGER_BOOK: what it spent is not known
    entry or index damaged, renamed, of another book     LEDGER_BOOK
    entry gone                                           LEDGER_BOOK
    the whole book as it was some time ago               seen only by ledgers that were entered since
    group or others may use book.key                     KEY_PERMISSIONS
    another process changes the book                     waited for, one minute at most; then LEDGER_LOCKED
    the book lies inside a home                          LEDGER_BOOK: it would be deleted with it
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmedgan.shared.errors import CryptoError, DataError, PrivacyError
from fedmedgan.shared.privacy.data_owner import allowed_by_owner
from fedmedgan.shared.privacy.events import TrainingSteps, merge
from fedmedgan.shared.privacy.history import History
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.privacy.records import canonical
from fedmedgan.shared.secure_sum import key_file

KEY, LEDGERS, INDEX, LOCK = "book.key", "ledgers", "index.json", "book.lock"
LOCK_SECONDS = 60.0
"""How long another process is waited for; a round's reservation holds the book for a few seconds."""
_PUT_BACK = (
    "put the ledger of that home back where it was, the newest copy of it; the data owner decides if there is none"
)
_RESTORE = "restore the budget book from its newest backup; never edit it or make a new one"


@dataclass(frozen=True)
class Entry:
    """One ledger of this hospital."""

    ledger: str
    """Its id, 64 hex digits."""
    hospital: str
    """The hospital's name in that ledger."""
    path: str
    """Of ledger.jsonl, relative to the book's folder: book and homes may be mounted or moved together."""
    since: str
    """When it was entered, UTC."""
    seq: int
    head: str
    """Number and hash of its newest record when the book saw it last."""
    pseudonyms: frozenset[str] = field(repr=False)
    """Every patient it ever touched."""


class BudgetBook:
    """The hospital's book; `open` it. Printing it shows no key. Not thread-safe: open it once for each thread.

    Args:
        folder: of the book.
        key: 32 bytes.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self.folder, self._key, self._held = folder, key, False
        self.id = hashlib.sha256(b"fedmedgan budget book 1\n" + key).hexdigest()
        """Public id, 64 hex digits."""
        self.pseudonym_key = hmac.digest(key, b"pseudonyms", "sha256")
        """32 bytes: the key under which all homes of the hospital name their patients."""

    @classmethod
    def open(cls, folder: Path, *, create: bool = False, passphrase: bytes | None = None) -> BudgetBook:
        """Open a hospital's book.

        Args:
            create: make it where there is none.
            passphrase: of the key; None: that of the environment, if there is one.

        Raises:
            PrivacyError: LEDGER_BOOK, there is no book, or its key is gone; LEDGER_WRITE; LEDGER_LOCKED.
            CryptoError: KEY_PERMISSIONS, KEY_PASSPHRASE, KEY_FORMAT, KEY_MISSING (not a folder). RunError: RUN_PATH.
        """
        key = _read_key(folder, passphrase)
        if key is None and create:
            with _writing(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                (folder / LEDGERS).mkdir(mode=0o700, exist_ok=True)
            with _locked(folder):
                key = _read_key(folder, passphrase) or _make_key(folder, passphrase)
        if key is None:
            raise PrivacyError("LEDGER_BOOK", "there is no budget book", str(folder))
        return cls(folder, key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the book for this process; may be nested. Raises PrivacyError LEDGER_LOCKED, LEDGER_WRITE."""
        if self._held:
            yield
            return
        with _locked(self.folder):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def commitment(self, pseudonyms: Iterable[str]) -> str:
        """Keyed hash over a set of patients, 64 hex digits. It says nothing to whoever does not have the book's key.

        Raises:
            DataError: DATA_EMPTY. PrivacyError: LEDGER_BOOK, a pseudonym is not 32 hex digits.
        """
        named = "\n".join(sorted(_checked(pseudonyms)))
        return hmac.new(self._key, b"dataset\n" + named.encode(), "sha256").hexdigest()

    def enter(self, history: History, path: Path, pseudonyms: Iterable[str], *, owner_key: str = "") -> Entry:
        """Enter a ledger, or more patients of one, before it opens a study on them.

        Args:
            history: of the ledger, which was begun under this book.
            path: of its file.
            pseudonyms: of all patients in the hospital's data folder.
            owner_key: public key of the data owner, 64 hex digits, from policy.toml; empty where there is none.

        Raises:
            PrivacyError: LEDGER_SAME_PATIENTS, LEDGER_BOOK, LEDGER_ROLLBACK, LEDGER_FORK; nothing was changed.
            DataError: DATA_EMPTY.
        """
        patients, path = _checked(pseudonyms), Path(os.path.abspath(path))
        if self.folder.resolve().is_relative_to(path.parent.resolve()):
            raise self._refused(
                "the book lies inside a home", hint="keep it beside the homes: `budget_book` in policy.toml"
            )
        with self.locked():
            entries = self._entries()
            known = entries.get(history.ledger_id)
            if known:
                self.check(history, path)
                patients |= known.pseudonyms
            elif history.studies:
                raise self._refused("a ledger with a study is not known to the book", hint=_RESTORE)
            elif any(_same_file(self._place(entry), path) for entry in entries.values()):
                raise self._refused("another ledger was entered from this file", hint=_PUT_BACK)
            self._check_book(history)
            self._refuse_unless_allowed(history, _overlapping(entries, history.ledger_id, patients), owner_key)
            if known:
                entry = replace(known, seq=history.seq, head=history.head, pseudonyms=patients)
            else:
                since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                place = os.path.relpath(path, self.folder.resolve())
                entry = Entry(history.ledger_id, history.hospital, place, since, history.seq, history.head, patients)
            self._write(entry)
            self._write_index({*entries, entry.ledger})  # last: a crash leaves an entry too many, never one too few
            return entry

    def check(self, history: History, path: Path) -> Entry:
        """Is this the ledger that the book knows, at its place, and no shorter than it was?

        Raises:
            PrivacyError: LEDGER_BOOK, LEDGER_ROLLBACK, LEDGER_FORK.
        """
        self._check_book(history)
        with self.locked():
            entry = self._own(history.ledger_id)
        if entry.hospital != history.hospital:
            raise self._refused("the ledger was entered for another hospital")
        if not _same_file(self._place(entry), Path(os.path.abspath(path))):
            hint = "move the home back, or leave a symbolic link to it at the old place; a copy is another ledger"
            raise self._refused("the ledger was entered from another place", entry.path, hint)
        history.check_anchor(entry.seq, entry.head)
        return entry

    def saw(self, history: History) -> None:
        """Remember how long a ledger is now. Call it after every record that its own home wrote.

        Raises:
            PrivacyError: LEDGER_BOOK, LEDGER_ROLLBACK, LEDGER_FORK.
        """
        self._check_book(history)
        with self.locked():
            entry = self._own(history.ledger_id)
            history.check_anchor(entry.seq, entry.head)
            if history.seq > entry.seq:
                self._write(replace(entry, seq=history.seq, head=history.head))

    def others(self, ledger_id: str, pseudonyms: Iterable[str]) -> tuple[Entry, ...]:
        """The other ledgers with at least one of these patients, by id. Raises PrivacyError LEDGER_BOOK."""
        with self.locked():
            return _overlapping(self._entries(), ledger_id, _checked(pseudonyms))

    def spent_elsewhere(self, ledger_id: str) -> list[TrainingSteps]:
        """What all other ledgers spent that ever touched a patient of this one, read and verified now.

        For every patient of this ledger it holds all that was spent on that patient elsewhere; for most of them more.

        Raises:
            PrivacyError: LEDGER_BOOK; PRIVACY_RANGE, more than 10 million steps of one kind.
        """
        with self.locked():
            return merge(event for entry in self.beside(ledger_id) for event in self._read(entry).spent())

    def ceiling(self, history: History, policy: float) -> float:
        """The lowest ceiling that holds for these patients, over all their studies.

        Args:
            history: of this home's ledger; what it has on record holds until a study is signed again.
            policy: `max_epsilon` of this home now.

        Raises:
            PrivacyError: LEDGER_BOOK.
        """
        with self.locked():
            others = [self._read(entry).total_ceiling for entry in self.beside(history.ledger_id)]
            return min(policy, history.total_ceiling, *others)

    def beside(self, ledger_id: str) -> tuple[Entry, ...]:
        """The other ledgers that ever touched a patient of this one, by id. Raises PrivacyError LEDGER_BOOK."""
        with self.locked():
            return _overlapping(self._entries(), ledger_id, self._own(ledger_id).pseudonyms)

    def _refuse_unless_allowed(self, history: History, others: tuple[Entry, ...], owner_key: str) -> None:
        """The data owner's word for two ledgers may stand in either of them: in that which came second."""
        allowed = allowed_by_owner(history, owner_key)
        refused = [
            entry
            for entry in others
            if entry.ledger not in allowed and history.ledger_id not in allowed_by_owner(self._read(entry), owner_key)
        ]
        if refused:
            named = ", ".join(f"{entry.ledger[:12]} of {entry.hospital}" for entry in refused)
            raise PrivacyError(
                "LEDGER_SAME_PATIENTS", f"patients of this ledger are known to {named}", str(self.folder)
            )

    def _check_book(self, history: History) -> None:
        if history.book != self.id:
            raise self._refused("the ledger was begun under another budget book")

    def _read(self, entry: Entry) -> History:
        """Another home's ledger, verified: the record that the book saw last names it, and all that is before it."""
        try:
            history = read_ledger(self._place(entry))
            history.check_anchor(entry.seq, entry.head)
        except PrivacyError as error:
            what = f"a ledger of the same patients cannot be counted: {error.code}, {error.what}"
            raise self._refused(what, entry.path, _PUT_BACK) from None
        return history

    def _own(self, ledger_id: str) -> Entry:
        path = self._entry_file(ledger_id)
        if not path.exists():
            raise self._refused("the ledger was never entered in the book", hint=_RESTORE)
        return self._entry(path)

    def _entries(self) -> dict[str, Entry]:
        """All entries by the ledger's id."""
        names = self._unsealed(self.folder / INDEX)["ledgers"]
        entries = [self._entry(path) for path in sorted((self.folder / LEDGERS).glob("*.json"))]
        if missing := set(names) - {entry.ledger for entry in entries}:
            raise self._refused(f"entries of the book are gone: {', '.join(sorted(missing))}", hint=_RESTORE)
        return {entry.ledger: entry for entry in entries}

    def _place(self, entry: Entry) -> Path:
        return Path(os.path.normpath(self.folder.resolve() / entry.path))

    def _entry_file(self, ledger_id: str) -> Path:
        return self.folder / LEDGERS / f"{ledger_id}.json"

    def _entry(self, path: Path) -> Entry:
        values = self._unsealed(path)
        try:
            return Entry(**{**values, "pseudonyms": frozenset(values["pseudonyms"])})
        except (TypeError, KeyError):
            raise self._refused("an entry is not of this version", path.name) from None

    def _write(self, entry: Entry) -> None:
        values = asdict(entry) | {"pseudonyms": sorted(entry.pseudonyms)}
        self._write_sealed(self._entry_file(entry.ledger), values)

    def _write_index(self, ledgers: Iterable[str]) -> None:
        self._write_sealed(self.folder / INDEX, {"ledgers": sorted(ledgers)})

    def _write_sealed(self, path: Path, body: dict[str, Any]) -> None:
        with _writing(self.folder):
            _replace(path, self._sealed(path.name, body))

    def _unsealed(self, path: Path) -> dict[str, Any]:
        try:
            raw = path.read_bytes()
            body: dict[str, Any] = json.loads(raw)["body"]
            if hmac.compare_digest(self._sealed(path.name, body), raw):
                return body
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        what = "a file of the budget book is gone, damaged, or of another book"
        raise self._refused(what, path.name, _RESTORE)

    def _sealed(self, name: str, body: dict[str, Any]) -> bytes:
        """The name is sealed with the content, so no entry can stand in the place of another."""
        text = canonical(body)
        seal = hmac.new(self._key, b"entry\n" + name.encode() + b"\n" + text, "sha256").hexdigest()
        return b'{"body":' + text + b',"seal":"' + seal.encode() + b'"}\n'

    def _refused(self, what: str, where: str = "", hint: str = "") -> PrivacyError:
        return PrivacyError("LEDGER_BOOK", what, where or str(self.folder), hint)


def _checked(pseudonyms: Iterable[str]) -> frozenset[str]:
    named = frozenset(pseudonyms)
    if not named:
        raise DataError("DATA_EMPTY", "there is no patient to be entered in the budget book")
    if not all(re.fullmatch("[0-9a-f]{32}", name) for name in named):
        raise PrivacyError("LEDGER_BOOK", "a pseudonym is not 32 hex digits", hint="report this as a bug")
    return named


def _overlapping(entries: dict[str, Entry], ledger_id: str, patients: frozenset[str]) -> tuple[Entry, ...]:
    others = (entry for name, entry in sorted(entries.items()) if name != ledger_id)
    return tuple(entry for entry in others if not patients.isdisjoint(entry.pseudonyms))


def _same_file(known: Path, path: Path) -> bool:
    try:
        return known == path or known.samefile(path)
    except OSError:
        return False


def _read_key(folder: Path, passphrase: bytes | None) -> bytes | None:
    values = key_file.read(folder / KEY, "budget-book", passphrase)
    if values is None:
        return None
    try:
        key = base64.b64decode(values["key"], validate=True)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError):
        key = b""
    if len(key) != 32:
        raise CryptoError("KEY_FORMAT", "the key of the budget book is not of 32 bytes", KEY)
    return key


def _make_key(folder: Path, passphrase: bytes | None) -> bytes:
    """Index first, key last: a crash leaves no book rather than half a book."""
    if any((folder / LEDGERS).glob("*.json")):
        raise PrivacyError("LEDGER_BOOK", "the key of the budget book is gone", str(folder), hint=_RESTORE)
    key = secrets.token_bytes(32)
    BudgetBook(folder, key)._write_index([])
    key_file.write(folder / KEY, "budget-book", {"key": base64.b64encode(key).decode()}, passphrase)
    return key


def _replace(path: Path, data: bytes) -> None:
    """Replace a file as a whole, mode 0600. (checkpoint.py does the same, but needs torch; `site doctor` does not.)"""
    temporary = path.with_name(path.name + ".tmp")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with _writing(folder):
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise PrivacyError("LEDGER_LOCKED", "another process is using the budget book", str(folder))
            time.sleep(0.02)
        yield
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the budget book cannot be written ({error.strerror or type(error).__name__})"
        raise PrivacyError("LEDGER_WRITE", what, str(folder)) from None
