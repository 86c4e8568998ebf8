"""Is this hospital's own machine fit for a round, and is its state what it was? Nothing here asks anybody else."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from fedmedgan.deploy.check import Place, Skip, check
from fedmedgan.shared.errors import CryptoError, DataError, ModelError, PrivacyError, RunError, StudyError
from fedmedgan.shared.secure_sum.keys import HospitalKeys
from fedmedgan.shared.study import Images

MIN_FREE_BYTES = 5 * 10**9
MIN_FREE_MODELS = 4
"""A round writes the model, the Adam states, the update and its ciphertexts."""
MIN_GPU_BYTES = 2 * 10**9
SAMPLE_FILES = 8
"""Files of the data folder that are decoded."""


@check("policy")
def policy(place: Place) -> str:
    rules = place.policy()
    return f"{rules.site}, epsilon ceiling {rules.max_epsilon:g} over all studies"


@check("disk")
def disk(place: Place) -> str:
    model = place.home / "model.safetensors"
    needed = max(MIN_FREE_BYTES, MIN_FREE_MODELS * (model.stat().st_size if model.exists() else 0))
    try:
        free = shutil.disk_usage(place.home).free
        with tempfile.NamedTemporaryFile(dir=place.home, prefix=".doctor-") as file:
            file.write(b"can this disk keep a ledger?")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RunError("SITE_DISK", f"cannot be written ({error.strerror})", str(place.home)) from None
    if free < needed:
        raise RunError("SITE_DISK", f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed", str(place.home))
    return f"{free / 1e9:.0f} GB free, writes reach the disk"


@check("GPU")
def gpu(place: Place) -> str:
    wanted = place.policy().device
    if wanted == "cpu":
        raise Skip('policy.toml: device = "cpu"')
    import torch

    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise RunError("RUN_DEVICE", "no CUDA device is available", "policy.toml: device")
        raise Skip("no CUDA device; training runs on the CPU")
    free, total = torch.cuda.mem_get_info()
    said = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if free < MIN_GPU_BYTES:
        raise RunError("SITE_GPU", f"{said}, {MIN_GPU_BYTES / 1e9:.0f} GB are needed", torch.cuda.get_device_name())
    return f"{torch.cuda.get_device_name()}, {said}"


@check("data")
def data(place: Place) -> str:
    from fedmedgan.client.data.folder import scan
    from fedmedgan.client.data.limits import Limits
    from fedmedgan.client.data.patients import RADIOLOGY
    from fedmedgan.client.data.pool import WorkerPool

    rules, folder = place.policy(), place.policy().data
    files = [entry for entry in scan(Path(folder)) if not entry.problem]
    images = Images(modalities=RADIOLOGY)
    if (place.home / "study.json").exists():
        agreed = place.agreement().study
        images = agreed.images
        if len(files) < agreed.site(rules.site).patients:
            raise DataError("DATA_TOO_FEW", f"{len(files)} files for more patients than that", folder)
    looked_at = min(SAMPLE_FILES, len(files))
    sample = [files[i * len(files) // looked_at].path for i in range(looked_at)]
    with WorkerPool(images.size, images.modalities, os.urandom(32), Limits(), workers=1) as pool:
        codes = [result.code for _, result in pool.examine(sample)]
    good, bad = codes.count(""), ", ".join(sorted(set(codes) - {""}))
    if good == 0:
        what = f"{len(files)} files, none of {looked_at} looked at can be used ({bad or 'there is none'})"
        raise DataError("SITE_DATA", what, folder)
    return f"{len(files)} files, {good} of {looked_at} looked at can be used" + (f" ({bad})" if bad else "")


@check("keys")
def keys(place: Place) -> str:
    if not (place.home / "keys").exists():
        hint = "`fedmedgan site init` makes them, once; if there were some, restore them from the hospital's backup"
        raise CryptoError("KEY_MISSING", "this hospital has no keys", "keys", hint=hint)
    epoch = HospitalKeys.load(place.home / "keys").epoch
    if epoch is None:
        return "identity; no key epoch yet, a study begins with one"
    return f"identity and key epoch {epoch.number}"


@check("study")
def study(place: Place) -> str:
    from fedmedgan.client.joining import LEFT, ROTATION_ALLOWED
    from fedmedgan.client.key_epochs import KeyEpochs

    agreement, rules, own = place.agreement(), place.policy(), HospitalKeys.load(place.home / "keys")
    agreed, site = agreement.study, agreement.study.site(rules.site)
    listed = (site.signing_key, site.exchange_key, site.wrapping_key)
    if listed != (own.signing_public, own.exchange_public, own.wrapping_public):
        raise StudyError("STUDY_KEYS", "the study lists other keys for this hospital", "study.json")
    rules.grant(agreed)
    if site.name not in agreement.signatures:
        raise StudyError("STUDY_SIGNATURE", "this hospital has not signed the study", "study.json")
    if (place.home / LEFT).exists():
        raise RunError("RUN_LEFT", "this hospital has left", agreed.name)
    if not (place.home / ROTATION_ALLOWED).exists():
        KeyEpochs(place.home, agreed, rules, own, applied_round=0).check_running()
    others = f"signed by all {len(agreed.sites)} hospitals"
    if agreement.missing():
        lacking = ", ".join(agreement.missing())
        others = f"signed by this hospital; the signatures of {lacking} come with the first roll call"
    return f"{agreed.name}, granted by the policy, {others}"


@check("model")
def model(place: Place) -> str:
    notes = _notes(place, "model.safetensors")
    if not notes:
        return "none yet: no round was applied"
    if notes["study"] != place.agreement().study.hash:
        raise ModelError("MODEL_MISMATCH", "the model belongs to another study", "model.safetensors")
    return f"of round {notes['round']}, undamaged"


@check("ledger")
def ledger(place: Place) -> str:
    history, own, notes = place.history(), place.policy().site, _notes(place, "model.safetensors")
    if history.hospital not in ("", own):
        raise PrivacyError("LEDGER_OWNER", f"it belongs to {history.hospital!r}", "ledger.jsonl")
    history.check_anchor(int(notes.get("ledger_seq", 0)), str(notes.get("ledger_head", "")))
    if history.seq and history.signing_key != HospitalKeys.load(place.home / "keys").signing_public:
        raise PrivacyError("LEDGER_OWNER", "it is signed with another key than this hospital's", "ledger.jsonl")
    if history.seq:
        place.book().check(history, place.home / "ledger.jsonl")
    if (place.home / "study.json").exists() and place.agreement().study.hash not in history.studies:
        raise PrivacyError("LEDGER_ROLLBACK", "the study was joined, the ledger does not hold it", "ledger.jsonl")
    return f"{history.seq} records, the chain is whole, the last one is signed by this hospital"


@check("budget")
def budget(place: Place) -> str:
    from fedmedgan.client.outlook import outlook

    place.agreement()
    found, said = outlook(place.home), []
    for scope, decision in (("in this study", found.in_study), ("in all", found.in_all)):
        if found.next_round and not decision.allowed:
            what = f"epsilon would be {decision.after_epsilon:.6g} {scope}, the ceiling is {decision.ceiling:g}"
            raise PrivacyError("BUDGET_EXHAUSTED", what, f"round {found.next_round}")
        if not decision.agree:
            raise PrivacyError("PRIVACY_ACCOUNTANTS", "the two accountants disagree", scope)
        said.append(f"{decision.spent_epsilon:.3g} of {decision.ceiling:g} {scope}")
    after = f"round {found.next_round} fits" if found.next_round else "no further round is to be paid"
    return f"epsilon {', '.join(said)}; {after}"


def _notes(place: Place, name: str) -> dict[str, str | int]:
    """Notes of a safetensors file of the home; empty where it is not there yet."""
    from fedmedgan.client import checkpoint

    return checkpoint.read(place.home / name)[1] if (place.home / name).exists() else {}
