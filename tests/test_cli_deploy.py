"""From kits to a study that everybody signed, by the commands alone; and what each of them refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import assert_one_line
from test_simulate import write_study

from fedmedgan.cli import main
from fedmedgan.deploy import coordinator, kits, processes
from fedmedgan.shared.agreement import Agreement, Identity
from fedmedgan.shared.errors import RunError, StudyError
from fedmedgan.simulations import phantoms

NAMES = ("site-0", "site-1", "site-2")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    """A command, in this process: importing everything anew for each of them takes minutes."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin, dict(os.environ))
    sys.argv, sys.stdin = ["fedmedgan", *map(str, arguments)], io.StringIO()
    code: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.run()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv, sys.stdin = before[:2]
        os.environ.clear()
        os.environ.update(before[2])
    return subprocess.CompletedProcess(arguments, int(str(code)), out.getvalue(), err.getvalue())


def data(done: subprocess.CompletedProcess) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["data"]


@pytest.fixture(scope="module")
def signed(tmp_path_factory) -> Path:
    """A folder in which everybody has done what people do before a study starts."""
    folder = tmp_path_factory.mktemp("ceremony")
    hospitals = "".join(f'[[hospitals]]\nname = "{name}"\n' for name in NAMES)
    (folder / "consortium.toml").write_text(f'name = "t"\n[coordinator]\nhost = "127.0.0.1"\n{hospitals}')
    made = data(run("--format", "json", "kit", "make", folder / "consortium.toml", "--out", folder / "kits"))
    assert made["new"] == list(NAMES)
    phantoms.write_hospital(folder / "images", patients=24, seed=1, vendor=phantoms.vendor_for(0), size=32)
    (folder / "passphrase").write_text("correct horse\n")
    (folder / "passphrase").chmod(0o600)
    write_study(folder / "study.toml", sites=3)
    own = ("--kit", folder / "kits/coordinator", "--folder", folder / "coordinator")
    data(run("--format", "json", "server", "init", *own))
    identities = [folder / "coordinator/coordinator.identity.json"]
    sealed = ("--passphrase-file", folder / "passphrase")
    for name in NAMES:
        options = ("--kit", folder / "kits" / name, "--home", folder / name, "--data", folder / "images")
        options += ("--budget-book", folder / f"{name}-book")  # three hospitals, not three homes of one
        said = data(run("--format", "json", "site", "init", *options, "--max-epsilon", "20", *sealed))
        assert said["site"] == name
        identities.append(Path(said["identity"]))
    data(run("--format", "json", "study", "assemble", folder / "study.toml", *identities, "--out", folder / "s.json"))
    for name in NAMES:
        data(run("--format", "json", "study", "sign", folder / "s.json", "--home", folder / name, "--yes", *sealed))
    return folder


@pytest.fixture
def ready(signed, tmp_path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(signed, tmp_path / "c")
    return tmp_path / "c"


def signature(folder: Path, name: str) -> Path:
    return folder / name / f"{name}.signature.json"


def test_collecting_says_who_is_missing_until_nobody_is(ready):
    study = ready / "s.json"
    first = data(run("--format", "json", "study", "collect", study, signature(ready, "site-1")))
    assert (first["signed"], first["missing"]) == (["site-1"], ["site-0", "site-2"])
    with pytest.raises(StudyError) as caught:
        coordinator.take_study(ready / "coordinator", study)
    assert caught.value.code == "STUDY_SIGNATURE"
    assert_one_line(run("server", "start", "--folder", ready / "coordinator", "--study", study), "STUDY_SIGNATURE")
    rest = [signature(ready, name) for name in ("site-0", "site-2")]
    assert data(run("--format", "json", "study", "collect", study, *rest))["missing"] == []
    consortium, agreement = coordinator.take_study(ready / "coordinator", study)
    assert consortium.names == list(NAMES)
    assert Agreement.load(ready / "coordinator/study.json") == agreement
    status = data(run("--format", "json", "server", "status", "--folder", ready / "coordinator"))
    assert (status["round"], status["running"], status["ended"]) == (0, False, "")


def test_a_signature_under_another_study_or_of_somebody_else_is_refused(ready):
    values = json.loads(signature(ready, "site-1").read_text())
    forged = ready / "forged.json"
    for changed in ({"site": "site-0"}, {"study": "0" * 64}, {"signature": "00" * 64}, {"more": 1}):
        forged.write_text(json.dumps(values | changed))
        assert_one_line(run("study", "collect", ready / "s.json", forged), "STUDY_SIGNATURE")
    assert Agreement.load(ready / "s.json").signatures == {}


def test_everybody_is_shown_the_same_fingerprints(ready):
    shown = run("study", "sign", ready / "s.json", "--home", ready / "site-0", "--yes",
                "--passphrase-file", ready / "passphrase").stdout  # fmt: skip
    for name in (*NAMES, "coordinator"):
        path = ready / name / f"{name}.identity.json"
        assert Identity.load(path).fingerprint in shown


def test_without_a_yes_nothing_is_signed(ready):
    signature(ready, "site-0").unlink()
    (ready / "site-0/study.json").unlink()
    done = run("study", "sign", ready / "s.json", "--home", ready / "site-0", "--passphrase-file", ready / "passphrase")
    assert done.returncode == 1
    assert not signature(ready, "site-0").exists()
    assert not (ready / "site-0/study.json").exists()


def test_a_sealed_home_asks_for_its_passphrase(ready):
    sign = ("study", "sign", ready / "s.json", "--home", ready / "site-0", "--yes")
    assert_one_line(run(*sign), "KEY_PASSPHRASE")
    (ready / "wrong").write_text("wrong horse\n")
    (ready / "wrong").chmod(0o600)
    assert_one_line(run(*sign, "--passphrase-file", ready / "wrong"), "KEY_PASSPHRASE")
    (ready / "wrong").chmod(0o644)
    assert_one_line(run(*sign, "--passphrase-file", ready / "wrong"), "KEY_PERMISSIONS")


def test_homes_hold_their_kit_and_no_others_secrets(signed):
    for name in NAMES:
        assert kits.verify(signed / name / "kit") == []
        assert stat.S_IMODE((signed / name).stat().st_mode) == 0o700
        assert stat.S_IMODE((signed / name / "kit/supernode.key").stat().st_mode) == 0o600
    assert not (signed / "coordinator/keys").exists()
    assert kits.verify(signed / "coordinator/kit") == []


def test_init_again_keeps_the_coordinators_key_and_takes_the_newer_kit(ready):
    identity = (ready / "coordinator/coordinator.identity.json").read_bytes()
    toml = (ready / "consortium.toml").read_text() + '[[hospitals]]\nname = "site-3"\n'
    (ready / "consortium.toml").write_text(toml)
    assert data(run("--format", "json", "kit", "make", ready / "consortium.toml", "--out", ready / "kits"))["new"] == [
        "site-3"
    ]
    own = ("--kit", ready / "kits/coordinator", "--folder", ready / "coordinator")
    data(run("--format", "json", "server", "init", *own))
    assert (ready / "coordinator/coordinator.identity.json").read_bytes() == identity
    assert (ready / "coordinator/kit/supernodes/site-3.pub").exists()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda home: (home / "kit/site.toml").write_text(""), "KIT_CHANGED"),
        (lambda home: shutil.rmtree(home / "kit"), "KIT_PATH"),
        (lambda home: (home / "study.json").unlink(), "CONFIG_NOT_FOUND"),
        (lambda home: shutil.rmtree(home / "keys"), "KEY_MISSING"),
        (lambda home: (home / "keys/identity.key").chmod(0o644), "KEY_PERMISSIONS"),
    ],
)
def test_a_home_that_is_not_ready_does_not_start(ready, spoil, code):
    spoil(ready / "site-0")
    start = ("site", "start", "--home", ready / "site-0", "--passphrase-file", ready / "passphrase")
    assert_one_line(run(*start), code)
    assert not (ready / "site-0/supernode.log").exists()


