"""Reading a run folder. `build_run` writes a plausible one; the tests of report and progress use it too."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import Aggregation, Study, from_dict
from fedmedgan.simulations import record

START = 1_790_000_000.0
PARAMETERS = 201_473
SITES = {"north": 240, "south": 180, "east": 150, "west": 120}
SIGMA = {"north": 0.71, "south": 0.82, "east": 0.92, "west": 1.06}
ROUND_WITHOUT_EAST = 4


def make_study(rounds: int = 10, **parts: Any) -> Study:
    sites = [{"name": name, "patients": n} for name, n in SITES.items()]
    return from_dict({"name": "chest-demo", "sites": sites, "training": {"rounds": rounds}, **parts})


def picture(study: Study, clarity: float, seed: int) -> bytes:
    """A grid like those of a run: one row a class, 8 columns; from noise (clarity 0) to a drawn chest (1)."""
    rng, size = np.random.default_rng(seed), study.images.size
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    rows = []
    for label in range(len(study.images.classes)):
        row = []
        for _ in range(8):
            width, tilt = rng.uniform(0.28, 0.36), rng.uniform(-0.05, 0.05)
            image = 0.75 * np.exp(-((x / 0.85) ** 8) - (y / 1.1) ** 8)
            for side in (-1, 1):
                lung = ((x - side * 0.42 - tilt) / width) ** 2 + ((y + 0.05) / 0.68) ** 2
                image -= 0.5 / (1 + np.exp(12 * (lung - 1)))
            image += 0.06 * np.sin(17 * (y + 0.5 * x**2)) + 0.12 * np.exp(-((x / 0.1) ** 2))
            if label:
                side, height = rng.choice([-1, 1]), rng.uniform(-0.3, 0.35)
                image += 0.4 * np.exp(-(((x - side * 0.4) / 0.16) ** 2) - ((y - height) / 0.16) ** 2)
            noise = rng.normal(0.45, 0.22, image.shape)
            row.append(clarity * image + (1 - clarity) * noise + rng.normal(0, 0.02, image.shape))
        rows.append(np.concatenate(row, axis=1))
    pixels = (np.clip(np.concatenate(rows), 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def append(path: Path, event: str, time: float, **fields: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": round(time, 3), "event": event, **fields}) + "\n")


class RunWriter:
    """Writes a run folder step by step, so that a test can stop anywhere."""

    def __init__(self, folder: Path, study: Study | None = None) -> None:
        self.folder, self.study = folder, study or make_study()
        self.sites = [site.name for site in self.study.sites]
        self.time = START
        self.rng = np.random.default_rng(5)
        folder.mkdir(parents=True, exist_ok=True)
        body = {"hash": self.study.hash, "study": self.study.model_dump(mode="json")}
        (folder / "study.json").write_text(json.dumps(body))

    def say(self, event: str, **fields: Any) -> None:
        append(self.folder / "events.jsonl", event, self.time, **fields)

    def say_at(self, site: str, event: str, **fields: Any) -> None:
        append(self.folder / "hospitals" / site / "events.jsonl", event, self.time, **fields)

    def open(self) -> None:
        self.say(
            "run_opened",
            study_hash=self.study.hash,
            sites=sorted(self.sites),
            parameters=PARAMETERS,
            float32_bytes=4 * PARAMETERS,
        )
        for i, site in enumerate(self.sites):
            patients = self.study.sites[i].patients + 3 * i + 1
            refused = {"DICOM_MODALITY": 4, "DICOM_BURNED_IN": 1} if i % 2 else {"DICOM_TRUNCATED": 1}
            images = int(patients * 2.4)
            counts = {"images": images, "patients": patients, "refused": refused}
            self.say_at(site, "data_loaded", **counts, seconds=1.7 + i)
            self.draw(site, 0)
            (self.folder / "hospitals" / site / "dicom").mkdir()

    def draw(self, site: str, number: int) -> None:
        if site != self.sites[0]:
            return
        samples = self.folder / "hospitals" / site / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        clarity = 0.9 * number / self.study.training.rounds
        (samples / f"round-{number:04d}.png").write_bytes(picture(self.study, clarity, seed=3))

    def train(self, site: str, number: int) -> None:
        share, private = math.sqrt(number / self.study.training.rounds), self.study.is_private
        site_index = self.sites.index(site)
        names, told = ("noise", "clipping", "rows", "sampling"), self.study.gan.private == "discriminator"
        verdicts = ("passed", "passed", "passed", "too-few") if private else ("not-run",) * 4
        self.say_at(
            site,
            "trained",
            round=number,
            steps=self.study.steps_per_round,
            seconds=3.1 + 0.3 * site_index + float(self.rng.uniform(0, 0.4)),
            quantize_seconds=0.011,
            generator_loss=self.loss(site, number),
            discriminator_fake_loss=0.62 - 0.02 * number + 0.03 * site_index if told else 0.0,
            epsilon=(7.95 - 0.11 * site_index) * share if private else None,
            ceiling=self.study.privacy.epsilon if private else None,
            noise_multiplier=SIGMA.get(site, 1.0) if private else None,
            sampling_rate=self.study.sampling_rate(self.study.sites[site_index]),
            checks=dict(zip(names, verdicts, strict=True)),
            method="book-keeping" if private else "plain",
        )

    def loss(self, site: str, number: int) -> float:
        return 0.7 + 0.9 * math.exp(-number / 4) + 0.03 * self.sites.index(site)

    def encrypt(self, site: str, number: int, attempt: int) -> None:
        self.say_at(
            site,
            "encrypted",
            round=number,
            attempt=attempt,
            seconds={"seal": 0.041, "encrypt": 0.068},
            saturated=int(PARAMETERS * 0.002 * (1 + self.sites.index(site)) / number),
            values=PARAMETERS,
            bytes_up=412_083,
        )

    def accept(self, site: str, number: int, attempt: int) -> None:
        loss = self.loss(site, number)
        fields = {"round": number, "attempt": attempt, "site": site, "bytes_up": 412_083}
        self.say("update_accepted", **fields, generator_loss=loss)

    def round(self, number: int, *, apply: bool = True) -> None:
        cohort = sorted(self.sites)
        for attempt in (1, 2) if number == ROUND_WITHOUT_EAST else (1,):
            self.say("round_opened", round=number, attempt=attempt, cohort=cohort)
            for site in cohort:
                if attempt == 1:
                    self.train(site, number)
                if number == ROUND_WITHOUT_EAST and attempt == 1 and site == "east":
                    self.time += 20
                    fields = {"round": number, "attempt": 1, "site": "east", "reason": "RUN_TIMEOUT"}
                    self.say("site_missing", **fields)
                    continue
                self.time += 1.0
                self.encrypt(site, number, attempt)
                self.accept(site, number, attempt)
            if number == ROUND_WITHOUT_EAST and attempt == 1:
                cohort = [site for site in cohort if site != "east"]
        self.say(
            "round_aggregated",
            round=number,
            attempt=attempt,
            cohort=cohort,
            bytes_down=820_406,
            seconds={"local": 4.1 + 0.06 * (number % 3), "aggregation": 0.021 + 0.002 * (number % 2)},
        )
        if not apply:
            return
        self.time += 0.3
        for site in self.sites:
            times = {"decrypt": 0.093, "check": 0.031, "apply": 0.042}
            self.say_at(site, "updated", round=number, seconds=times, model_hash=digest(f"model {number}"))
            self.draw(site, number)
        self.say(
            "round_applied",
            round=number,
            sites=sorted(self.sites),
            model_hash=digest(f"model {number}"),
            generator_loss=float(np.mean([self.loss(site, number) for site in cohort])),
            seconds={"broadcast": 0.31},
        )

    def close(self, rounds: int, reason: str = "rounds") -> None:
        self.say("run_closed", rounds=rounds, reason=reason, model_hash=digest(f"model {rounds}"))

    def compare(self) -> None:
        """The comparison arms, scored by what the recipe is for, and pictures of each hospital's own images."""
        for i, site in enumerate(self.sites):
            (self.folder / "hospitals" / site / "real.png").write_bytes(picture(self.study, 1.0, seed=20 + i))
        (self.folder / "arms").mkdir()
        promised, delta = self.study.is_private, self.study.privacy.delta
        rows: list[tuple[Any, ...]] = [("federated", "together, private (this run)", promised, 7.95, 0.90, 0.86)]
        for i, site in enumerate(SITES):
            rows.append((f"alone-{site}", f"{site} alone, private", promised, 7.9, 0.45, 0.68 - 0.02 * i))
        if self.study.aggregation != Aggregation():
            rows += [("fedavg", "plain averaging, private", promised, 7.95, 0.8, 0.84)]
        if promised:
            rows += [("no-privacy", "together, without privacy", False, None, 0.97, 0.93)]
        arms = []
        for i, (name, label, private, epsilon, clarity, auc) in enumerate(rows):
            (self.folder / "arms" / f"{name}.png").write_bytes(picture(self.study, clarity, seed=3))
            arm = {"name": name, "label": label, "private": private, "epsilon": epsilon if private else None}
            arm |= {"delta": delta if private else None, "picture": f"arms/{name}.png"}
            arms.append({**arm, "seconds": 44.0 - 6 * i, **self.score(i, auc)})
        body: dict[str, Any] = {"arms": arms}
        if arms[0].get("tstr"):
            real_tstr = {"accuracy": {"mean": 0.93, "std": 0.008}, "auc": {"mean": 0.975, "std": 0.004}}
            body["real"] = {"tstr": real_tstr, "label": "train on real", "quality": quality(9)}
        (self.folder / "arms.json").write_text(json.dumps(body))

    def score(self, arm: int, auc: float) -> dict[str, Any]:
        if self.study.gan.task:
            output = {"psnr": 20 + 5 * auc, "ssim": auc, "mae": 0.2 - 0.1 * auc}
            output |= {"psnr_input": 19.3, "ssim_input": 0.7, "mae_input": 0.15, "tested_on": 243}
            if self.study.gan.task == "paired":
                output |= {"dice": auc, "iou": auc - 0.1, "dice_input": 0.3, "iou_input": 0.2}
            return {"similarity": output}
        if self.study.gan.private == "both":
            ways = (("clear", "opacity"), ("opacity", "clear"))
            return {
                "translation": [
                    {"source": a, "target": b, "before": quality(None), "after": quality(None, arm)} for a, b in ways
                ]
            }
        written = {"images": f"arms/arm-{arm}.npz", "images_kept": 1999 - arm, "images_dropped": 1 + arm}
        measured = {"quality": quality(arm), **written}
        if len(self.study.images.classes) == 1:
            return {"tstr": None, **measured}
        accuracy = {"mean": auc - 0.06, "std": 0.012 + 0.002 * arm}
        tstr = {"accuracy": accuracy, "auc": {"mean": auc, "std": 0.01 + 0.003 * arm}}
        return {"tstr": {**tstr, "chance": 0.53, "tested_on": 243}, **measured}


