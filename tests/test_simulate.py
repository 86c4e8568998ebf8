"""`fedmedgan simulate` end to end: real Flower engine, real Ray, real DICOM, real crypto, and the report."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_study

from fedmedgan.client import checkpoint
from fedmedgan.shared.privacy.history import read as read_ledger
from fedmedgan.shared.secure_sum.keys import HospitalKeys
from fedmedgan.simulations import consortium, phantoms, record

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FEDMEDGAN = str(Path(sys.executable).with_name("fedmedgan"))
TIMEOUT = 600


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess:
    command = [FEDMEDGAN, *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=env)


def write_study(path: Path, sites: int = 4, **sections) -> Path:
    """A tiny study as the TOML that a user would write."""
    values = tiny_study(sites, **sections).model_dump(mode="json")
    lines = [f"{k} = {json.dumps(v)}" for k, v in values.items() if not isinstance(v, dict | list)]
    for site in values["sites"]:
        lines += ["[[sites]]"] + [f"{k} = {json.dumps(v)}" for k, v in site.items()]
    for name, section in values.items():
        if isinstance(section, dict):
            lines += [f"[{name}]"] + [f"{k} = {json.dumps(v)}" for k, v in section.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with everything: a site on files of its own, a dropout in round 1, arms, and the report."""
    folder = tmp_path_factory.mktemp("simulate")
    own = folder / "own-dicom"
    phantoms.write_hospital(own, patients=30, seed=99, vendor=phantoms.vendor_for(1))
    others = folder / "other-patients"
    phantoms.write_hospital(others, patients=30, seed=98, vendor=phantoms.vendor_for(1))
    study = write_study(folder / "study.toml")
    options = ("--arms", "--data", f"site-1={own}", "--test", others, "--drop", "site-3@1", "--out", folder / "run")
    done = run("--format", "json", "simulate", study, *options)
    assert done.returncode == 0, done.stderr
    return folder / "run", json.loads(done.stdout)


def test_it_ends_with_a_report_and_one_envelope(finished):
    folder, envelope = finished
    assert envelope["status"] == "ok"
    assert Path(envelope["data"]["report"]) == folder / "report.html"
    assert (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "report.json").read_text())["schema_version"]
    assert envelope["data"]["rounds"] == 2


def test_every_hospital_holds_the_same_model_and_it_moved(finished):
    folder, _ = finished
    study = record.load(folder).study
    models = [checkpoint.read(home / "model.safetensors") for home in consortium.homes(folder, study)]
    assert {notes["round"] for _, notes in models} == {2}
    assert len({checkpoint.content_hash(arrays) for arrays, _ in models}) == 1
    first, last = (folder / "hospitals" / "site-0" / "samples" / f"round-000{n}.png" for n in (1, 2))
    assert first.read_bytes() != last.read_bytes()


def test_the_dropout_was_left_out_uncharged_and_came_back(finished):
    folder, _ = finished
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    aggregated = {e["round"]: e for e in events if e["event"] == "round_aggregated"}
    assert aggregated[1]["attempt"] == 2
    assert "site-3" not in aggregated[1]["cohort"]
    assert "site-3" in aggregated[2]["cohort"]
    charges = {
        site.name: sum(
            r.kind == "charge" for r in read_ledger(consortium.home_of(folder, site.name) / "ledger.jsonl").records
        )
        for site in record.load(folder).study.sites
    }
    assert charges == {"site-0": 2, "site-1": 2, "site-2": 2, "site-3": 1}


def test_the_server_side_holds_no_key_and_no_plain_update(finished):
    folder, _ = finished
    homes = consortium.homes(folder, record.load(folder).study)
    epochs = {HospitalKeys.load(home / "keys").epoch for home in homes}
    assert len(epochs) == 1, "one key, made by the hospitals"
    (epoch,) = epochs
    server = [p for p in folder.rglob("*") if p.is_file() and "hospitals" not in p.relative_to(folder).parts]
    assert {"journal.db", "flower.log", "events.jsonl"} <= {p.name for p in server}
    for path in server:
        for secret in (epoch.he_secret[64:128], epoch.mac_root):
            forms = (secret, secret.hex().encode(), base64.b64encode(secret)[:40])
            assert not any(form in path.read_bytes() for form in forms), path


def test_no_patient_id_is_anywhere_but_in_the_dicom_files(finished):
    """The hospital's own cache lists file names, and the phantoms' files are named after their patients."""
    folder, _ = finished
    for path in folder.rglob("*"):
        if path.is_file() and not {"dicom", "cache"} & set(path.parts):
            assert b"PHANTOM-" not in path.read_bytes(), path


def test_arms_are_there_on_the_same_budget_and_marked(finished):
    folder, _ = finished
    arms = {arm["name"]: arm for arm in json.loads((folder / "arms.json").read_text())["arms"]}
    assert set(arms) == {"federated", "no-privacy", *(f"alone-site-{i}" for i in range(4))}
    assert arms["no-privacy"]["epsilon"] is None
    assert arms["no-privacy"]["private"] is False
    spent = record.load(folder).final_epsilon
    assert arms["alone-site-0"]["epsilon"] == pytest.approx(spent["site-0"])
    assert arms["alone-site-3"]["epsilon"] > spent["site-3"], "alone it trained the round that it missed"
    assert arms["federated"]["epsilon"] == pytest.approx(max(spent.values()))
    with np.load(folder / "arms" / "federated.npz") as images:
        assert images["images_N1HW"].shape[1:] == (1, 28, 28)
    assert 0 <= arms["federated"]["tstr"]["accuracy"]["mean"] <= 1


def test_a_dropout_below_three_stops_the_run_with_one_line(tmp_path):
    study = write_study(tmp_path / "study.toml", sites=3)
    done = run("simulate", study, "--drop", "site-0@1", "--no-arms", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error[RUN_QUORUM]: 2 of 3 hospitals")
    assert "Traceback" not in done.stderr


def test_an_existing_ray_cluster_of_two_nodes_is_used(tmp_path, ray_folder):
    ray = str(Path(sys.executable).with_name("ray"))
    port = "46379"
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": ray_folder}
    common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
    head = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", *common]
    head.append("--include-dashboard=false")
    worker = [ray, "start", f"--address=127.0.0.1:{port}", *common]
    processes = []
    try:
        for command in (head, worker):
            with open(tmp_path / "ray.log", "a") as log:
                processes.append(subprocess.Popen([*command, "--block"], env=env, stdout=log, stderr=log))
            wait_for_nodes(port, len(processes))
        study = write_study(tmp_path / "study.toml", training={"rounds": 1})
        done = run("simulate", study, "--no-arms", "--ray-address", f"127.0.0.1:{port}", "--out", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert nodes_of_hospitals(tmp_path / "run") == 2
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)


def wait_for_nodes(port: str, expected: int) -> None:
    code = f"""
import ray, time
for _ in range(120):
    try:
        ray.init(address="127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
        if sum(n["Alive"] for n in ray.nodes()) >= {expected}:
            break
        ray.shutdown()
    except ConnectionError:
        pass
    time.sleep(0.5)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=180)


def nodes_of_hospitals(folder: Path) -> int:
    """On how many Ray nodes hospitals worked."""
    return len({json.loads(line)["node"] for line in (folder / "placement.jsonl").read_text().splitlines()})
