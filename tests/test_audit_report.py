"""The audit report and its bundle: what a board reads, what an auditor checks, and what must not be in it."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from audited import KEYS, Consortium, sigma, study
from hypothesis import given, settings
from hypothesis import strategies as st
from ledgers import PROOF, ledger_at, terms

from fedmedgan.audit import bundle, charts, facts, report, results, words
from fedmedgan.audit.bill_of_materials import bill_of_materials
from fedmedgan.audit.spending import evenly, spending
from fedmedgan.shared.errors import PrivacyError, RunError
from fedmedgan.shared.privacy.accounting import epsilon_pld
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read

MADE = "2031-03-04T11:00:00Z"
NAME = "clinic-a"
FOLDER = f"audit-paper-{NAME}"
ROOT = Path(__file__).parents[1]
PATIENTS = 79_194_317
"""The real number of patients, which only an attack on the generator knows."""

Files = dict[str, bytes]


def finding(name: str, verdict: str = "passed", **changes: Any) -> dict[str, Any]:
    values = {
        "name": name, "quantity": "AUC", "estimate": 0.51234, "lower_bound": 0.48765, "confidence": 0.95,
        "ceiling": 0.98765, "allowed": 0.5, "numbers": {"training_patients": PATIENTS, "generated_images": 4000},
        "seconds": 1.5, "verdict": verdict, "explanation": f"Of {PATIENTS} patients <b>nobody</b> stood out.",
    }  # fmt: skip
    return values | changes


def keep(home: Path, attack: str, *findings: dict[str, Any], time: str = MADE) -> None:
    values = {"attack": attack, "study": study().hash, "time": time, "findings": findings}
    results.keep(home, results.Result.model_validate(values))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    """Two rounds of three hospitals; at clinic-a also a round taken back, and one lost in a crash."""
    made = Consortium(tmp_path_factory.mktemp("secret-place"))
    of = study()
    made.join(of)
    event = TrainingSteps(sigma(of), 0.05, 25)
    own = made.hospitals[NAME]
    made.round(of, 1)
    with own.ledger() as ledger:
        ledger.void(ledger.reserve(of.hash, 2, [event]), "=the folder could not be read")
    made.round(of, 2)
    own.train(of, 3, checks={**PROOF["checks"], "sampling": "too-few"})
    (own.home / "policy.toml").write_text(f'data = "{own.home}/dicom"\nbudget_book = "../book"\n')
    keep(
        own.home,
        "one-run",
        finding("planted", "too-few", quantity="epsilon", numbers={"canaries": 1000}, explanation="."),
    )
    keep(own.home, "generator", finding("old", "failed"), time="2030-01-01T00:00:00Z")
    keep(own.home, "generator", finding("near", "passed"), finding("nearer", "too-few"))
    return made


def make(consortium: Consortium, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    home = consortium.hospitals[NAME].home
    values = {"out": out, "signing": KEYS[NAME], "made": MADE, **options}
    return bundle.make(home, **values)


@pytest.fixture(scope="module")
def made(consortium: Consortium, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    others = [consortium.hospitals["clinic-b"].home, consortium.hospitals["clinic-c"].path]
    return make(consortium, tmp_path_factory.mktemp("out"), others=others)


@pytest.fixture(scope="module")
def files(made: tuple[Path, dict[str, Any]]) -> Files:
    with zipfile.ZipFile(made[0]) as archive:
        return {name.removeprefix(f"{FOLDER}/"): archive.read(name) for name in archive.namelist()}


@pytest.fixture
def unpacked(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    with zipfile.ZipFile(made[0]) as archive:
        archive.extractall(tmp_path)
    return tmp_path / FOLDER


# ---- the bundle


def check_alone(folder: Path) -> subprocess.CompletedProcess[str]:
    """As an auditor runs it: from the folder, with nothing of this project on the path."""
    command = [sys.executable, "-I", "-S", "-c", ALONE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)


ALONE = f"""
import runpy, sys, types
sys.path += [{next(p for p in sys.path if p.endswith("site-packages"))!r}]
sys.modules["fedmedgan"] = None
sys.argv = ["verify.py", sys.argv[1]]
runpy.run_path("verify.py", run_name="__main__")
"""


def test_the_bundle_holds_what_it_says_and_nothing_else(files: Files) -> None:
    assert set(files) == {
        "report.html", "summary.json", "summary_schema.json", "ledger.jsonl", "ledger.csv", "anchors.json",
        "study.json", "certificates/0001.json", "certificates/0002.json", "sbom.cdx.json", "verify.py",
        "SHA256SUMS", "SHA256SUMS.sig",
    }  # fmt: skip
    listed = [line.split("  ")[1] for line in files["SHA256SUMS"].decode().splitlines()]
    assert listed == sorted(set(files) - {"SHA256SUMS", "SHA256SUMS.sig"})


def test_an_auditor_checks_it_without_our_code(unpacked: Path) -> None:
    done = check_alone(unpacked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 checks failed, 0 were not run" in done.stdout


@pytest.mark.parametrize("name", ["summary.json", "ledger.csv", "SHA256SUMS"])
def test_a_changed_file_breaks_the_seal(unpacked: Path, name: str) -> None:
    path = unpacked / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    assert check_alone(unpacked).returncode == 1


def test_our_own_check_takes_the_zip(made: tuple[Path, dict[str, Any]]) -> None:
    from fedmedgan.audit.evidence import gather
    from fedmedgan.audit.verify import verify

    found = {finding.check: finding.verdict for finding in verify(gather(made[0]))}
    assert found["seal"] == found["chain"] == found["rounds"] == "passed"
    assert "failed" not in found.values()


def test_equal_evidence_gives_equal_bytes(
    consortium: Consortium, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    others = [consortium.hospitals["clinic-b"].home, consortium.hospitals["clinic-c"].path]
    again, _ = make(consortium, tmp_path, others=others)
    assert again.read_bytes() == made[0].read_bytes()


def test_nothing_of_the_machine_or_of_patients_is_in_it(consortium: Consortium, files: Files) -> None:
    home = consortium.hospitals[NAME].home
    forbidden = [
        str(home), "secret-place", str(ROOT), str(Path.home()), "budget_book", "/dicom", "pseudonym_", str(PATIENTS),
        "events.jsonl", *(f'"{word}"' for word in ("batch", "batch_size", "rows_in_batch", "images_in_batch")),
    ]  # fmt: skip
    for name, content in files.items():
        if name != "verify.py":
            text = content.decode()
            assert not [word for word in forbidden if word in text], name


def test_heads_that_others_hold_are_in_it(consortium: Consortium, files: Files) -> None:
    anchors = json.loads(files["anchors.json"])
    assert {anchor["by"] for anchor in anchors} == {"clinic-b", "clinic-c"}
    assert sorted(anchors, key=str) == sorted(consortium.anchors_of(NAME), key=str)
    summary = json.loads(files["summary.json"])
    assert [(a["by"], a["round"]) for a in summary["anchors"]] == [("clinic-b", 2), ("clinic-c", 2)]
    own = read(consortium.hospitals[NAME].path)
    assert {(p["of"], p["seq"]) for p in summary["peers"]} == {("clinic-b", 9), ("clinic-c", 9)}
    assert {p["head"] for p in summary["peers"]} <= {head for _, head in own.peers.values()}


def test_without_others_the_report_says_that_nobody_elses_word_is_in_it(consortium: Consortium, tmp_path: Path) -> None:
    path, summary = make(consortium, tmp_path)
    assert summary["anchors"] == []
    with zipfile.ZipFile(path) as archive:
        assert "nobody else's word was given" in archive.read(f"{FOLDER}/report.html").decode()


def test_only_the_hospitals_own_key_makes_a_bundle(consortium: Consortium, tmp_path: Path) -> None:
    with pytest.raises(PrivacyError) as caught:
        make(consortium, tmp_path, signing=KEYS["clinic-b"])
    assert caught.value.code == "LEDGER_OWNER"
    assert not list(tmp_path.iterdir())


def test_a_study_that_the_home_does_not_hold(consortium: Consortium, tmp_path: Path) -> None:
    with pytest.raises(RunError) as caught:
        make(consortium, tmp_path, study="00ff")
    assert caught.value.code == "AUDIT_EVIDENCE"
    assert make(consortium, tmp_path, study=study().hash[:10])[1]["study"]["hash"] == study().hash


def test_an_earlier_study_of_the_home_has_its_own_bundle(tmp_path: Path) -> None:
    made, first, second = Consortium(tmp_path / "run"), study("first", 2, 2.0), study()
    home = made.hospitals[NAME].home
    made.join(first)
    made.round(first, 1)
    past = home / "past" / first.hash[:16]
    past.mkdir(parents=True)
    for name in ("study.json", "certificates"):
        shutil.move(home / name, past / name)
    made.join(second)
    path, summary = make(made, tmp_path, study=first.hash)
    assert path.name == f"audit-first-{NAME}.zip"
    assert summary["study"]["name"] == "first"
    assert [s["name"] for s in summary["all_studies"]["studies"]] == ["first", "paper"]
    assert summary["all_studies"]["epsilon"] == pytest.approx(summary["privacy"]["epsilon"])
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    assert check_alone(tmp_path / path.stem).returncode == 0


def test_a_failure_is_told_on_top_and_by_its_code(tmp_path: Path) -> None:
    made, of = Consortium(tmp_path / "run"), study()
    made.join(of)
    made.round(of, 1, uncharged=NAME)
    path, summary = make(made, tmp_path)
    assert summary["verdict"] == "failed"
    assert "AUDIT_UNCHARGED" in {check["code"] for check in summary["checks"]}
    with zipfile.ZipFile(path) as archive:
        page = archive.read(f"{FOLDER}/report.html").decode()
    assert re.search(r'class="verdict bad">\s*<p>NOT in order: .*AUDIT_UNCHARGED', page)


def test_a_certificate_that_nobody_can_open_is_evidence_too(consortium: Consortium, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(consortium.hospitals[NAME].home, home)
    first = home / "certificates" / "round-0001.json"
    first.with_name("round-0001-again.json").write_bytes(first.read_bytes())
    first.with_name("round-0003.json").write_text('{"header": "not JSON", "signature": ""}')
    path, summary = bundle.make(home, out=tmp_path, signing=KEYS[NAME], made=MADE)
    assert summary["verdict"] == "failed"
    with zipfile.ZipFile(path) as archive:
        assert sum("/certificates/" in name for name in archive.namelist()) == 4


def test_findings_are_of_this_home_and_of_no_namesake(consortium: Consortium, tmp_path: Path) -> None:
    other = tmp_path / NAME
    shutil.copytree(consortium.hospitals[NAME].home, other)
    lines = (other / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (other / "ledger.jsonl").write_bytes(b"".join(lines[:4]))
    _, summary = make(consortium, tmp_path, others=[other])
    checks = [check["check"] for check in summary["checks"]]
    assert len(checks) == len(set(checks))
    assert summary["verdict"] == "passed"


def test_seeded_noise_is_never_in_order(tmp_path: Path) -> None:
    made, of = Consortium(tmp_path / "run"), study()
    made.join(of)
    made.hospitals[NAME].train(of, 1, noise_source="INSECURE-seed")
    path, summary = make(made, tmp_path)
    assert summary["insecure_noise"]
    assert summary["verdict"] == "failed"
    with zipfile.ZipFile(path) as archive:
        assert "no privacy guarantee" in archive.read(f"{FOLDER}/report.html").decode()


def test_the_summary_is_what_its_schema_describes(files: Files) -> None:
    schema, summary = json.loads(files["summary_schema.json"]), json.loads(files["summary.json"])
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(summary)
    for wrong in ({"patients": 12}, {"verdict": "fine"}, {"made": "yesterday"}):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(summary | wrong)


def test_a_summary_that_does_not_fit_its_schema_is_not_written(
    consortium: Consortium, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "SCHEMA_VERSION", "2")
    with pytest.raises(RunError) as caught:
        make(consortium, tmp_path)
    assert caught.value.code == "RUN_STATE"


def test_the_table_has_every_record_and_no_formula(consortium: Consortium, files: Files) -> None:
    rows = list(csv.DictReader(io.StringIO(files["ledger.csv"].decode())))
    history = read(consortium.hospitals[NAME].path)
    assert [row["line_sha256"] for row in rows] == [record.line_sha256 for record in history.records]
    assert [row["reason"] for row in rows if row["kind"] == "void"] == ["'=the folder could not be read"]
    assert {row["sampling"] for row in rows if row["kind"] == "charge"} == {"passed", "too-few"}
    assert {row["sampling"] for row in rows if row["kind"] == "open"} == {""}
    assert all(row["steps"] == "25" for row in rows if row["kind"] == "charge")


def test_the_bill_of_materials_lists_what_is_installed(files: Files) -> None:
    bill = json.loads(files["sbom.cdx.json"])
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "fedmedgan"
    named = {part["name"]: part for part in bill["components"]}
    assert {"torch", "opacus", "cryptography", "dp-accounting", "pydicom", "pydantic-core"} <= set(named)
    assert named["opacus"]["purl"] == "pkg:pypi/opacus@1.6.0"
    assert "pytest" not in named
    assert bill_of_materials(MADE) == bill_of_materials(MADE)


# ---- what it says


def test_the_summary_agrees_with_the_ledger(consortium: Consortium, files: Files) -> None:
    summary, of = json.loads(files["summary.json"]), study()
    history = read(consortium.hospitals[NAME].path)
    privacy = summary["privacy"]
    assert privacy["accountants"]["pld"] == epsilon_pld(history.spent(of.hash), of.privacy.delta)
    assert privacy["epsilon"] == max(privacy["accountants"].values())
    assert privacy["epsilon_replace_one"] > privacy["epsilon"]
    assert (privacy["rounds"], privacy["reservations"], privacy["patients_declared"]) == (3, 4, 1000)
    assert summary["tests_of_rounds"]["sampling"] == {"passed": 2, "too-few": 1}
    assert summary["verdict"] == "passed"
    assert summary["hospital"]["head"] == history.head
    notable = {(r["kind"], r["words"].split(":")[0]) for r in summary["records"]["notable"]}
    assert ("void", "reservation 7 taken back") in notable


def test_the_page_says_epsilon_with_unit_adjacency_sampling_and_in_words(files: Files) -> None:
    summary, page = json.loads(files["summary.json"]), files["report.html"].decode()
    text = re.sub(r"<[^>]+>", "", page)
    for phrase in (
        f"{words.rounded_up(summary['privacy']['epsilon'])} of 4",
        words.at_most(summary["privacy"]["certainty"]),
        "one patient with all of his or her images and labels",
        "Adding or removing one patient; Poisson sampling of patients",
        "the same noise gives epsilon",
        "nobody ran it in this home",
        "Sign-off",
    ):
        assert phrase in text, phrase


def test_the_page_loads_nothing_and_runs_nothing(files: Files) -> None:
    page = files["report.html"].decode()
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    assert not re.findall(r"<(?:img|link|iframe)\b", page)
    chart = re.search(r'<svg viewBox[^>]*aria-label="([^"]+)"', page)
    assert chart is not None
    assert "paper" in chart[1]
    assert not re.findall(r"#[0-9a-f]{6}\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL))


def test_what_others_wrote_is_escaped(files: Files) -> None:
    found = json.loads(files["summary.json"])
    found["checks"][0]["words"] = "<script>alert(1)</script>"
    found["attacks"][0]["findings"] = [finding("<i>planted</i>")]
    found["attacks"][0]["verdict"] = "passed"
    page = report.page(found)
    assert "<script>" not in page
    assert "<i>planted" not in page
    assert "<b>nobody" not in page


def test_attacks_on_patients_are_marked_as_confidential(files: Files) -> None:
    summary, page = json.loads(files["summary.json"]), files["report.html"].decode()
    assert [(a["attack"], a["verdict"]) for a in summary["attacks"]] == [
        ("one-run", "too-few"), ("many-run", "not-run"), ("generator", "too-few"),
    ]  # fmt: skip
    assert "Confidential:" in page
    shown = summary["attacks"][2]["findings"][0]
    assert shown["numbers"] == {"generated_images": 4000}
    assert (shown["estimate"], shown["lower_bound"], shown["ceiling"]) == (0.51, 0.49, 0.99)
    only_mirror = json.loads(files["summary.json"])
    only_mirror["attacks"][2] |= {"verdict": "not-run", "findings": []}
    assert "Confidential:" not in report.page(only_mirror)


def test_a_study_without_a_round_has_a_page_without_a_chart(tmp_path: Path) -> None:
    made = Consortium(tmp_path / "run")
    made.join(study())
    path, summary = make(made, tmp_path)
    assert summary["privacy"]["epsilon"] == 0
    with zipfile.ZipFile(path) as archive:
        page = archive.read(f"{FOLDER}/report.html").decode()
    assert "No round was reserved" in page
    assert "<svg" not in page


def test_two_pages_are_for_the_board_when_it_is_printed(unpacked: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None or shutil.which("pdftotext") is None:
        pytest.skip("no chromium or no pdftotext on this machine")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--no-pdf-header-footer",
        f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'report.pdf'}",
    ]  # fmt: skip
    subprocess.run([browser, *flags, (unpacked / "report.html").as_uri()], capture_output=True, timeout=60, check=True)
    printed = subprocess.run(["pdftotext", "-layout", tmp_path / "report.pdf", "-"], capture_output=True, check=True)
    pages = printed.stdout.decode().split("\f")
    assert "What was promised to each patient" in pages[0]
    assert "Sign-off" in pages[1]
    assert "Ethics board" in pages[1]
    assert pages[2].strip().startswith("Annex A")


def test_one_round_or_a_broken_ceiling_can_be_drawn() -> None:
    bars = [charts.Bar(f"study-{i}", 1.0 + i, 2.0) for i in range(9)]
    drawn = charts.spent([(1, 3.5)], bars, charts.Bar("all together", 12.0, 10.0), "alt <text>")
    assert "study-8" in drawn
    assert "study-1" not in drawn
    assert "12.00 of 10" in drawn
    assert "alt &lt;text&gt;" in drawn


# ---- spending, round by round


def test_spending_follows_the_ledger(tmp_path: Path) -> None:
    event, other = TrainingSteps(1.1, 0.05, 20), TrainingSteps(2.0, 0.1, 5)
    one, two = "1" * 64, "2" * 64
    with ledger_at(tmp_path / "ledger.jsonl") as ledger:
        ledger.open_study(one, terms())
        ledger.charge(ledger.reserve(one, 1, [event]), 15, **PROOF)
        ledger.void(ledger.reserve(one, 2, [event]), "no data")
        ledger.reserve(one, 2, [event])  # never settled
        ledger.open_study(two, terms(delta=1e-5))
        ledger.charge(ledger.reserve(two, 1, [event, other]), 20, 5, **PROOF)
    history = read(tmp_path / "ledger.jsonl")
    rows = spending(history)
    assert [(r.study[0], r.round, r.state, r.steps) for r in rows] == [
        ("1", 1, "charged", 15), ("1", 2, "voided", 0), ("1", 2, "unsettled", 20), ("2", 1, "charged", 20),
        ("2", 1, "charged", 5),
    ]  # fmt: skip
    first = epsilon_pld([event.with_steps(15)], 1e-4)
    assert [r.epsilon for r in rows[:3]] == [first, first, epsilon_pld(history.spent(one), 1e-4)]
    assert rows[3].epsilon is None  # the reservation's second kind of steps carries the number
    assert rows[4].epsilon == epsilon_pld(history.spent(two), 1e-5)
    assert rows[4].epsilon_all == epsilon_pld(history.spent(), 1e-5)
    assert rows[1].reason == "no data"
    assert rows[0].failed == ()


def test_epsilon_of_a_long_study_is_worked_out_for_some_rounds_and_the_last(tmp_path: Path) -> None:
    with ledger_at(tmp_path / "ledger.jsonl") as ledger:
        ledger.open_study("1" * 64, terms())
        for number in range(1, 31):
            ledger.charge(ledger.reserve("1" * 64, number, [TrainingSteps(1.1, 0.05, 2)]), 2, **PROOF)
    history = read(tmp_path / "ledger.jsonl")
    rows = spending(history, most_epsilons=4)
    assert [r.round for r in rows if r.epsilon is not None] == [1, 11, 20, 30]
    assert rows[-1].epsilon == epsilon_pld(history.spent(), 1e-4)


@given(st.lists(st.integers(), max_size=50, unique=True), st.integers(2, 20))
@settings(deadline=None, max_examples=50)
def test_evenly_keeps_the_ends(items: list[int], most: int) -> None:
    chosen = evenly(items, most)
    assert len(chosen) == min(len(items), most)
    assert list(chosen) == [item for item in items if item in chosen]
    assert list(chosen[:1]) == items[:1]
    assert list(chosen[-1:]) == items[-1:]


# ---- words


@given(st.floats(0, 100))
@settings(deadline=None, max_examples=100)
def test_a_promise_is_never_rounded_down(value: float) -> None:
    assert float(words.rounded_up(value)) >= value - 1e-9
    assert float(words.rounded_up(value)) <= value + 0.01 + 1e-9


@given(st.floats(0, 60))
@settings(deadline=None, max_examples=100)
def test_certainty_is_a_bound_below_one_hundred_percent(epsilon: float) -> None:
    shown = words.at_most(words.certainty(epsilon))
    assert shown == "over 99.99\u00a0%" or float(shown.split("\u00a0")[0]) / 100 >= words.certainty(epsilon) - 1e-9


def test_certainties_that_the_design_names() -> None:
    assert [words.at_most(words.certainty(e)).replace("\u00a0", " ") for e in (0, 1, 2, 4, 8)] == [
        "50.0 %", "73.2 %", "88.1 %", "98.3 %", "99.97 %",
    ]  # fmt: skip


def test_a_bar_is_full_only_at_its_ceiling() -> None:
    assert words.bar(0, 8, 4) == "░░░░"
    assert words.bar(1e-9, 8, 4) == "█░░░"
    assert words.bar(9, 8, 4) == "████"


@pytest.mark.parametrize(
    ("verdict", "phrase"), [("failed", "The promise is broken"), ("too-few", "too little"), ("passed", "no proof")]
)
def test_what_an_attack_means_is_said_with_its_confidence_and_ceiling(verdict: str, phrase: str) -> None:
    lines = "\n".join(words.meaning(finding("near", verdict)))
    assert "AUC is at least 0.49, with 95 % confidence" in lines
    assert "ceiling   0.99" in lines
    assert phrase in lines


# ---- results that are kept


def test_results_are_kept_in_their_order(tmp_path: Path) -> None:
    keep(tmp_path, "one-run", finding("a"), time="2031-01-02T00:00:00Z")
    keep(tmp_path, "one-run", finding("b"), time="2031-01-01T00:00:00Z")
    assert [r.findings[0].name for r in results.kept(tmp_path)] == ["b", "a"]
    assert (tmp_path / "attacks").stat().st_mode & 0o077 == 0
    (tmp_path / "attacks" / "one-run-0009.json").write_text('{"attack": "one-run"}')
    with pytest.raises(RunError) as caught:
        results.kept(tmp_path)
    assert caught.value.code == "RUN_STATE"


@pytest.mark.parametrize(
    ("verdicts", "worst"),
    [((), "too-few"), (("passed",), "passed"), (("passed", "too-few"), "too-few"), (("failed", "passed"), "failed")],
)
def test_the_verdict_of_an_attack_is_its_worst(verdicts: tuple[str, ...], worst: str) -> None:
    findings = tuple(finding(str(i), verdict) for i, verdict in enumerate(verdicts))
    values = {"attack": "generator", "study": "", "time": MADE, "findings": findings}
    assert results.Result.model_validate(values).verdict == worst


# ---- the docs


def test_every_test_that_the_sharp_edges_name_is_there() -> None:
    text = (ROOT / "docs" / "sharp-edges.md").read_text()
    wanted = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(wanted) >= 25
    missing = [f"{f}::{n}" for f, n in wanted if f"\ndef {n}(" not in (ROOT / "tests" / f).read_text()]
    assert not missing


def test_the_page_for_data_protection_officers_names_every_file_of_the_bundle(files: Files) -> None:
    text = (ROOT / "docs" / "auditing.md").read_text()
    named = {name for name in files if "/" not in name} | {"certificates/"}
    assert not [name for name in sorted(named) if f"`{name}`" not in text]