def quality(arm: int | None, translated: int | None = None) -> dict[str, Any]:
    """What `Evaluation.record` gives under the public rule: of images of noise, or of one domain beside the other."""
    extractor = {"extractor_sha256": digest("features"), "extractor_trained_on": "drawn phantoms"}
    settings = {"synthetic_images": 2000, "real_images": 243, "extractor_accuracy": 0.97, **extractor}
    if arm is None:
        kid = 0.9 if translated is None else 0.111 + 0.1 * translated
        found = {"kid": {"kid": kid, "kid_deviation": 0.01}, "mmd": {"mmd": kid / 3}}
        missing = []
    else:
        found = {
            "ms_ssim": {"ms_ssim": 0.51}, "duplicates": {"duplicate_rate": (1 + arm) / 2000},
            "kid": {"kid": 0.125 + arm, "kid_deviation": 0.01}, "precision_recall": {"precision": 0.61, "recall": 0.32},
            "density_coverage": {"density": 1.13, "coverage": 0.44},
        }  # fmt: skip
        missing = [
            {"name": "fid", "privacy": "public", "reason": "FID of 64 features needs at least 65 images; 30 given"}
        ]
    measurements = [
        {"name": name, "privacy": "public", "values": values, "settings": settings} for name, values in found.items()
    ]
    statement = "The real images are public or drawn: phantoms whom no hospital holds"
    parts = {"measurements": measurements, "not_measured": missing}
    return {"rule": "public", "must_stay": False, "statement": statement, **parts}


