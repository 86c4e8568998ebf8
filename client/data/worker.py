"""The process in which files are decoded: ``python -m fedmedgan.client.data.worker SOCKET``.

Decoders are C and Rust, and hospitals feed them what any scanner wrote. So they run here: address space and
time are limited, a crash takes one file with it, and whatever the libraries print goes nowhere. `pool` is the
other side. Answers are JSON and raw float16, never pickle: what a subverted decoder sends cannot become code
in the parent.

No value of a header leaves this process, but for keyed hashes (HMAC-SHA256) of Patient ID and SOP Instance
UID.
"""

from __future__ import annotations

import hmac
import json
import resource
import signal
import sys
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection

import numpy as np

from fedmedgan.client.data import dicom, grayscale
from fedmedgan.client.data.dicom import DicomImage
from fedmedgan.client.data.header import Header, Malformed
from fedmedgan.client.data.limits import Limits
from fedmedgan.shared.errors import DataError

READY = b"ready"


@dataclass(frozen=True)
class Task:
    """What a worker does with every file."""

    size: int
    modalities: frozenset[str]
    key: bytes
    limits: Limits
    targets: bool = False
    """Files are targets of images: a frame of zeros is then an empty mask."""

    @classmethod
    def from_json(cls, text: bytes) -> Task:
        values = json.loads(text)
        return cls(
            values["size"],
            frozenset(values["modalities"]),
            bytes.fromhex(values["key"]),
            Limits(**values["limits"]),
            values["targets"],
        )


@dataclass
class Answer:
    """What a worker says about one file; `images` follows it as raw bytes."""

    outcome: str
    code: str = ""
    reason: str = ""
    shape: tuple[int, ...] = ()
    pixel_sha256: str = ""
    patient: str = ""
    """Pseudonym of the patient, "" where there is none."""
    instance: str = ""
    """Keyed hash of the SOP Instance UID, "" where there is none."""
    places: tuple[int, ...] = ()
    """Of the frames that became training images, ascending."""
    images: np.ndarray | None = None
    """Training images, float16 (N, S, S)."""

    def to_json(self) -> bytes:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "images"}
        return json.dumps({**values, "frames": 0 if self.images is None else len(self.images)}).encode()


def examine(path: str, task: Task) -> Answer:
    """Read one file and say what it is and whether it can be used. Never raises."""
    answer = Answer("refused")
    try:
        image = dicom.read(dicom.read_bytes(path, task.limits), task.limits)
        answer = Answer("decoded", shape=image.pixels.shape, pixel_sha256=image.sha256())
        _use(image, task, answer)
    except DataError as error:
        answer.code, answer.reason = error.code, error.what
        if error.code == "DICOM_NOT_IMAGE":
            answer.outcome = "skipped"
    except MemoryError:
        answer.code, answer.reason = "DICOM_TOO_LARGE", "the file needs more memory than the limit"
    except Exception:
        answer.code, answer.reason = "DICOM_DECODE", "the file cannot be decoded"
    return answer


def _use(image: DicomImage, task: Task, answer: Answer) -> None:
    """Fill in the training images of a decoded file, or raise the DataError that says why it is not used."""
    header = image.header
    if _text(header, dicom.BURNED_IN) not in ("", "NO"):
        raise DataError("DICOM_BURNED_IN", "the file says that text is burned into the image")
    if image.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise DataError("DICOM_PHOTOMETRIC", "the image is not grayscale")
    if _text(header, dicom.MODALITY) not in task.modalities:
        raise DataError("DICOM_MODALITY", "its modality is not taken")
    answer.patient = _pseudonym(header, dicom.PATIENT_ID, task.key)
    if not answer.patient:
        raise DataError("DATA_PATIENT_ID", "the file names no patient")
    answer.instance = _pseudonym(header, dicom.SOP_INSTANCE_UID, task.key)
    frames = grayscale.to_frames(image, task.size, task.limits.frames_used, masks=task.targets)
    answer.places = tuple(frames)
    answer.images = np.concatenate(list(frames.values())).astype(np.float16)


def _text(header: Header, tag: int) -> str:
    try:
        return header.text(tag) or ""
    except Malformed:
        return "malformed"


def _pseudonym(header: Header, tag: int, key: bytes) -> str:
    """Keyed hash of an identifier, so that equal ones can be found without keeping one."""
    try:
        value = (header.raw(tag) or b"").strip(b"\0 ")
    except Malformed:
        return ""
    domain = tag.to_bytes(4, "big")
    return hmac.digest(key, domain + value, "sha256")[:16].hex() if value else ""


def serve(connection: Connection) -> None:
    """Answer for one path after the other, until the parent closes the connection."""
    task = Task.from_json(connection.recv_bytes())
    connection.send_bytes(READY)
    while True:
        path = json.loads(connection.recv_bytes())
        # The default action of this signal ends the process even inside a decoder that hangs.
        signal.setitimer(signal.ITIMER_REAL, task.limits.seconds)
        answer = examine(path, task)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(answer.to_json())
        if answer.images is not None:
            connection.send_bytes(answer.images.tobytes())


def main() -> None:
    dicom.silence_pydicom()
    np.seterr(all="ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers itself
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold pixels and names
    memory = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        sys.exit(0)


if __name__ == "__main__":
    main()
