"""The coordinator's SuperLink, and the run of the study on it, kept going until the study has ended.

what happens                                        what follows
the SuperLink dies                                  started again, then a new run
the run's process dies (kill, power, memory)        a new run: the coordinator goes on from its journal
the run stays pending: Flower's executor died       the SuperLink is started again; Flower says all is well then
fewer than three hospitals are there (RUN_QUORUM)   a new run after a pause: they may come back
another error of ours (STUDY_*, MODEL_*, ...)       stop: a person has to look
ten runs die without one round between them         stop: a person has to look
``run_closed`` for good: rounds, converged, budget  stop, well
SIGTERM, Ctrl-C                                     stop; the next start goes on from the journal

A run of Flower is never resumed by Flower, and nothing in it is worth keeping: the journal holds the study.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fedmedgan.deploy import coordinator, processes
from fedmedgan.deploy.coordinator import KIT, LOCK
from fedmedgan.deploy.environment import BIN, environment
from fedmedgan.deploy.kit_config import Consortium
from fedmedgan.shared import bundle
from fedmedgan.shared.errors import RunError

NAME = "consortium"
"""How Flower's own configuration calls this SuperLink."""
UP_SECONDS = 90.0
PENDING_SECONDS = 180.0
"""A run that has not begun by then never will: `flower-superexec` died and nothing starts it again."""
LOOK_SECONDS = 30.0
"""Without an event for so long, Flower is asked for the run; its command takes seconds of CPU."""
MAX_SILENT = 3
"""Questions that may go without an answer; a SuperLink that is busy with an update is slow."""
PAUSE_SECONDS = 20.0
"""Before a further run, so that what holds the journal is gone; and for hospitals to come back."""
FORGET_SECONDS = 60.0
MAX_DEATHS = 10
AGAIN = ("RUN_QUORUM", "RUN_JOURNAL", "RUN_FLOWER")
"""Errors that pass: hospitals come back, the run before lets go of the journal, Flower was too busy to answer."""
WITHDRAWN = "withdrawn"
"""Of a key that was registered once; Flower never takes it again."""
CODE = re.compile(r"error\[([A-Z_]+)\]")
COMMAND_SECONDS = 120.0

Say = Callable[[str], None]


def start(folder: Path, study: Path | None = None, say: Say = lambda line: None, *, catch_up: bool = False) -> str:
    """Run the study to its end. Returns the reason of its end.

    Args:
        folder: the coordinator's folder, made by `coordinator.init`.
        study: the study, signed by all hospitals; None: the one that the folder holds.
        say: gets a line for people now and then.
        catch_up: start although the study has ended, for hospitals that were away for its last sums.

    Raises:
        RunError, StudyError, CryptoError: the folder is not ready (see `coordinator.take_study`); RUN_FLOWER.
    """
    folder = folder.resolve()
    if '"' in str(folder) or "'" in str(folder):  # Flower's own notation for settings cannot carry them
        raise RunError("RUN_PATH", "the path contains a quotation mark", str(folder), hint="choose another folder")
    consortium, agreement = coordinator.take_study(folder, study)
    if (ended := coordinator.ending(folder)) and not catch_up:
        return ended
    with processes.only_one(folder / LOCK) as lock, processes.stoppable():
        server = Superlink(folder, consortium, lock)
        try:
            server.start(say)
            server.register(say)
            say(f"study {agreement.study.name}: hospitals come to {consortium.coordinator.address}")
            outcome = _keep_going(server, say)
            server.forget()
            return outcome
        except processes.Stopped:
            say("stopping")
            return "stopped"
        finally:
            server.stop()


def _keep_going(server: Superlink, say: Say) -> str:
    """Runs until one ends for good."""
    deaths = 0
    while True:
        before = _rounds(server.folder)
        try:
            outcome = server.run(say)
        except RunError as error:
            outcome = error.line()
        if outcome in coordinator.FINAL:
            return outcome
        found = CODE.search(outcome)
        code = found.group(1) if found else ""
        if code and code not in AGAIN:
            raise RunError("RUN_FLOWER", f"the run ended: {outcome}", str(server.folder / coordinator.EVENTS))
        deaths = 0 if code == "RUN_QUORUM" or _rounds(server.folder) > before else deaths + 1
        if deaths >= MAX_DEATHS:
            raise RunError("RUN_FLOWER", f"{deaths} runs died without a round: {outcome}", str(server.log))
        say(f"the run ended ({outcome}); a new one in {PAUSE_SECONDS:g} s")
        time.sleep(PAUSE_SECONDS)
        if server.process is None or server.process.poll() is not None:
            server.start(say)