def build_run(folder: Path, study: Study | None = None) -> Path:
    """A finished run: four hospitals, one of them late in round 4."""
    run = RunWriter(folder, study)
    run.open()
    for number in range(1, run.study.training.rounds + 1):
        run.round(number)
    run.close(run.study.training.rounds)
    run.compare()
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return build_run(tmp_path / "run", make_study(rounds=5, images={"size": 28}))


def test_a_finished_run_is_read_in_full(run_folder: Path) -> None:
    run = record.load(run_folder)
    assert run.study.name == "chest-demo"
    assert [h.name for h in run.hospitals] == list(SITES)
    assert [r.number for r in run.finished_rounds] == [1, 2, 3, 4, 5]
    assert run.opened is not None
    assert run.opened.float32_bytes == 4 * PARAMETERS
    assert run.closed is not None
    assert (run.closed.rounds, run.closed.reason) == (5, "rounds")
    north = run.hospitals[0]
    assert north.loaded is not None
    assert north.loaded.refused == {"DICOM_TRUNCATED": 1}
    assert north.last is not None
    assert north.last.epsilon == pytest.approx(7.95)
    assert list(north.samples) == [0, 1, 2, 3, 4, 5]
    assert [a.name for a in run.arms][:2] == ["federated", "alone-north"]
    assert run.real is not None
    assert run.real.tstr.auc.mean == 0.975
    assert run.insecure_seed is None
    assert run.rounds_done == 5
    assert run.final_epsilon == {h.name: h.last.epsilon for h in run.hospitals if h.last}


