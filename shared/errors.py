"""Every error that fedmedgan reports, in one tree.

    FedMedGanError
    ├─ StudyError     the agreement cannot be used            CONFIG_*  STUDY_*
    ├─ DataError      a folder or a DICOM file cannot be used DATA_*    DICOM_*
    ├─ PrivacyError   the budget or the ledger says no        BUDGET_*  LEDGER_*  PRIVACY_*  AUDIT_*
    ├─ CryptoError    a ciphertext, key or sum is not right   HE_*      KEY_*     ROUND_*
    ├─ MessageError   a message is not what was agreed        MSG_*
    ├─ ModelError     weights cannot be trusted               MODEL_*
    └─ RunError       the machinery around a study failed     RUN_*

Each error has a stable code. The command line prints one line, ``error[CODE]: what; where; what to do``, and exits
with 2. `what` and `where` never contain a DICOM value, a pixel or a key; tests plant markers to check that.
"""

from __future__ import annotations

HINTS: dict[str, str] = {
    # the study
    "CONFIG_NOT_FOUND": "give the path of a study file; `fedmedgan study new` writes one",
    "CONFIG_EMPTY": "`fedmedgan study new` writes a commented example",
    "CONFIG_ENCODING": "save the file as UTF-8",
    "CONFIG_TOO_LARGE": "a study is a few kilobytes of TOML; check the path",
    "CONFIG_SYNTAX": "mend the TOML at that place",
    "CONFIG_UNKNOWN_KEY": "remove the key or mend its spelling; `fedmedgan study new` shows every key",
    "CONFIG_MISSING_KEY": "add the key; `fedmedgan study new` shows every key",
    "CONFIG_TYPE": "give a value of the type that `fedmedgan study new` shows",
    "CONFIG_RANGE": "choose a value inside the range",
    "CONFIG_NOT_FINITE": "give a finite number",
    "CONFIG_DELTA": "delta must be below one over the number of patients at every site",
    "STUDY_ROSTER": "list at least three sites with distinct names of a-z, 0-9 and -",
    "STUDY_OVERFLOW": "lower the bits or the weights: the sum must fit into one slot",
    "STUDY_HASH": "somebody changed the study after it was agreed; get it again from the other parties",
    "STUDY_KEYS": "every site needs its signing and exchange key in the study before it can run",
    "STUDY_SIGNATURE": "every hospital signs the study: `fedmedgan study sign`, then `study collect`",
    "STUDY_POLICY": "the hospital's policy.toml outranks the study; change one of the two, with its owner",
    # data
    "DATA_PATH": "give a folder that exists and can be read",
    "DATA_EMPTY": "`fedmedgan dataset check FOLDER` lists why each file was left out",
    "DATA_UNSAFE_PATH": "keep only regular files inside the data folder",
    "DATA_PATIENT_ID": "the unit of privacy is the patient: every image needs a Patient ID",
    "DATA_LABEL": "put images into one folder per class, or add labels.csv with the columns path,label",
    "DATA_TARGET": "labels.csv names each image's target, in the column `target`: a file of the same patient and shape",
    "DATA_CHANGED": "sign the study again for these patients, `fedmedgan study sign`, or put the earlier ones back",
    "DATA_TOO_FEW": "the study promises more patients at this site; correct `patients` in the study",
    "DATA_REFUSED": "the hospital's own events.jsonl says why; nobody else is told",
    "DATA_DUPLICATE": "remove the copy",
    "DATA_EVALUATION": "give finite images of one size, and several of every class, for training and for testing",
    "DICOM_NOT_DICOM": "only DICOM files with a preamble and file meta information are read",
    "DICOM_NOT_IMAGE": "files without pixels are skipped",
    "DICOM_TRUNCATED": "export the file again",
    "DICOM_MISSING": "export the file again with the image pixel module complete",
    "DICOM_GEOMETRY": "rows and columns must be positive",
    "DICOM_FRAMES": "the number of frames must be a positive integer",
    "DICOM_TOO_LARGE": "export a smaller file; the limits protect the memory of the machine that reads it",
    "DICOM_BITS": "bits allocated and stored must agree",
    "DICOM_PIXEL_LENGTH": "export the file again; its pixel data does not match rows, columns and frames",
    "DICOM_PIXEL_VALUES": "the image holds no information: constant, or not finite",
    "DICOM_RESCALE": "rescale slope and intercept must be finite and the slope not zero",
    "DICOM_WINDOW": "window centre and width must be finite and the width positive",
    "DICOM_PHOTOMETRIC": "only MONOCHROME1 and MONOCHROME2 are used for training",
    "DICOM_MODALITY": "the study lists the modalities that it takes",
    "DICOM_BURNED_IN": "images that say they carry burned-in text are refused",
    "DICOM_CODEC_MISSING": "install the codec extra that is named",
    "DICOM_DECODE": "export the file again, uncompressed if possible",
    "DICOM_SYNTAX": "export the file with a transfer syntax of the DICOM standard",
    "DICOM_NESTING": "sequences are nested deeper than any real file",
    "DICOM_VR": "export the file again; an element has an unknown value representation",
    # privacy
    "PRIVACY_RANGE": "noise multiplier, sampling rate, steps and delta must be finite and in range",
    "PRIVACY_ACCOUNTANTS": "two independent accountants disagree: report this as a bug",
    "PRIVACY_PROOF": "the update was thrown away; report this, look into it, then sign the study again",
    "PRIVACY_MODEL": "the network is not safe for per-patient gradients; use a listed recipe",
    "PRIVACY_NONE": "no hospital grants a study without privacy on its patients; set a privacy section in the study",
    "PRIVACY_RELEASE": "what was computed from patients stays at the hospital; release only what `may_leave` gives",
    "BUDGET_EXHAUSTED": "the round was not started; only the data owner can raise the budget",
    "LEDGER_CORRUPT": "restore the ledger from a backup and report it: it must never be edited",
    "LEDGER_LOCKED": "another process is using this ledger; wait for it to end",
    "LEDGER_WRITE": "make the ledger's folder writable and free some disk; nothing was trained",
    "LEDGER_SIGNATURE": "somebody else wrote into the ledger: restore it from a backup and report it",
    "LEDGER_STATE": "the records do not follow each other; report this as a bug",
    "LEDGER_ROLLBACK": "an older copy of the ledger was put back: restore the newest one, or ask the data owner",
    "LEDGER_FORK": "the ledger was continued twice from one point: ask the data owner which one is true",
    "LEDGER_BOOK": "give the budget book that this hospital's ledgers were begun under; never make a new one",
    "LEDGER_SAME_PATIENTS": "only the data owner can allow a second ledger on them: `fedmedgan site override`",
    "LEDGER_OVERRIDE": "the data owner signs anew, for just this ledger, these others and this reason",
    "LEDGER_OWNER": "each hospital's ledger is its own; give the right one",
    # an audit
    "AUDIT_FAILED": "each failure stands above with its code and hospital; docs/runbook.md says what to do about it",
    "AUDIT_EVIDENCE": "give a ledger, a hospital's home, an audit bundle, a run folder, or a folder of them",
    "AUDIT_SEAL": "ask the hospital for its bundle again; unpack it into a new folder",
    "AUDIT_NOISE": "less noise, or other noise, than was agreed: find out which program trained",
    "AUDIT_PROOF": "the round's own tests say that its noise, clipping or sampling was not right: look into it",
    "AUDIT_UNCHARGED": "an update was used that the ledger does not know: ask the hospital what trained it",
    "AUDIT_CEILING": "more was spent than the ceiling allows: the data owner decides what follows",
    "AUDIT_SAME_PATIENTS": "ask the data owner, who alone can allow a second ledger on the same patients",
    # cryptography
    "HE_SECRET_AT_SERVER": "the server must never hold a key; remove it from this machine",
    "HE_PARAMS_MISMATCH": "every party must run the same version of fedmedgan",
    "HE_CT_EMPTY": "the message carries no ciphertext; send it again",
    "HE_CT_SIZE": "the message was cut or padded on the way; send it again",
    "HE_CT_HASH": "the message was damaged or altered on the way; send it again",
    "HE_CT_STUDY": "the ciphertext belongs to another study, round or key",
    "HE_SHAPE": "the number of ciphertexts does not fit the model of this study",
    "HE_RANGE": "a value does not fit its slot; report this as a bug",
    "HE_NOT_FINITE": "the update holds NaN or infinity: lower the learning rates",
    "HE_WORKER": "the process that adds ciphertexts ended; the round is added again from the stored updates",
    "KEY_MISSING": "the key file is not there; `fedmedgan site doctor` explains how to get it",
    "KEY_PERMISSIONS": "a private key must be readable by its owner alone: chmod 600",
    "KEY_FORMAT": "this is not a key of the expected kind",
    "KEY_PASSPHRASE": "FEDMEDGAN_PASSPHRASE_FILE must name a file of mode 0600 that holds the passphrase of the keys",
    "KEY_UNWRAP": "ask the hospital that made the key epoch to make a new one",
    "KEY_CONFIRM": "hospitals hold different keys; no round was started: make a new key epoch",
    "KEY_STOPPED": "find out who altered the sums; then a person allows a new key: `fedmedgan site rotate`",
    "KEY_EPOCH": "not the key epoch that comes next: the coordinator sends the right one; never put an old key back",
    "ROUND_REJECTED": "the sum is not what the cohort sent; the model was left as it was",
    # messages
    "MSG_SIGNATURE": "the message was not signed by the hospital that it names",
    "MSG_FORMAT": "sender and receiver must run the same version of fedmedgan",
    "MSG_TOO_LARGE": "the message is larger than the study allows",
    "MSG_STUDY": "the message belongs to another study",
    "MSG_ROUND": "the message belongs to another round or attempt",
    "MSG_KEY": "the message was made with another key",
    "MSG_SENDER": "the sender is not a member of this study or this round",
    "MSG_REPLAY": "this hospital's update was already counted",
    "MSG_EQUIVOCATION": "a hospital sent two different messages where one counts; ask it why before going on",
    # models
    "MODEL_NOT_FINITE": "training diverged: lower the learning rates",
    "MODEL_HASH": "the checkpoint was damaged or altered; it was not loaded",
    "MODEL_MISMATCH": "the weights belong to another network or study",
    "MODEL_DIVERGED": "hospitals hold different models; the run was stopped",
    # the run
    "RUN_USAGE": "`fedmedgan --help` shows the commands and their options",
    "RUN_STATE": "restore the file from a backup, or look into what changed it; it was not guessed",
    "RUN_PATH": "choose a folder that is new or empty",
    "RUN_JOURNAL": "one coordinator at a time, on a disk with room; otherwise restore the folder from its backup",
    "RUN_QUORUM": "fewer than three hospitals took part; start again when they are back",
    "RUN_DEVICE": 'choose device = "cpu", or install the driver',
    "RUN_EXTRA": "install the extra that is named",
    "RUN_FLOWER": "see the log in the run folder",
    "RUN_RECORD": "the run folder was edited or damaged, or is not of this version; simulate again",
    "RUN_NODE": "the hospital's process ended; its SuperNode's log says why",
    "RUN_TIMEOUT": "the hospital did not answer in time; it may come back in the next round",
    "RUN_LEFT": "this hospital has left the study and takes no further part",
    "RUN_BUNDLE": "the coordinator must start the study with `fedmedgan server start`; nothing of this bundle was run",
    "RUN_CRASHED": "an unforeseen error; the hospital's own events.jsonl holds it",
    # the way to the coordinator, and this machine, as `site doctor` sees them
    "KIT_CONFIG": "mend consortium.toml, or ask for a kit that was made anew",
    "KIT_CHANGED": "get the kit again from whoever made it, and compare the fingerprint of ca.crt",
    "KIT_PATH": "give the folder that `fedmedgan kit make` wrote",
    "NET_DNS": "mend `host` of the kit's site.toml, or ask the network team to make the name known",
    "NET_PORT": "ask the network team to let this machine reach that host and port, or the coordinator to start it",
    "NET_TLS": "that is not the consortium's server: a proxy that opens TLS must let it through, or get the kit again",
    "NET_HEALTH": "the SuperLink is not running well: tell the coordinator",
    "NET_CLOCK": "set this machine's clock: timedatectl set-ntp true",
    "NET_KEY": "the coordinator has to register supernode.pub of this kit: `flwr supernode register`",
    "SITE_DISK": "free some disk, on a local file system that the hospital's user may write to",
    "SITE_GPU": "end what else uses the GPU, or choose device = 'cpu' in policy.toml",
    "SITE_DATA": "`fedmedgan dataset check FOLDER` says for each file why it cannot be used",
}
"""code -> what to do about it. A code is never used for a second meaning."""


