"""``fedmedgan audit``: what people type, what they are told, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pydicom
import pytest
from audited import Consortium, study
from test_cli_deploy import run
from test_simulate import run as run_alone
from test_simulate import write_study

from fedmedgan.audit import one_run
from fedmedgan.audit.bounds import Finding
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.history import read
from fedmedgan.simulations import phantoms

NAME = "clinic-a"


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    made = Consortium(tmp_path_factory.mktemp("run"))
    made.join(study())
    made.round(study(), 1)
    made.round(study(), 2)
    return made


def envelope(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def data(*arguments: str | Path) -> dict[str, Any]:
    done = run("--format", "json", "audit", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return envelope(done)["data"]


def failed(done: subprocess.CompletedProcess[str], code: str) -> str:
    """The one line of an error, of a command that ends with 2."""
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error[{code}]: ")
    return lines[0]


# ---- ledger


def test_ledger_shows_each_round_under_its_ceiling(consortium: Consortium) -> None:
    done = run("audit", "ledger", consortium.hospitals[NAME].home)
    assert done.returncode == 0, done.stderr
    history = read(consortium.hospitals[NAME].path)
    spent = epsilon_pld(history.spent(), study().privacy.delta)
    for phrase in (NAME, "paper: ceiling 4 at delta 1e-4", "█", "all studies", "adding or removing one", "passed"):
        assert phrase in done.stdout, phrase
    found = data("ledger", consortium.hospitals[NAME].home)["ledgers"]
    assert len(found) == 1
    rounds = found[0]["studies"][0]["rounds"]
    assert [r["round"] for r in rounds] == [1, 2]
    assert rounds[-1]["epsilon"] == found[0]["all_studies"]["epsilon"] == spent
    assert rounds[0]["checks"]["noise"] == "passed"
    assert found[0]["head"] == history.head


def test_ledger_takes_a_set_and_notes_what_is_not_usual(consortium: Consortium, tmp_path: Path) -> None:
    from fedmedgan.shared.privacy.events import TrainingSteps

    made = Consortium(tmp_path)
    made.join(study())
    with made.hospitals[NAME].ledger() as ledger:
        ledger.void(ledger.reserve(study().hash, 1, [TrainingSteps(2.0, 0.05, 25)]), "[bold]no data[/bold]")
        ledger.reserve(study().hash, 2, [TrainingSteps(2.0, 0.05, 25)])
    made.hospitals[NAME].train(study(), 3, checks=dict.fromkeys(("noise", "clipping", "rows", "sampling"), "failed"))
    done = run("audit", "ledger", tmp_path)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert all(name in shown for name in made.hospitals)
    for phrase in ("[bold]no", "never settled", "FAILED: noise"):
        assert phrase in shown, phrase


def test_what_is_no_ledger_is_one_line(tmp_path: Path) -> None:
    failed(run("audit", "ledger", tmp_path), "AUDIT_EVIDENCE")
    failed(run("audit", "ledger"), "RUN_USAGE")
    (tmp_path / "ledger.jsonl").write_text("{}\n")
    failed(run("audit", "ledger", tmp_path), "LEDGER_CORRUPT")
    broken = run("audit", "verify", tmp_path)
    assert "AUDIT_FAILED" in failed(broken, "AUDIT_FAILED")
    assert "LEDGER_CORRUPT" in broken.stdout


# ---- verify


def test_verify_passes_honest_hospitals(consortium: Consortium) -> None:
    done = run("audit", "verify", consortium.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    findings = data("verify", *(h.home for h in consortium.hospitals.values()))["findings"]
    assert {f["hospital"] for f in findings} == set(consortium.hospitals)
    assert {f["verdict"] for f in findings} <= {"passed", "not-run"}


def test_verify_names_each_failure_by_hospital_and_code(tmp_path: Path) -> None:
    made = Consortium(tmp_path)
    made.join(study())
    made.round(study(), 1)
    early = made.hospitals[NAME].path.read_bytes()
    made.round(study(), 2, uncharged="clinic-b")
    made.hospitals[NAME].path.write_bytes(early)
    done = run("audit", "verify", tmp_path)
    line = failed(done, "AUDIT_FAILED")
    for pair in ("clinic-a LEDGER_ROLLBACK", "clinic-b AUDIT_UNCHARGED"):
        assert pair in line
    assert "clinic-c" not in line
    assert "LEDGER_ROLLBACK" in done.stdout
    as_json = envelope(run("--format", "json", "audit", "verify", tmp_path))
    assert (as_json["status"], as_json["error"]["code"]) == ("error", "AUDIT_FAILED")
    codes = {(f["hospital"], f["code"]) for f in as_json["data"]["findings"] if f["verdict"] == "failed"}
    assert {("clinic-a", "LEDGER_ROLLBACK"), ("clinic-b", "AUDIT_UNCHARGED")} <= codes


# ---- recompute


def test_recompute_shows_both_accountants_and_replacing_beside(consortium: Consortium) -> None:
    done = run("audit", "recompute", consortium.folder)
    assert done.returncode == 0, done.stderr
    for word in ("PLD", "PRV", "RDP", "enforced", "replace", "together"):
        assert word in done.stdout
    costs = data("recompute", consortium.hospitals[NAME].path)["costs"]
    assert [cost["study"] for cost in costs] == [study().hash, ""]
    assert costs[0]["epsilon"] == max(costs[0]["accountants"].values())
    assert costs[0]["replace_one"] > costs[0]["epsilon"]


def test_recompute_counts_two_copies_of_a_ledger_once(consortium: Consortium, tmp_path: Path) -> None:
    own = consortium.hospitals[NAME].path
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(b"".join(own.read_bytes().splitlines(keepends=True)[:-1]))
    assert data("recompute", own, copy) == data("recompute", copy, own) == data("recompute", own)


def test_recompute_fails_above_a_ceiling(tmp_path: Path) -> None:
    made = Consortium(tmp_path)
    made.join(study())
    hospital = made.hospitals[NAME]
    hospital.train(study(), 1)

    def lower(bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**body, "ceiling": "0.5"} if body["kind"] == "open" else body for body in bodies]

    hospital.rewrite(lower)
    done = run("audit", "recompute", hospital.home)
    assert f"{NAME} AUDIT_CEILING" in failed(done, "AUDIT_FAILED")
    assert "0.5" in done.stdout


# ---- attack


def found(verdict: str) -> Finding:
    return Finding(
        name="one run with canaries", quantity="epsilon", estimate=None, lower_bound=0.4, confidence=0.95, ceiling=3.47,
        allowed=1.2, numbers={"canaries": 10}, seconds=0.1, verdict=verdict, explanation="Six of ten.",
    )  # type: ignore[arg-type]  # fmt: skip


def test_an_attack_says_confidence_ceiling_and_what_it_means(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(one_run, "one_run_audit", lambda *a, **k: asked.append((a, k)) or found("passed"))
    home = consortium.hospitals[NAME].home
    done = run("audit", "attack", "one-run", "--home", home)
    assert done.returncode == 0, done.stderr
    for phrase in ("at least 0.40, with 95 % confidence", "ceiling   3.47", "allowed   1.2", "no proof", "Six of ten."):
        assert phrase in done.stdout, phrase
    (of, site), options = asked[0]
    terms = read(consortium.hospitals[NAME].path).terms(study().hash)
    assert terms is not None
    assert (of.hash, site.name, options["noise_multiplier"]) == (study().hash, NAME, terms.noise_multiplier)
    kept = json.loads((home / "attacks" / "one-run-0001.json").read_text())
    assert kept["findings"][0]["ceiling"] == 3.47


def test_an_attack_that_succeeds_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_run, "one_run_audit", lambda *_, **__: found("failed"))
    path = write_study(tmp_path / "study.toml")
    done = run("audit", "attack", "one-run", path)
    assert "one run with canaries" in failed(done, "AUDIT_FAILED")
    assert "The promise is broken" in done.stdout
    assert envelope(run("--format", "json", "audit", "attack", "one-run", path))["data"]["verdict"] == "failed"


def test_many_small_runs_say_that_they_were_too_few() -> None:
    done = run("audit", "attack", "many-run", "--runs", "20", "--epsilon", "4")
    assert done.returncode == 0, done.stderr
    assert "too few" in done.stdout
    assert "a fault could well have been missed" in done.stdout


def test_an_attack_needs_a_study_or_a_home(tmp_path: Path) -> None:
    failed(run("audit", "attack", "one-run"), "CONFIG_NOT_FOUND")
    failed(run("audit", "attack", "generator", "--home", tmp_path), "RUN_USAGE")


# ---- report


def test_report_needs_the_hospitals_keys(consortium: Consortium, tmp_path: Path) -> None:
    failed(run("audit", "report", "--home", consortium.hospitals[NAME].home, "--out", tmp_path), "KEY_MISSING")


# ---- a real study


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four hospitals that trained two rounds."""
    folder = tmp_path_factory.mktemp("simulated")
    path = write_study(folder / "study.toml")
    done = run_alone("simulate", path, "--no-arms", "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def other_patients(folder: Path) -> Path:
    """Phantoms of the same kind, of patients whom no hospital knows."""
    phantoms.write_hospital(folder, patients=24, seed=77, vendor=phantoms.vendor_for(0))
    for path in folder.rglob("*.dcm"):
        dataset = pydicom.dcmread(path)
        dataset.PatientID = f"other-{dataset.PatientID}"
        dataset.save_as(path)
    return folder


@pytest.mark.slow
def test_a_real_study_from_ledger_to_bundle(simulated: Path, tmp_path: Path) -> None:
    hospitals = simulated / "hospitals"
    home, others = hospitals / "site-0", [hospitals / f"site-{i}" for i in (1, 2, 3)]
    assert len(data("ledger", simulated)["ledgers"]) == 4
    findings = data("verify", simulated)["findings"]
    assert {f["hospital"] for f in findings if f["verdict"] == "passed"} == {f"site-{i}" for i in range(4)}
    assert all(cost["epsilon"] <= cost["ceiling"] for cost in data("recompute", simulated)["costs"])

    holdout = other_patients(tmp_path / "others")
    attacked = data("attack", "generator", "--home", home, "--holdout", holdout, "--images", "200")
    assert attacked["verdict"] == "too-few"
    planted = data("attack", "one-run", "--home", home, "--canaries", "40")
    assert planted["verdict"] in ("passed", "too-few")

    beside = [option for other in others for option in ("--with", other)]
    made = data("report", "--home", home, "--out", tmp_path, *beside)
    summary = made["summary"]
    assert summary["verdict"] == "passed"
    assert {a["by"] for a in summary["anchors"]} == {"site-1", "site-2", "site-3"}
    assert [a["verdict"] for a in summary["attacks"]] == [planted["verdict"], "not-run", "too-few"]
    with zipfile.ZipFile(made["bundle"]) as archive:
        archive.extractall(tmp_path)
    folder = Path(made["bundle"]).with_suffix("")
    checker = Path(__file__).parents[1] / "audit" / "verify_alone.py"
    done = subprocess.run([sys.executable, checker, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    pseudonyms = [path.stem for path in (home / "cache").rglob("*")]
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "verify.py")
    assert str(simulated).encode() not in text
    assert not [name for name in pseudonyms if len(name) == 32 and name.encode() in text]
