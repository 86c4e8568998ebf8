"""The report: every section, the numbers of the record and no others, nothing loaded, everything escaped."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_record import PARAMETERS, SITES, RunWriter, append, build_run, change_line, make_study

from fedmedgan.audit import drawing
from fedmedgan.shared import study as study_module
from fedmedgan.shared.errors import RunError
from fedmedgan.simulations import charts, record, report

HOSTILE = "</td><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> $x^2$ \u202e"
SECTIONS = [
    "cycle", "ran", "images", "privacy", "rounds", "bytes", "limited", "losses", "comparison", "missing",
    "limits", "repeat",
]  # fmt: skip


class Page(HTMLParser):
    """What a browser would make of the page: tags with attributes, text by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.text = self.style = ""
        self._section = self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        self._inside = tag
        if tag in ("td", "th", "br"):
            self.handle_data(" ")
        if tag == "section":
            self._section = values["id"]
            self.sections[self._section] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.style += data
            return
        self.text += data
        if self._section:
            self.sections[self._section] += data

    def words(self, section: str = "") -> str:
        return " ".join((self.sections[section] if section else self.text).split())


SMALL: dict[str, Any] = {"size": 28}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_run(tmp_path_factory.mktemp("report") / "run", make_study(rounds=5, images=SMALL))
    report.write(folder)
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page_of(folder: Path) -> Page:
    return Page(report.write(folder).read_text(encoding="utf-8"))


def twin_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ---- the whole page