class FedMedGanError(Exception):
    """An error with a code, what happened, where, and what to do.

    Args:
        code: a key of `HINTS`.
        what: one clause, no trailing stop; names no patient data.
        where: the file, key or party concerned; names no patient data.
        hint: replaces the code's general hint where a better one is known.
    """

    def __init__(self, code: str, what: str, where: str = "", hint: str = "") -> None:
        self.code, self.what, self.where = code, what, where
        self.hint = hint or HINTS[code]
        super().__init__(self.line())

    def line(self) -> str:
        """``error[CODE]: what; where; what to do``, on one line whatever the parts contain."""
        parts = [self.what, self.where, self.hint]
        return " ".join(f"error[{self.code}]: {'; '.join(p for p in parts if p)}".split())

    def __reduce__(self) -> tuple:  # Ray and process pools carry errors between processes
        return (type(self), (self.code, self.what, self.where, self.hint))


class StudyError(FedMedGanError):
    """The agreement cannot be used."""


class DataError(FedMedGanError):
    """A folder or a DICOM file cannot be used."""


class PrivacyError(FedMedGanError):
    """The budget or the ledger says no."""


class CryptoError(FedMedGanError):
    """A ciphertext, a key or a decrypted sum is not right."""


class MessageError(FedMedGanError):
    """A message is not what was agreed."""


class ModelError(FedMedGanError):
    """Weights cannot be trusted."""


class RunError(FedMedGanError):
    """The machinery around a study failed."""