def test_a_round_knows_its_attempts_and_counts_the_bytes_of_the_sum_only(run_folder: Path) -> None:
    fourth = record.load(run_folder).rounds[3]
    assert [a.number for a in fourth.attempts] == [1, 2]
    assert [(m.site, m.reason) for m in fourth.attempts[0].missing] == [("east", "RUN_TIMEOUT")]
    assert len(fourth.attempts[0].accepted) == 3
    assert sorted(fourth.bytes_up) == ["north", "south", "west"]


def test_an_unfinished_run_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    run = RunWriter(tmp_path / "run")
    assert record.load(run.folder).opened is None
    run.open()
    run.round(1)
    run.round(2, apply=False)
    loaded = record.load(run.folder)
    assert [r.number for r in loaded.rounds] == [1, 2]
    assert [r.number for r in loaded.finished_rounds] == [1]
    assert loaded.closed is None
    assert loaded.arms == ()
    assert loaded.hospitals[0].real is None


def test_a_log_cut_anywhere_is_an_unfinished_run(run_folder: Path) -> None:
    events = run_folder / "events.jsonl"
    data = events.read_bytes()

    @settings(deadline=None, max_examples=40)
    @given(length=st.integers(0, len(data)))
    def cut(length: int) -> None:
        events.write_bytes(data[:length])
        whole = [json.loads(line) for line in data[:length].split(b"\n")[:-1]]
        applied = [e["round"] for e in whole if e["event"] == "round_applied"]
        assert [r.number for r in record.load(run_folder).finished_rounds] == applied

    cut()


def test_events_are_followed_while_they_are_written(tmp_path: Path) -> None:
    run = RunWriter(tmp_path)
    events = record.EventFile.of_coordinator(tmp_path)
    assert events.new() == []
    run.open()
    assert [e.event for e in events.new()] == ["run_opened"]
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "event": "node_refused", ')
        file.flush()
        assert events.new() == []
        file.write('"reason": "MSG_KEY"}\n')
    assert [e.event for e in events.new()] == ["node_refused"]


def change_line(path: Path, number: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    values = json.loads(lines[number]) | changes
    lines[number] = json.dumps({k: v for k, v in values.items() if v is not None})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("events.jsonl", {"parameters": "many"}),
        ("events.jsonl", {"parameters": None}),
        ("events.jsonl", {"event": "unheard_of"}),
        ("events.jsonl", {"surprise": 1}),
        ("events.jsonl", {"float32_bytes": -4}),
        ("events.jsonl", {"sites": ["north", "atlantis"]}),
        ("events.jsonl", {"study_hash": "0" * 64}),
        ("events.jsonl", {"time": float("nan")}),
        ("hospitals/north/events.jsonl", {"images": 2.5}),
        ("hospitals/north/events.jsonl", {"refused": {"DICOM_BITS": -1}}),
    ],
)
def test_what_is_there_must_have_the_form(run_folder: Path, file: str, changes: dict[str, Any]) -> None:
    change_line(run_folder / file, 0, **changes)
    with pytest.raises(RunError) as caught:
        record.load(run_folder)
    assert caught.value.code == "RUN_RECORD"
    assert file in caught.value.where


def test_a_refusal_does_not_repeat_the_value(run_folder: Path) -> None:
    change_line(run_folder / "hospitals/north/events.jsonl", 0, images="ZZPHI^MARKER")
    with pytest.raises(RunError) as caught:
        record.load(run_folder)
    assert "ZZPHI" not in caught.value.line()


def test_only_the_number_of_a_hospitals_troubles_is_read(run_folder: Path) -> None:
    append(run_folder / "hospitals/west/events.jsonl", "failed", START, error="ZZPHI^MARKER")
    run = record.load(run_folder)
    assert [h.troubles for h in run.hospitals] == [0, 0, 0, 1]
    assert "ZZPHI" not in repr(run)


@pytest.mark.parametrize("change", [{"epsilon": None}, {"ceiling": None}, {"noise_multiplier": None}])
def test_a_private_round_without_its_epsilon_is_refused(run_folder: Path, change: dict[str, Any]) -> None:
    rewrite(run_folder / "hospitals/north/events.jsonl", "trained", **change)
    with pytest.raises(RunError, match="does not fit what the study promises"):
        record.load(run_folder)