def test_all_sections_in_order(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    assert list(page.sections) == SECTIONS
    assert all(len(page.words(section)) > 60 for section in SECTIONS)


def test_nothing_is_loaded_and_nothing_runs(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    page = Page(html)
    forbidden = {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    assert not forbidden & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*([^)]*)", html))


def test_ids_are_unique_and_links_meet_one(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    page = Page(html)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a[k][1:] for _, a in page.tags for k in ("href", "xlink:href") if a.get(k, "").startswith("#")}
    named |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert named <= set(ids)


def test_every_picture_and_chart_has_words(finished: Path) -> None:
    page = Page((finished / "report.html").read_text())
    images = [a for tag, a in page.tags if tag == "img"]
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert len(images) == 6 + 1 + len(SITES) + 2 + len(SITES)
    assert len(drawings) == 1 + 6
    assert all(len(a["alt"]) > 20 and a["width"] == "224" for a in images)
    assert all(len(a["aria-label"]) > 40 and a["role"] == "img" for a in drawings)


def test_equal_folders_give_equal_bytes(finished: Path) -> None:
    first = [(finished / name).read_bytes() for name in ("report.html", "report.json")]
    report.write(finished)
    assert [(finished / name).read_bytes() for name in ("report.html", "report.json")] == first


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_enough_contrast_in_both_schemes(finished: Path) -> None:
    """WCAG 2.1, success criterion 1.4.3: 4.5 to 1 for text."""
    style = Page((finished / "report.html").read_text()).style
    schemes = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", scheme))
        for name in ("ink", "muted", "link", "alarm", "good", *(f"site-{i}" for i in range(8))):
            for ground in ("page", "panel"):
                light, dark = sorted((luminance(colours[name]), luminance(colours[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


# ---- the numbers


def test_the_numbers_are_those_of_the_record(finished: Path) -> None:
    run, twin, page = record.load(finished), twin_of(finished), Page((finished / "report.html").read_text())
    assert twin["schema_version"] == "1"
    assert twin["study"]["hash"] == run.study.hash
    assert run.study.hash in page.words()
    assert twin["rounds_done"] == 5
    assert {h["name"]: h["epsilon"] for h in twin["hospitals"]} == run.final_epsilon
    for name, epsilon in run.final_epsilon.items():
        assert f"{name} {epsilon:.2f}" in page.words("privacy")
        assert f"{epsilon:.3f}" in page.words("privacy")
    for turn, facts in zip(run.rounds, twin["rounds"], strict=True):
        assert turn.aggregated is not None
        assert turn.applied is not None
        assert facts["bytes_up"] == turn.bytes_up
        assert facts["bytes_down"] == turn.aggregated.bytes_down
        assert facts["cohort"] == list(turn.aggregated.cohort)
        wall = turn.aggregated.seconds.local + turn.applied.seconds.broadcast
        assert facts["seconds"]["total"] == pytest.approx(wall)
        assert facts["epsilon"] == {h.name: h.trained[turn.number].epsilon for h in run.hospitals}
    loaded = [h.loaded for h in run.hospitals]
    for site, data in zip(run.study.sites, loaded, strict=True):
        assert data is not None
        row = f"{site.name} {site.patients} {data.patients} {data.images}"
        assert row in page.words("ran")
    assert "1 × DICOM_BURNED_IN , 4 × DICOM_MODALITY" in re.sub(r"\s*,", " ,", page.words("ran"))
    assert "412 kB" in page.words("bytes")
    assert f"{PARAMETERS:,}".replace(",", "\u202f") in page.text
    assert "0.860 ± 0.010" in page.words("comparison")
    assert "tested on 243 real images" in page.words("comparison")


def test_the_share_outside_training_by_hand(finished: Path) -> None:
    run = record.load(finished)
    training = sum(t.seconds for h in run.hospitals for t in h.trained.values())
    sealing = sum(0.011 for h in run.hospitals for _ in h.trained)
    sealing += sum(0.041 + 0.068 for h in run.hospitals for _ in h.encrypted)
    updating = sum(0.093 + 0.031 + 0.042 for h in run.hospitals for _ in h.updated)
    adding = sum(r.aggregated.seconds.aggregation for r in run.rounds if r.aggregated)
    other = sealing + updating + adding
    assert twin_of(finished)["computing"]["share_outside_training"] == pytest.approx(other / (training + other))


def test_the_verdict_says_what_was_promised(finished: Path) -> None:
    verdict = " ".join(twin_of(finished)["verdict"])
    assert verdict == (
        "4 hospitals trained one generator in 5 rounds; no image left its hospital. Each patient's epsilon is at"
        " most 7.95 of 8 at delta 1e-4; unit: one patient with all images and labels; add/remove adjacency;"
        " local noise in full at each hospital. After every round all hospitals held the same model."
    )
    assert verdict in Page((finished / "report.html").read_text()).words()


@given(st.floats(0, 100))
def test_a_bound_is_never_rounded_down(value: float) -> None:
    assert value - 1e-9 <= report._rounded_up(value) < value + 0.0101


@given(st.floats(0, 40))
def test_certainty_is_never_rounded_down_nor_up_to_certain(epsilon: float) -> None:
    certainty = report._certainty(epsilon)
    words = report._at_most(certainty)
    if words != "over 99.99 %" and certainty < 1:
        assert float(words.removesuffix(" %")) >= 100 * certainty - 1e-6
        assert not words.startswith("100")


def test_a_missing_hospital_is_told(finished: Path) -> None:
    words = Page((finished / "report.html").read_text()).words("missing")
    assert "4 1 of 2 east RUN_TIMEOUT finished with 3 hospitals" in words


def test_no_missing_section_when_nobody_was_missing(tmp_path: Path) -> None:
    run = RunWriter(tmp_path, make_study(rounds=1, images=SMALL))
    run.open()
    run.round(1)
    run.close(1)
    page = page_of(tmp_path)
    assert "missing" not in page.sections
    assert "All agreed rounds were run." in page.words()


@pytest.mark.parametrize(
    ("saturated", "words"),
    [
        (0, "No value of any update was cut."),
        (1, "The largest share was under 0.01 %"),
        (4030, "The largest share was 2.0 %, at north in round 1. More than 1 % is lost progress"),
    ],
)
def test_how_much_was_cut_is_told(tmp_path: Path, saturated: int, words: str) -> None:
    run = RunWriter(tmp_path, make_study(rounds=1, images=SMALL))
    run.open()
    run.round(1)
    for site in SITES:
        change_line(tmp_path / f"hospitals/{site}/events.jsonl", -2, saturated=saturated * (site == "north"))
    page = page_of(tmp_path)
    assert words in page.words("limited")
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == (6 if saturated else 5)


# ---- recipes and settings


def words_of(folder: Path, **parts: Any) -> Page:
    """The page of a finished run of two rounds under such a study."""
    parts = {"images": SMALL, **parts}
    return page_of(build_run(folder / "run", make_study(rounds=2, **parts)))


def charts_of(page: Page) -> list[str]:
    return [a["aria-label"] for tag, a in page.tags if tag == "svg"][1:]


@pytest.fixture(scope="module")
def translated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any]]:
    """Page and twin of an image-to-image run."""
    folder = tmp_path_factory.mktemp("translated")
    page = words_of(folder, gan={"recipe": "pix2pix", "private": "both", "task": "denoise"})
    return page, twin_of(folder / "run")


def test_how_gradients_of_records_were_found_is_told_for_each_hospital(finished: Path, tmp_path: Path) -> None:
    assert {h["method"] for h in twin_of(finished)["hospitals"]} == {"book-keeping"}
    assert Page((finished / "report.html").read_text()).words("ran").count("book-keeping") == len(SITES) + 1
    folder = build_run(tmp_path / "run", make_study(rounds=2, images=SMALL))
    events = folder / "hospitals/south/events.jsonl"
    events.write_text(events.read_text().replace('"book-keeping"', '"hooks"', 1))
    report.write(folder)
    assert [h["method"] for h in twin_of(folder)["hospitals"]][1] == "hooks, book-keeping"


def test_without_privacy_the_page_says_so_and_shows_no_epsilon(tmp_path: Path) -> None:
    page, twin = words_of(tmp_path, privacy="none"), twin_of(tmp_path / "run")
    assert "Trained WITHOUT privacy. The study says" in page.words()
    assert "It was trained WITHOUT privacy: no noise was added" in page.words()
    assert page.words("privacy").startswith("Privacy None. The study promises nothing to any patient")
    assert "train WITHOUT noise" in page.words("cycle")
    assert not re.search(r"(epsilon|ε)( at most| is|:| =)? [\d∞]", page.words()), "no number is called an epsilon"
    assert not [alt for alt in charts_of(page) if "epsilon" in alt]
    assert "all WITHOUT privacy" in page.words("comparison")
    assert "Comparison on the same budget" not in page.words()
    assert 'privacy = "none"' in page.words("repeat")
    assert twin["privacy"] == {"promised": False}
    assert {h["epsilon"] for h in twin["hospitals"]} == {h["epsilon_replace_one"] for h in twin["hospitals"]} == {None}
    assert {h["method"] for h in twin["hospitals"]} == {"plain"}
    assert {r["epsilon"] for r in twin["rounds"]} == {None}
    assert "Infinity" not in (tmp_path / "run" / "report.json").read_text()


def test_an_image_to_image_run_is_told_as_one(translated: tuple[Page, dict[str, Any]]) -> None:
    page, twin = translated
    assert "its discriminator and generator read patients" in page.words("ran")
    assert "24 private steps (20 of the discriminator, 4 of the generator)" in page.words("ran")
    assert "steps of both networks are counted" in page.words("privacy")
    assert [h["steps"] for h in twin["hospitals"]] == [48] * len(SITES)
    assert "rows from top to bottom: input, output" in page.words("images")
    assert "latent points" not in page.words("images")
    assert "PSNR, dB SSIM MAE" in page.words("comparison")
    assert "Outputs for 243 real images that were kept apart" in page.words("comparison")
    assert "24.30 0.8600 0.1140" in page.words("comparison")
    assert "input as it is (no network) – – 19.30 0.7000 0.1500" in page.words("comparison")
    assert "the inputs as they are: 19.30 dB" in page.words("comparison")
    assert "classifier" not in page.words("comparison")
    assert any(alt.startswith("Dot chart of PSNR and SSIM") for alt in charts_of(page))


def test_nothing_is_told_of_how_fakes_that_are_made_of_patients_are_known(
    translated: tuple[Page, dict[str, Any]],
) -> None:
    page, twin = translated
    assert {r["discriminator_fake_loss"] for r in twin["rounds"]} == {None}
    (losses,) = [alt for alt in charts_of(page) if "loss of the generator" in alt]
    assert "discriminator" not in losses
    assert "What the discriminator says of generated images is not here" in page.words("losses")


def test_nor_where_a_fake_is_part_of_a_record_though_it_is_made_of_noise(tmp_path: Path) -> None:
    page = words_of(tmp_path, gan={"recipe": "wgan_gp"})
    assert {r["discriminator_fake_loss"] for r in twin_of(tmp_path / "run")["rounds"]} == {None}
    assert not [alt for alt in charts_of(page) if "loss" in alt and "discriminator" in alt]
    assert "What the discriminator says of generated images is not here" in page.words("losses")
    assert "generated images only" in page.words("losses")


ONE_CLASS: dict[str, Any] = {"gan": {"recipe": "dcgan"}, "images": {**SMALL, "classes": ("any",)}}
UNPAIRED: dict[str, Any] = {"gan": {"recipe": "cyclegan", "private": "both"}}


@pytest.mark.parametrize(
    ("parts", "why", "rows"),
    [
        (ONE_CLASS, "There is one class, so a classifier has nothing to tell apart", "one row for each class (any)"),
        (UNPAIRED, "are not paired, so there is no target", "top to bottom: drawn input, as clear, as opacity"),
    ],
)
def test_why_there_is_no_score_is_told(tmp_path: Path, parts: dict[str, Any], why: str, rows: str) -> None:
    page = words_of(tmp_path, **parts)
    assert why in page.words("comparison")
    assert rows in page.words("images")
    assert "PSNR" not in page.words("comparison")
    assert not [alt for alt in charts_of(page) if alt.startswith("Dot chart")]


def row_of(page: Page, start: str) -> str:
    """The words of the comparison from `start` on."""
    words = page.words("comparison")
    assert start in words, words
    return words[words.index(start) :]


def test_images_of_noise_are_shown_as_sets(finished: Path) -> None:
    page, twin = Page((finished / "report.html").read_text()), twin_of(finished)
    head = row_of(page, "lower is better")
    names = "arm FID KID MS-SSIM duplicates precision recall density coverage"
    assert head.startswith(f"lower is better higher is better {names}")
    assert "together, private (this run) not measured 0.125 0.51 0.1 % 0.61 0.32 1.13 0.44" in head
    assert "north alone, private not measured 1.125 0.51 0.1 % 0.61" in head
    assert "2000 of the hospitals' own images (not synthetic) not measured 9.125" in head
    assert "2 000 images of each arm, against 243" in head.replace("\u202f", " ")
    assert "Not measured: FID of 64 features needs at least 65 images; 30 given." in head
    (said,) = {m["settings"]["extractor_sha256"] for m in twin["arms"][0]["quality"]["measurements"]}
    assert f"extractor {said}, trained on drawn phantoms" in head
    assert "public or drawn: phantoms whom no hospital holds" in head
    assert twin["arms"][1]["quality"]["measurements"][2]["values"]["kid"] == 1.125


def test_how_many_near_duplicates_were_dropped_is_told(finished: Path) -> None:
    words = Page((finished / "report.html").read_text()).words("comparison").replace("\u202f", " ")
    assert "1 999 of 2 000 images are in arms/arm-0.npz; 1 near-duplicate dropped" in words
    assert "1 998 of 2 000 images are in arms/arm-1.npz; 2 near-duplicates dropped" in words


def test_one_class_has_its_images_shown_as_sets(tmp_path: Path) -> None:
    page = words_of(tmp_path, **ONE_CLASS)
    assert "together, private (this run) not measured 0.125" in row_of(page, "lower is better")


def test_images_of_another_domain_are_shown_as_sets_before_and_after(tmp_path: Path) -> None:
    page = words_of(tmp_path, **UNPAIRED)
    head = row_of(page, "clear to opacity")
    assert head.startswith("clear to opacity opacity to clear arm; lower is better KID MMD KID MMD")
    assert "as they are (no network) 0.900 0.300 0.900 0.300" in head
    assert "together, private (this run) 0.111 0.037 0.111 0.037" in head
    assert "as sets" in page.words("comparison")
    assert "no score" not in page.words("comparison")


def test_overlap_is_shown_where_targets_are_masks_and_nowhere_else(
    translated: tuple[Page, dict[str, Any]], tmp_path: Path
) -> None:
    gan = {"recipe": "pix2pix", "private": "both", "task": "paired"}
    page = words_of(tmp_path, gan=gan, images={**SMALL, "paired": True})
    assert "MAE Dice IoU" in page.words("comparison")
    assert "0.1140 0.860 0.760" in row_of(page, "together, private")
    assert "0.1500 0.300 0.200" in row_of(page, "input as it is (no network)")
    assert "Targets are masks" in page.words("comparison")
    assert "Dice" not in translated[0].words()


def test_aggregation_and_what_is_shared(tmp_path: Path) -> None:
    aggregation = {"share": "generator", "optimizer": "fedadam", "learning_rate": 0.01}
    page = words_of(tmp_path, aggregation=aggregation)
    assert "each discriminator stays at its hospital, 201 473 parameters" in page.words("ran")
    assert "FedAdam (learning rate 0.01, momentum 0.9, beta2 0.99, adaptivity 0.001)" in page.words("ran")
    assert "all hospitals held the same generator; each kept a discriminator of its own" in page.words()
    assert "Shared: the generator alone" in page.words("bytes")
    assert "plain averaging, private" in page.words("comparison")
    assert "Plain averaging of both networks in place of the study's aggregation: 0.840" in page.words("comparison")


def test_stabilisers_and_pre_training_are_named(tmp_path: Path) -> None:
    gan = {"ema": 0.9, "attention": True, "pretrained": "ab" * 32, "pretrained_on": "drawn <b>phantoms</b>"}
    training = {"adaptive": True, "views": 4, "real_label": 0.9, "replay": 0.25, "fake_penalty": 2.0}
    values = {"training": {"rounds": 2, **training, "spectral_projection": True}, "gan": gan, "images": SMALL}
    sites = [{"name": name, "patients": n} for name, n in SITES.items()]
    study = study_module.from_dict({"name": "chest-demo", "sites": sites, **values})
    page = page_of(build_run(tmp_path / "run", study))
    assert (
        "beside it: adaptive ratio of steps, moving average of the generator (0.9 a round), spectral projection,"
        " self-attention, label smoothing (0.9), 4 views of a record, penalty on fakes (2), replay of 25 % of the"
        " fakes."
    ) in page.words("ran")
    assert "trained on public images (drawn <b>phantoms</b>)" in page.words("ran")
    assert "--weights FILE" in page.words("repeat")
    assert "Public means public." in page.words("limits")


# ---- what must not be hidden


def test_seeded_noise_voids_every_promise(run_folder: Path) -> None:
    (run_folder / "INSECURE-SEED").write_text("7\n")
    page = page_of(run_folder)
    assert "Noise was seeded: no privacy guarantee." in page.words()
    assert not [line for line in twin_of(run_folder)["verdict"] if "at most" in line]
    assert "--insecure-seed 7" in page.words("repeat")


def test_without_privacy_is_marked(finished: Path) -> None:
    words = Page((finished / "report.html").read_text()).words("comparison")
    assert words.count("imulation only, never for real patients") == 2
    assert "none: no guarantee" in words


def test_different_models_are_told(run_folder: Path) -> None:
    change_line(run_folder / "hospitals/south/events.jsonl", -1, model_hash="ab" * 32)
    page = page_of(run_folder)
    assert "The hospitals did NOT all hold the same model: do not use it." in page.words()
    assert "any other would have drawn the same" not in page.words()


def test_a_given_folder_makes_the_page_confidential(run_folder: Path) -> None:
    assert "confidential" not in (run_folder / "report.html").read_text()
    (run_folder / "hospitals/south/dicom").rmdir()
    page = page_of(run_folder)
    assert "This page may be confidential." in page.words()
    assert "No patient. The images are drawn phantoms." not in page.words("limits")


def test_a_run_that_broke_off_is_not_called_complete(run_folder: Path) -> None:
    lines = (run_folder / "events.jsonl").read_text().splitlines()
    cut = next(i for i, line in enumerate(lines) if '"round_applied", "round": 3' in line)
    (run_folder / "events.jsonl").write_text(
        "\n".join([*lines[: cut + 1], lines[-1].replace('"reason": "rounds"', '"reason": "failed"')]) + "\n"
    )
    page = page_of(run_folder)
    assert "The run broke off with an error" in page.words()
    assert "in 3 rounds of 5" in page.words()


def test_the_text_of_a_hospitals_trouble_stays_there(run_folder: Path) -> None:
    append(run_folder / "hospitals/west/events.jsonl", "failed", 1.0, error="ZZPHI^MARKER")
    page = page_of(run_folder)
    assert "west refused or failed 1 request; why is in its own log" in page.words("limits")
    assert "ZZPHI" not in (run_folder / "report.html").read_text()
    assert "ZZPHI" not in (run_folder / "report.json").read_text()


# ---- unfinished runs


@pytest.mark.parametrize("stage", range(5))
def test_a_report_at_any_stage(tmp_path: Path, stage: int) -> None:
    run = RunWriter(tmp_path, make_study(rounds=5, images=SMALL))
    if stage > 0:
        run.open()
    if stage > 1:
        run.say("round_opened", round=1, attempt=1, cohort=sorted(SITES))
        run.train("north", 1)
    if stage > 2:
        run.round(1, apply=False)
    if stage > 3:
        run.round(1)
    page = page_of(tmp_path)
    assert list(page.sections) == [name for name in SECTIONS if name != "missing"]
    done = 1 if stage > 3 else 0
    assert twin_of(tmp_path)["rounds_done"] == done
    assert ("No round has been finished yet" in page.words()) == (done == 0)
    assert "The run is not finished" in page.words()


# ---- hostile content


def test_everything_from_files_is_escaped(run_folder: Path) -> None:
    arms = json.loads((run_folder / "arms.json").read_text())
    for arm in arms["arms"]:
        arm["label"] = HOSTILE
        arm["quality"]["statement"] = arm["quality"]["not_measured"][0]["reason"] = HOSTILE
    arms["real"]["label"] = HOSTILE
    (run_folder / "arms.json").write_text(json.dumps(arms))
    change_line(run_folder / "hospitals/north/events.jsonl", 0, refused={HOSTILE: 3})
    events = run_folder / "events.jsonl"
    events.write_text(events.read_text().replace('"RUN_TIMEOUT"', json.dumps(HOSTILE)))
    (run_folder / "INSECURE-SEED").write_text(HOSTILE)
    hostile_study = make_study(rounds=5, images={"size": 28, "modalities": ["CR", HOSTILE]})
    body = {"hash": hostile_study.hash, "study": hostile_study.model_dump(mode="json")}
    (run_folder / "study.json").write_text(json.dumps(body))
    change_line(events, 0, study_hash=hostile_study.hash)

    page = page_of(run_folder)
    test_nothing_is_loaded_and_nothing_runs(run_folder)
    for section, least in (("ran", 2), ("comparison", 14), ("missing", 1), ("repeat", 2)):
        assert page.words(section).count("<script>alert('x')</script>") >= least, section
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 6 + 1 + len(SITES) + 2 + len(SITES)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<svg onload=alert(1)>" * 9])
def test_only_png_pictures_enter_the_page(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "federated.png").write_bytes(content)
    with pytest.raises(RunError, match="not a PNG"):
        report._picture(tmp_path / "federated.png", "caption", "alt")


def test_an_unwritable_folder_is_our_error(run_folder: Path) -> None:
    (run_folder / "report.json").unlink()
    (run_folder / "report.json").mkdir()
    with pytest.raises(RunError) as caught:
        report.write(run_folder)
    assert caught.value.code == "RUN_PATH"


# ---- repeat


def test_the_study_on_the_page_is_the_study(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    shown = re.search(r"<pre[^>]*>(name = .*?)</pre>", page, flags=re.DOTALL)
    assert shown is not None
    again = study_module.parse(shown[1].replace("&#34;", '"'))
    assert again == record.load(finished).study


def test_the_short_form_of_no_privacy_is_the_same_study() -> None:
    study = make_study(images=SMALL, privacy="none")
    assert study_module.parse(report.study_toml(study)) == study
    assert "epsilon" not in report.study_toml(study)
    odd = make_study(images=SMALL, privacy={"unit": "none", "epsilon": 3.0})
    assert study_module.parse(report.study_toml(odd)) == odd


def test_keys_are_left_out_of_the_study_to_repeat() -> None:
    values = make_study(images={"size": 28, "modalities": ["CR", 'a"b\\c\x7f\u2028é']}).model_dump(mode="json")
    plain = study_module.from_dict(values)
    for number, site in enumerate(values["sites"]):
        site["signing_key"], site["exchange_key"] = f"{number:064x}", f"{number + 9:064x}"
    assert study_module.parse(report.study_toml(study_module.from_dict(values))) == plain


# ---- charts


def test_a_hospital_has_one_colour_everywhere(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    for index, name in enumerate(SITES):
        colours = set(re.findall(rf'--c: (var\(--site-\d\))">{name}<', html))
        for svg in re.findall(r'<svg viewBox[^>]*class="chart">.*?</svg>', html, flags=re.DOTALL):
            colours |= set(re.findall(rf'fill: (var\(--site-\d\))"[^>]*>{name} [\d.]+<', svg))
        assert colours == {f"var(--site-{index})"}


def test_charts_hold_no_colour_of_their_own(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    drawings = re.findall(r'<svg viewBox[^>]*class="chart">.*?</svg>', html, flags=re.DOTALL)
    assert len(drawings) == 6
    for svg in drawings:
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
        assert "<text" in svg


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 2))
def test_labels_do_not_overlap_and_keep_their_order(values: list[float], gap: float) -> None:
    places = drawing.spread(values, gap)
    order = sorted(range(len(values)), key=lambda i: values[i])
    heights = [places[i] for i in order]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(heights))
    assert sum(heights) == pytest.approx(sum(values), abs=1e-6)


def test_many_hospitals_and_rounds() -> None:
    series = {f"site-{i:02}": [(r, 0.01 * r + i) for r in range(1, 201)] for i in range(20)}
    svg = charts.epsilon(series, dict.fromkeys(series, 30.0), "alt")
    assert "site-19 21.00" in svg
    assert "site-00 2.00" not in svg
    times = [charts.PhaseTimes(r, 4.0, 0.1, 0.02, 0.1, 0.2) for r in range(1, 2001)]
    assert len(charts.phases(times, "alt")) < 1_000_000


# ---- in a browser


def chromium(profile: Path, page: Path) -> tuple[str, str]:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium on this machine")
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", "--dump-dom", f"--user-data-dir={profile}",
    ]  # fmt: skip
    command = [found, *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_a_browser_shows_it_without_complaint(run_folder: Path, tmp_path: Path) -> None:
    page = report.write(run_folder)
    shown, log = chromium(tmp_path / "profile", page)
    assert "What this run does not show" in shown
    assert "CONSOLE" not in log
    # The page forbids scripts; a copy that allows one can be asked about its images.
    question = "<script>document.title = [...document.images].map(i => i.naturalWidth).join()</script>"
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    probe = run_folder / "probe.html"
    probe.write_text(html.replace("</body>", question + "</body>"))
    shown, log = chromium(tmp_path / "profile", probe)
    assert "CONSOLE" not in log
    widths = re.search(r"<title>([\d,]+)</title>", shown)
    assert widths is not None
    assert widths[1] == ",".join(["224"] * (6 + 1 + len(SITES) + 2 + len(SITES)))
