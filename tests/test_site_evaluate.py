"""``fedmedgan site evaluate``: numbers, and which of them must stay at the hospital."""

from __future__ import annotations

import json

from test_cli_deploy import run
from test_cycle import collect, hospitals, open_round

from fedmedgan.simulations import consortium, phantoms


def test_a_hospital_is_told_how_good_its_images_are_and_what_must_stay(keyed, tmp_path):
    folder, study = keyed
    home = consortium.homes(folder, study)[0]
    early = run("site", "evaluate", "--home", home)
    assert early.returncode == 2
    assert "error[MODEL_MISMATCH]" in early.stderr
    total, _ = collect(keyed, open_round(study, 1, key_id=hospitals(keyed)[0].keys.key_id))
    hospitals(keyed)[0].apply_sum(*total.certify())
    ledger = (home / "ledger.jsonl").read_bytes()

    phantoms.write_hospital(tmp_path / "others", patients=16, seed=77, vendor=phantoms.vendor_for(0))
    options = ("--home", home, "--holdout", tmp_path / "others", "--images", "200")
    said = run("site", "evaluate", *options)
    assert said.returncode == 0, said.stderr
    assert "must not leave this hospital" in " ".join(said.stdout.split())
    found = json.loads(run("--format", "json", "site", "evaluate", *options).stdout)["data"]
    privacy = {m["name"]: m["privacy"] for m in [*found["measurements"], *found["not_measured"]]}
    assert found["must_stay"]
    assert (privacy["ms_ssim"], privacy["duplicates"]) == ("free", "free")
    assert {privacy[name] for name in ("tstr", "trts", "mmd", "copies")} == {"sensitive"}
    assert (home / "ledger.jsonl").read_bytes() == ledger, "nothing is charged, because nothing may leave"