def _rounds(folder: Path) -> int:
    return sum(event.get("event") == "round_applied" for _, event in coordinator.events(folder))


class Superlink:
    """A SuperLink on loopback, behind TLS, for registered SuperNodes alone; and the commands that speak to it."""

    def __init__(self, folder: Path, consortium: Consortium, lock: IO[str]) -> None:
        self.folder, self.lock = folder, lock
        self.address = f"127.0.0.1:{consortium.coordinator.superlink_port}"
        self.port = consortium.coordinator.superlink_port
        self.kit, self.log, self.home = folder / KIT, folder / "superlink.log", folder / "flwr"
        self.env = environment(self.home)
        self.process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(mode=0o700, exist_ok=True)
        config = f'[superlink.{NAME}]\naddress = "{self.address}"\nroot-certificates = "{self.kit / "ca.crt"}"\n'
        (self.home / "config.toml").write_text(config, encoding="utf-8")

    def start(self, say: Say) -> None:
        """Start it and wait until it answers.

        Raises:
            RunError: RUN_FLOWER.
        """
        command = [
            str(BIN / "flower-superlink"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(self.kit / "ca.crt")),
            *("--ssl-certfile", str(self.kit / "server.crt")),
            *("--ssl-keyfile", str(self.kit / "server.key")),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
            *("--database", str(self.folder / "state.db")),
        ]
        self.process = processes.spawn(command, env=self.env, folder=self.home, log=self.log, lock=self.lock)
        deadline = time.monotonic() + UP_SECONDS
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                what = f"the SuperLink does not come up: {processes.last_error(self.log)}"
                raise RunError("RUN_FLOWER", what, str(self.log))
            time.sleep(0.5)
        say(f"SuperLink {self.process.pid} at {self.address}; log {self.log}")

    def stop(self) -> None:
        if self.process is not None:
            processes.stop(self.process)

    def register(self, say: Say) -> None:
        """Hospitals of the kit may connect, and nobody else may any more. A key that was withdrawn stays so.

        Raises:
            RunError: RUN_FLOWER; KIT_CHANGED, a withdrawn key is back.
        """
        path = self.folder / "supernodes.json"
        known: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}  # key -> name, node
        wanted = {file.read_text().strip(): file for file in sorted((self.kit / "supernodes").glob("*.pub"))}
        for key, entry in known.items():
            if key not in wanted and entry["node"] != WITHDRAWN:
                self._flwr("supernode", "unregister", entry["node"], NAME)
                say(f"{entry['name']} is no longer registered")
                entry["node"] = WITHDRAWN
                path.write_text(json.dumps(known, indent=1), encoding="utf-8")
        for key, file in wanted.items():
            if key not in known:
                known[key] = {"name": file.stem, "node": self._register(file, {e["node"] for e in known.values()})}
                path.write_text(json.dumps(known, indent=1), encoding="utf-8")
                say(f"{file.stem} is registered")
            elif known[key]["node"] == WITHDRAWN:
                hint = "remove that hospital's kit from the folder of kits, and make it a new one"
                raise RunError("KIT_CHANGED", f"the key of {file.stem} was withdrawn", file.name, hint=hint)

    def _register(self, public: Path, known: set[str]) -> str:
        """Returns Flower's number of the node."""
        answer = self._flwr("supernode", "register", str(public), NAME, "--name", public.stem, may_fail=True)
        if answer["success"]:
            return str(answer["node-id"])
        if "already in use" in answer["error-message"]:  # killed between Flower's note of it and ours
            nodes = self._flwr("supernode", "ls", NAME)["nodes"]
            strangers = [n["node-id"] for n in nodes if n["status"] != "unregistered" and n["node-id"] not in known]
            if len(strangers) == 1:
                return str(strangers[0])
        raise RunError("RUN_FLOWER", f"{public.stem} cannot be registered: {answer['error-message']}", str(self.log))

    def _end_old_runs(self) -> None:
        """Runs that were left over: a pending one would start by itself, beside the new one."""
        for run in self._runs():
            if not run["status"].startswith("finished"):
                self._flwr("stop", str(run["run-id"]), NAME, may_fail=True)

    def run(self, say: Say) -> str:
        """One run of the study, watched to its end.

        Returns:
            A reason of `coordinator.FINAL`, or what went wrong: Flower's words, with a code of ours where there is one.
        """
        self._end_old_runs()
        seen = max([offset for offset, _ in coordinator.events(self.folder)], default=0)
        bundle.write(self.home / "app")
        setting = f'{bundle.FOLDER_SETTING}="{self.folder}"'
        number = str(self._flwr("run", str(self.home / "app"), NAME, "-c", setting)["run-id"])
        say(f"run {number} is submitted")
        submitted = looked = time.monotonic()
        begun, silent, reason = False, 0, ""
        while True:
            time.sleep(1.0)
            for offset, event in coordinator.events(self.folder, seen):
                seen, begun, looked = offset, True, time.monotonic()
                _tell(event, say)
                if event.get("event") == "run_closed":
                    reason = event.get("reason", "")
            if reason in coordinator.FINAL:
                return reason
            if self.process is None or self.process.poll() is not None:
                say("the SuperLink died")
                self.start(say)
                return "the SuperLink died"
            now = time.monotonic()
            if now - looked < (2.0 if reason else LOOK_SECONDS):
                continue
            run = self._run(number)
            looked = time.monotonic()
            if run is None:
                silent += 1
                if silent < MAX_SILENT:
                    continue
                say("the SuperLink does not answer: it is started again")
                self.stop()
                self.start(say)
                return "the SuperLink did not answer"
            silent = 0
            begun = begun or run["status"] not in ("pending", "starting")
            if run["status"].startswith("finished"):
                return str(run.get("status-details") or run["status"])
            if not begun and now - submitted > PENDING_SECONDS:
                say("the run does not begin: the SuperLink is started again")
                self.stop()
                self.start(say)
                submitted = time.monotonic()

    def forget(self) -> None:
        """Make Flower delete what the hospitals sent: it keeps a run's messages until the finished run is listed."""
        deadline = time.monotonic() + FORGET_SECONDS
        while time.monotonic() < deadline:
            try:
                runs = self._runs()
            except RunError:
                return
            if all(run["status"].startswith("finished") for run in runs):
                self._runs()
                return
            time.sleep(1.0)

    def _run(self, number: str) -> dict[str, Any] | None:
        """What Flower says about a run; None where it says nothing."""
        try:
            found = [run for run in self._runs() if str(run["run-id"]) == number]
        except RunError:
            return None
        return found[0] if found else {"status": "finished:lost"}

    def _runs(self) -> list[dict[str, Any]]:
        return list(self._flwr("ls", NAME).get("runs", []))

    def _healthy(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.kit / "ca.crt"))
        try:
            with urllib.request.urlopen(f"https://{self.address}/health", context=context, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _flwr(self, *arguments: str, may_fail: bool = False) -> dict[str, Any]:
        """A command of Flower, answered in JSON.

        Raises:
            RunError: RUN_FLOWER, unless it `may_fail`.
        """
        command = [str(BIN / "flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=COMMAND_SECONDS
            )
            answer: dict[str, Any] = json.loads(done.stdout)
            said = str(answer.get("error-message", ""))
        except (subprocess.TimeoutExpired, ValueError):
            answer, said = {"success": False, "error-message": "no answer"}, "no answer"
        if not answer.get("success") and not may_fail:
            raise RunError("RUN_FLOWER", f"flwr {arguments[0]}: {said}", str(self.log))
        return answer


def _tell(event: dict[str, Any], say: Say) -> None:
    """Some events are news for people."""
    kind, number = event.get("event"), event.get("round")
    if kind == "run_opened":
        say(f"hospitals: {', '.join(event.get('sites', []))}")
    elif kind == "round_applied":
        say(f"round {number}: model {str(event.get('model_hash'))[:12]} at {', '.join(event.get('sites', []))}")
    elif kind == "site_missing":
        say(f"round {number}: {event.get('site')} is missing ({event.get('reason')})")
    elif kind == "run_closed":
        say(f"run closed after round {event.get('rounds')}: {event.get('reason')}")