def test_a_kit_of_another_hospital_does_not_start_a_home(ready):
    shutil.rmtree(ready / "site-0/kit")
    kits.copy(ready / "kits/site-1", ready / "site-0/kit")
    start = ("site", "start", "--home", ready / "site-0", "--passphrase-file", ready / "passphrase")
    assert_one_line(run(*start), "KIT_CONFIG")


def test_a_server_does_not_start_beside_a_hospitals_keys_or_for_another_study(ready):
    signatures = [signature(ready, name) for name in NAMES]
    data(run("--format", "json", "study", "collect", ready / "s.json", *signatures))
    folder = ready / "coordinator"
    coordinator.take_study(folder, ready / "s.json")
    shutil.copytree(ready / "site-0/keys", folder / "keys")
    start = ("server", "start", "--folder", folder, "--study", ready / "s.json")
    assert_one_line(run(*start), "HE_SECRET_AT_SERVER")
    shutil.rmtree(folder / "keys")
    (folder / "coordinator.key").unlink()
    data(run("--format", "json", "server", "init", "--kit", ready / "kits/coordinator", "--folder", folder))
    assert_one_line(run(*start), "STUDY_KEYS")


def test_only_one_at_a_time(tmp_path):
    with processes.only_one(tmp_path / "lock"):
        assert processes.is_running(tmp_path / "lock")
        with pytest.raises(RunError) as caught, processes.only_one(tmp_path / "lock"):
            pass
        assert caught.value.code == "RUN_PATH"
    assert not processes.is_running(tmp_path / "lock")


def test_a_changed_kit_is_exit_code_two_and_names_the_file(ready):
    kit = ready / "kits/site-0"
    assert data(run("--format", "json", "kit", "verify", kit))["ca_fingerprint"]
    (kit / "compose.yaml").write_text("services: {}\n")
    done = run("kit", "verify", kit)
    assert_one_line(done, "KIT_CHANGED")
    assert "compose.yaml: changed" in done.stderr


def test_leaving_asks_first(ready):
    leave = ("site", "leave", "--home", ready / "site-0")
    assert run(*leave).returncode == 1
    assert not (ready / "site-0/left").exists()
    assert run(*leave, "--yes").returncode == 0
    assert (ready / "site-0/left").exists()


def test_rotation_is_allowed_by_a_person(ready):
    done = run("site", "rotate", "--home", ready / "site-0", "--passphrase-file", ready / "passphrase")
    assert done.returncode == 0, done.stderr
    assert (ready / "site-0/rotation-allowed.json").exists()


def test_the_end_of_a_study_is_read_from_the_events(tmp_path):
    def write(*events: dict) -> None:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))

    opened, closed = {"event": "run_opened"}, {"event": "run_closed", "reason": "rounds"}
    assert coordinator.ending(tmp_path) == ""
    write(opened, closed)
    assert coordinator.ending(tmp_path) == "rounds"
    write(opened, closed, opened)
    assert coordinator.ending(tmp_path) == ""
    write(opened, {"event": "run_closed", "reason": "quorum"})
    assert coordinator.ending(tmp_path) == ""
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "torn')
    assert [e["event"] for _, e in coordinator.events(tmp_path)] == ["run_opened", "run_closed"]
