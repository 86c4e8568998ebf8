"""The hospital's Flower app: takes a message, answers it, and lets no exception text out.

Deployed, Flower tells where the hospital's home folder is: ``--node-config 'home="/srv/fedmedgan"'``. That setting is
the hospital's own; nothing that the coordinator sends can change it.
"""

from __future__ import annotations

import fcntl
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmedgan.client.cycle import Hospital
from fedmedgan.shared.errors import FedMedGanError, RunError
from fedmedgan.shared.eventlog import EventLog
from fedmedgan.shared.messages import Certificate, Envelope, EpochOpen, EpochStart, KeyGrant, Refusal, Roll, RoundOpen

MAX_PAYLOAD_BYTES = 4 << 30


def make_app(
    home_of: Callable[[Context], Path], *, insecure_seed: int | None = None, mods: list[Callable] | None = None
) -> ClientApp:
    """A ClientApp whose hospitals live in the folders that `home_of` names."""
    app = ClientApp(mods=mods)

    def answer(message: Message, context: Context, reply: Callable[[Hospital, Envelope], Envelope]) -> Message:
        try:
            home = home_of(context)
            with _one_at_a_time(home):
                sealed = _answer(home, message, reply)
        except Exception as error:  # without keys or study nobody can sign a refusal; Flower would send the text on
            raise RuntimeError(error.code if isinstance(error, FedMedGanError) else "RUN_CRASHED") from None
        return Message(sealed.to_record(), reply_to=message)

    def _answer(home: Path, message: Message, reply: Callable[[Hospital, Envelope], Envelope]) -> Envelope:
        log = EventLog(home / "events.jsonl")
        hospital = None
        try:
            hospital = Hospital(home, insecure_seed=insecure_seed)
            return reply(hospital, Envelope.from_record(message.content, MAX_PAYLOAD_BYTES))
        except FedMedGanError as error:
            log.write("refused", error=error.line())
            if hospital is None:
                raise
            return refuse(hospital, error.code)
        except Exception:  # the text of an unknown error may hold patient data: it stays here, in the hospital's log
            log.write("failed", error=traceback.format_exc())
            if hospital is None:
                raise
            return refuse(hospital, "RUN_CRASHED")

    @app.query()
    def roll(message: Message, context: Context) -> Message:
        return answer(message, context, lambda h, envelope: h.present(envelope.open(Roll, h.study)))

    @app.train("key")
    def key_epoch(message: Message, context: Context) -> Message:
        def reply(hospital: Hospital, envelope: Envelope) -> Envelope:
            if envelope.kind == EpochOpen.__name__:
                return hospital.offer_key(envelope.open(EpochOpen, hospital.study))
            if envelope.kind == KeyGrant.__name__:
                return hospital.take_key(envelope.open(KeyGrant, hospital.study), envelope.payload)
            return hospital.start_key(envelope.open(EpochStart, hospital.study))

        return answer(message, context, reply)

    @app.train()
    def local_update(message: Message, context: Context) -> Message:
        def reply(hospital: Hospital, envelope: Envelope) -> Envelope:
            return hospital.local_update(envelope.open(RoundOpen, hospital.study))

        return answer(message, context, reply)

    @app.train("apply")
    def apply_sum(message: Message, context: Context) -> Message:
        def reply(hospital: Hospital, envelope: Envelope) -> Envelope:
            certificate = envelope.open(Certificate, hospital.study)
            return hospital.apply_sum(certificate, envelope.payload, envelope.shown())

        return answer(message, context, reply)

    return app


@contextmanager
def _one_at_a_time(home: Path) -> Iterator[None]:
    """Two messages for one hospital are answered one after the other: the second sees what the first wrote."""
    with (home / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def refuse(hospital: Hospital, code: str) -> Envelope:
    """A signed no: a code goes out, the words stay in. What is wrong with the data is one code: it may hang on one
    patient."""
    public = "DATA_REFUSED" if code.startswith(("DATA_", "DICOM_", "CONFIG_")) else code
    header = Refusal(study=hospital.study.hash, hospital=hospital.site.name, code=public)
    return Envelope.seal(header, hospital.keys.signing)


def home_from_node_config(context: Context) -> Path:
    """The hospital's home folder as its own SuperNode was told.

    Raises:
        RunError: RUN_PATH.
    """
    home = context.node_config.get("home")
    if not isinstance(home, str):
        raise RunError("RUN_PATH", "the SuperNode was not told the hospital's home folder", "--node-config home=")
    return Path(home)


app = make_app(home_from_node_config)