def rewrite(path: Path, event: str, **changes: Any) -> None:
    """The same events, the first of that name changed; unlike `change_line` it can write null."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    next(line for line in lines if line["event"] == event).update(changes)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


NO_PRIVACY: dict[str, Any] = {"images": {"size": 28}, "privacy": "none"}


def test_without_privacy_there_is_no_epsilon_neither_zero_nor_any_other(tmp_path: Path) -> None:
    run = record.load(build_run(tmp_path / "run", make_study(rounds=2, **NO_PRIVACY)))
    assert run.final_epsilon is None
    assert [arm.epsilon for arm in run.arms] == [None] * 5
    assert {t.method for h in run.hospitals for t in h.trained.values()} == {"plain"}
    rewrite(run.folder / "hospitals/west/events.jsonl", "trained", epsilon=0.0, ceiling=8.0, noise_multiplier=0.0)
    with pytest.raises(RunError, match="does not fit what the study promises"):
        record.load(run.folder)


def test_scores_of_an_image_to_image_recipe_are_read(tmp_path: Path) -> None:
    gan = {"recipe": "pix2pix", "private": "both", "task": "denoise"}
    study = make_study(rounds=1, images={"size": 28}, gan=gan, aggregation={"optimizer": "fedavgm"})
    run = record.load(build_run(tmp_path / "run", study))
    assert [arm.name for arm in run.arms][-2:] == ["fedavg", "no-privacy"]
    scores = run.arms[0].similarity
    assert scores is not None and run.arms[0].tstr is None
    assert (scores.psnr_input, scores.tested_on) == (19.3, 243)
    assert run.real is None


def test_numbers_that_must_stay_at_a_hospital_are_refused(run_folder: Path) -> None:
    path = run_folder / "arms.json"
    path.write_text(path.read_text().replace('"must_stay": false', '"must_stay": true'))
    with pytest.raises(RunError, match="RUN_RECORD"):
        record.load(run_folder)


def test_an_edited_study_is_refused(run_folder: Path) -> None:
    path = run_folder / "study.json"
    path.write_text(path.read_text().replace('"epsilon": 8.0', '"epsilon": 9.0'))
    with pytest.raises(RunError, match="does not have the hash"):
        record.load(run_folder)


def test_a_hostile_study_name_is_refused(run_folder: Path) -> None:
    path = run_folder / "study.json"
    path.write_text(path.read_text().replace('"chest-demo"', '"<script>alert(1)</script>"'))
    with pytest.raises(RunError, match="not a valid study"):
        record.load(run_folder)


def test_a_picture_outside_the_arms_folder_is_refused(run_folder: Path) -> None:
    path = run_folder / "arms.json"
    path.write_text(path.read_text().replace("arms/federated.png", "arms/../../secret.png"))
    with pytest.raises(RunError) as caught:
        record.load(run_folder)
    assert "picture" in caught.value.what


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no study\.json.*give the folder of a run"):
        record.load(tmp_path)


@pytest.mark.parametrize(
    ("orders", "line"),
    [
        ([("update_accepted", {"site": "north", "bytes_up": 1, "generator_loss": 0.1})], "never opened"),
        (
            [
                (
                    "round_applied",
                    {"sites": [], "model_hash": "", "generator_loss": 0.1, "seconds": {"broadcast": 0.1}},
                )
            ],
            "without a sum",
        ),
    ],
)
def test_events_out_of_order_are_refused(tmp_path: Path, orders: list[tuple[str, dict[str, Any]]], line: str) -> None:
    run = RunWriter(tmp_path)
    for event, fields in orders:
        extra = {"attempt": 1} if event == "update_accepted" else {}
        run.say(event, round=1, **extra, **fields)
    with pytest.raises(RunError, match=line):
        record.load(tmp_path)


def test_the_noise_seed_is_noticed(run_folder: Path) -> None:
    (run_folder / "INSECURE-SEED").write_text("7\n")
    assert record.load(run_folder).insecure_seed == "7"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (0.0004, "under 0.001 s"), (0.02, "0.02 s"), (0.0213, "0.021 s"), (4.06, "4.1 s"),
        (9.99, "10 s"), (75.4, "75 s"), (725.9, "12 min 5 s"),
    ],
)  # fmt: skip
def test_seconds_in_words(value: float, text: str) -> None:
    assert record.seconds_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"), (850, "850 B"), (412_083, "412 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
        (1_236_249, "1.24 MB"), (2_500_000_000, "2.5 GB"),
    ],
)  # fmt: skip
def test_bytes_in_words(value: int, text: str) -> None:
    assert record.bytes_text(value) == text
