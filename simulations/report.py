"""The report of a run: one self-contained page, ``report.html``, and the same numbers as ``report.json``.

`facts` gathers every number; the page and the JSON show those and no others. The page loads nothing, runs no
script, and everything in it that came from a file is escaped. An equal run folder gives equal bytes.
"""

from __future__ import annotations

import base64
import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedmedgan.audit import drawing
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.privacy.accounting import epsilon_replace_one
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.study import Privacy, Study
from fedmedgan.simulations import charts, recipe_words
from fedmedgan.simulations.charts import PhaseTimes
from fedmedgan.simulations.record import Arm, Hospital, Quality, Round, RunRecord, bytes_text, load, seconds_text

T = TypeVar("T")

SCHEMA_VERSION = "1"
PACKAGES = ("fedmedgan", "torch", "opacus", "tenseal", "flwr")
FILM_FRAMES = 12
TABLE_ROWS = 40
LOWER = {
    "fid": ("FID", "{:.2f}"), "kid": ("KID", "{:.3f}"), "ms_ssim": ("MS-SSIM", "{:.2f}"),
    "duplicate_rate": ("duplicates", "{:.1%}"),
}  # fmt: skip
"""Numbers of sets of images, their names and forms; lower is better."""
HIGHER = {name: (name, "{:.2f}") for name in ("precision", "recall", "density", "coverage")}
MAX_PICTURE_BYTES = 16 << 20

ENDINGS = {
    "rounds": "All agreed rounds were run.",
    "converged": "The run ended early: the generator's loss, on generated images alone, had settled.",
    "budget": "The run was ended: the next round would have broken a hospital's privacy budget.",
    "quorum": "The run was ended: fewer than three hospitals were left.",
    "failed": "The run broke off with an error; flower.log in the run folder says which.",
}


def write(run_folder: Path) -> Path:
    """Write ``report.html`` and ``report.json`` into a run folder and return the path of the page.

    Raises:
        RunError: RUN_RECORD, the run folder does not have the agreed form; RUN_PATH, it cannot be written.
    """
    run = load(run_folder)
    found = facts(run)
    page = run_folder / "report.html"
    twin = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False)
    _replace(run_folder / "report.json", twin + "\n")
    _replace(page, _page(run, found))
    return page


# ---- every number of the report


def facts(run: RunRecord) -> dict[str, Any]:
    """What the report says, as plain values: the content of ``report.json``."""
    study = run.study
    model_equal, model_hash = _models_agree(run)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "study": {"name": study.name, "hash": study.hash, "values": study.model_dump(mode="json")},
        "opened": _when(run.opened.time) if run.opened else None,
        "closed": _when(run.closed.time) if run.closed else None,
        "versions": {name: _version(name) for name in PACKAGES},
        "ending": _ending(run),
        "insecure_seed": run.insecure_seed is not None,
        "only_phantoms": all(h.drawn for h in run.hospitals),
        "shows_given_images": any(h.real and not h.drawn for h in run.hospitals),
        "split": asdict(run.split) if run.split else None,
        "rounds_done": run.rounds_done,
        "rounds_planned": study.training.rounds,
        "parameters": run.opened.parameters if run.opened else None,
        "float32_bytes": run.opened.float32_bytes if run.opened else None,
        "model": {"hash": model_hash, "equal_at_all_hospitals": model_equal},
        "recipe": recipe_words.facts(study),
        "privacy": _privacy_facts(run),
        "hospitals": [_hospital_facts(run, h) for h in run.hospitals],
        "rounds": [_round_facts(run, r) for r in run.rounds],
        "computing": _computing(run),
        "missing": [
            {"round": r.number, "attempt": a.number, "site": m.site, "reason": m.reason}
            for r in run.rounds
            for a in r.attempts
            for m in a.missing
        ],
        "nodes_refused": run.nodes_refused,
        "arms": [asdict(arm) for arm in run.arms],
        "real": asdict(run.real) if run.real else None,
    }
    found["verdict"] = _verdict(run, found)
    return found


def _privacy_facts(run: RunRecord) -> dict[str, Any]:
    """What was promised and spent. Without privacy there is nothing but the word that there is none."""
    if run.final_epsilon is None:
        return {"promised": False}
    privacy, spent = run.study.privacy, max(run.final_epsilon.values())
    return {
        "promised": True,
        "epsilon": spent,
        "epsilon_at_most": _rounded_up(spent),
        "budget": privacy.epsilon,
        "delta": privacy.delta,
        "unit": "one patient with all images and labels",
        "adjacency": "add/remove",
        "certainty_at_most": _certainty(spent),
    }


def _hospital_facts(run: RunRecord, hospital: Hospital) -> dict[str, Any]:
    site, last, loaded = run.study.site(hospital.name), hospital.last, hospital.loaded
    return {
        "name": hospital.name,
        "patients_declared": site.patients,
        "patients": loaded.patients if loaded else None,
        "images": loaded.images if loaded else None,
        "refused": dict(sorted(loaded.refused.items())) if loaded else {},
        "classes": asdict(hospital.classes) if hospital.classes else None,
        "weight": site.weight,
        "sampling_rate": run.study.sampling_rate(site),
        "noise_multiplier": last.noise_multiplier if last else None,
        "rounds_trained": len(hospital.trained),
        "steps": sum(t.steps for t in hospital.trained.values()),
        "epsilon": run.final_epsilon[hospital.name] if run.final_epsilon else None,
        "epsilon_replace_one": _replace_one(run, hospital),
        "ceiling": last.ceiling if last else (run.study.privacy.epsilon if run.study.is_private else None),
        "method": ", ".join(dict.fromkeys(t.method for t in hospital.trained.values())) or None,
        "checks": _worst_checks(hospital),
        "troubles": hospital.troubles,
    }


def _replace_one(run: RunRecord, hospital: Hospital) -> float | None:
    """Epsilon of the same steps where one patient is replaced by another; None without privacy."""
    if not run.study.is_private:
        return None
    trained = hospital.trained.values()
    events = [
        TrainingSteps(t.noise_multiplier, t.sampling_rate, t.steps) for t in trained if t.noise_multiplier is not None
    ]
    return epsilon_replace_one(events, run.study.privacy.delta)


def _worst_checks(hospital: Hospital) -> dict[str, str]:
    """The worst verdict of each test of the private steps, over all rounds."""
    order = ("failed", "not-run", "too-few", "passed")
    verdicts = [trained.checks for trained in hospital.trained.values()]
    return {name: min((v[name] for v in verdicts), key=order.index) for name in verdicts[0]} if verdicts else {}


def _checks_in_words(checks: Mapping[str, str]) -> str:
    """ "all passed", or what did not."""
    others = [f"{name} {verdict.replace('-', ' ')}" for name, verdict in checks.items() if verdict != "passed"]
    return ("; ".join(others) or "all passed") if checks else "–"


def _round_facts(run: RunRecord, turn: Round) -> dict[str, Any]:
    number, times = turn.number, phase_times(run, turn)
    here = [h for h in run.hospitals if number in h.trained]
    sealed = {h.name: h.encrypted[number] for h in run.hospitals if number in h.encrypted}
    told = recipes.load(run.study).fake_rows  # else fakes are made of patients
    return {
        "round": number,
        "attempts": len(turn.attempts),
        "cohort": list(turn.aggregated.cohort) if turn.aggregated else [],
        "seconds": None if times is None else {**asdict(times), "total": times.total},
        "seconds_training": max((h.trained[number].seconds for h in here), default=None),
        "bytes_up": turn.bytes_up,
        "bytes_down": turn.aggregated.bytes_down if turn.aggregated else None,
        "epsilon": {h.name: h.trained[number].epsilon for h in here} if run.study.is_private else None,
        "saturated_share": {name: e.saturated / e.values for name, e in sealed.items()},
        "generator_loss": {h.name: h.trained[number].generator_loss for h in here},
        "discriminator_fake_loss": {h.name: h.trained[number].discriminator_fake_loss for h in here} if told else None,
        "model_hash": turn.applied.model_hash if turn.applied else None,
    }


def phase_times(run: RunRecord, turn: Round) -> PhaseTimes | None:
    """Wall time of one finished round, by phase; None for an unfinished one.

    The coordinator adds while others still train, and hears back when hospitals have updated. So phase 1 is
    its waiting time less its adding, and phase 3 is the broadcast less the slowest hospital's phase 4.
    """
    if turn.aggregated is None or turn.applied is None:
        return None
    cohort = [h for h in run.hospitals if h.name in turn.aggregated.cohort]
    update = max((_update_seconds(h, turn.number) for h in run.hospitals), default=0.0)
    aggregation = turn.aggregated.seconds.aggregation
    return PhaseTimes(
        round=turn.number,
        local=max(0.0, turn.aggregated.seconds.local - aggregation),
        encrypt=max((_encrypt_seconds(h, turn.number) for h in cohort), default=0.0),
        aggregate=aggregation,
        broadcast=max(0.0, turn.applied.seconds.broadcast - update),
        apply=update,
    )


def _encrypt_seconds(hospital: Hospital, number: int) -> float:
    """Quantise, seal and encrypt. Levels are quantised once; a further attempt seals the same again."""
    quantize = hospital.trained[number].quantize_seconds if number in hospital.trained else 0.0
    if number not in hospital.encrypted:
        return quantize
    parts = hospital.encrypted[number].seconds
    return quantize + parts.quantize + parts.seal + parts.encrypt


def _update_seconds(hospital: Hospital, number: int) -> float:
    if number not in hospital.updated:
        return 0.0
    parts = hospital.updated[number].seconds
    return parts.decrypt + parts.check + parts.apply


def _computing(run: RunRecord) -> dict[str, float] | None:
    """Seconds that all parties together spent computing, and the share that was not training."""
    rounds = [r for r in run.finished_rounds if r.aggregated]
    if not rounds:
        return None
    numbers = [r.number for r in rounds]
    training = sum(h.trained[n].seconds for n in numbers for h in run.hospitals if n in h.trained)
    encrypt = sum(_encrypt_seconds(h, n) for n in numbers for h in run.hospitals)
    aggregate = sum(r.aggregated.seconds.aggregation for r in rounds if r.aggregated)
    update = sum(_update_seconds(h, n) for n in numbers for h in run.hospitals)
    other = encrypt + aggregate + update
    return {
        "training": training,
        "encrypt": encrypt,
        "aggregate": aggregate,
        "apply": update,
        "share_outside_training": other / (training + other) if training + other else 0.0,
    }


def _models_agree(run: RunRecord) -> tuple[bool | None, str | None]:
    """Did all who reported hold the same model after every round, and which was the last? None before any."""
    last, equal = None, True
    for turn in run.finished_rounds:
        assert turn.applied is not None
        hashes = {h.updated[turn.number].model_hash for h in run.hospitals if turn.number in h.updated}
        equal = equal and hashes == {turn.applied.model_hash}
        last = turn.applied.model_hash
    return (equal if last else None), last


def _verdict(run: RunRecord, found: Mapping[str, Any]) -> list[str]:
    """The outcome in plain words."""
    taking_part = {name for r in found["rounds"] for name in r["cohort"]}
    if not found["rounds_done"]:
        return ["No round has been finished yet, so there is no outcome to report."]
    done, planned = found["rounds_done"], found["rounds_planned"]
    rounds = f"{done} round{'s' * (done != 1)}" + (f" of {planned}" if done < planned else "")
    privacy = found["privacy"]
    lines = [f"{len(taking_part)} hospitals trained one generator in {rounds}; no image left its hospital."]
    if not privacy["promised"]:
        lines.append(
            "It was trained WITHOUT privacy: no noise was added, and nothing is promised to any patient. For public or"
            " drawn images only."
        )
    elif found["insecure_seed"]:
        lines.append("The noise was seeded: no privacy guarantee, whatever the figures below say.")
    else:
        most, budget, delta = privacy["epsilon_at_most"], privacy["budget"], _plain(privacy["delta"])
        lines.append(
            f"Each patient's epsilon is at most {most:.2f} of {budget:g} at delta {delta};"
            f" unit: {privacy['unit']}; {privacy['adjacency']} adjacency;"
            " local noise in full at each hospital."
        )
    if found["model"]["equal_at_all_hospitals"]:
        alone = run.study.aggregation.share == "generator"
        what = "the same generator; each kept a discriminator of its own" if alone else "the same model"
        lines.append(f"After every round all hospitals held {what}.")
    else:
        lines.append("The hospitals did NOT all hold the same model: do not use it.")
    return lines


def _ending(run: RunRecord) -> str:
    if run.closed is None:
        return "The run is not finished, or it broke off; this page shows what there is."
    return ENDINGS[run.closed.reason]


def _certainty(epsilon: float) -> float:
    """e^epsilon / (1 + e^epsilon): how sure an attacker who starts at 50 % can become, delta apart."""
    return 1 / (1 + math.exp(-epsilon))


def _rounded_up(value: float) -> float:
    """Two decimals, never less than the value: a promise must not be rounded down."""
    return math.ceil(round(value * 100, 9)) / 100


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


# ---- the page


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page."""

    uri: str
    width: int
    height: int
    caption: str
    alt: str
    colour: str = ""


def _page(run: RunRecord, found: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "checks": _checks_in_words, "steps": recipe_words.steps_in_words, "shared": recipe_words.shared_in_words,
        "seconds": seconds_text, "bytes": bytes_text, "percent": _percent, "at_most": _at_most,
        "plain": _plain, "count": _count,
    }  # fmt: skip
    environment.filters.update(filters)
    return environment.get_template("report.html").render(
        f=found,
        study=run.study,
        translation=recipe_words.is_translation(run.study),
        fakes_told=recipes.load(run.study).fake_rows,
        picture_rows=recipes.load(run.study).row_names(),
        charts={name: Markup(svg) for name, svg in _charts(run, found).items()},
        film=_film(run),
        beside=_beside(run),
        arms=_arms(run),
        comparison=_comparison(run),
        quality=_quality(run),
        lower=LOWER,
        higher=HIGHER,
        translations=_translations(run),
        judged=_judged(run),
        colours={h.name: drawing.site_colour(i) for i, h in enumerate(run.hospitals)},
        traffic=_traffic_rows(found["rounds"]),
        timed=_thin([r for r in found["rounds"] if r["seconds"]], TABLE_ROWS),
        saturated=max(
            ((share, n, r["round"]) for r in found["rounds"] for n, share in r["saturated_share"].items()),
            default=None,
        ),
        toml=study_toml(run.study),
        insecure_seed=run.insecure_seed,
        certainties=[(e, _certainty(e)) for e in (1, 2, 4, 8)],
    )


def _charts(run: RunRecord, found: Mapping[str, Any]) -> dict[str, str]:
    """name -> SVG, of the charts for which there are numbers."""
    drawn: dict[str, str] = {}
    names, rounds = [h.name for h in run.hospitals], found["rounds"]

    def per_hospital(key: str) -> dict[str, list[tuple[int, float]]]:
        """Points of every hospital, in the order of the roster; nobody has any of what was not told."""
        return {name: [(r["round"], r[key][name]) for r in rounds if name in (r[key] or {})] for name in names}

    spent, generator = per_hospital("epsilon"), per_hospital("generator_loss")
    discriminator = per_hospital("discriminator_fake_loss")
    if any(spent.values()):
        ceilings = {h["name"]: h["ceiling"] for h in found["hospitals"]}
        ends = ", ".join(f"{name} {points[-1][1]:.2f}" for name, points in spent.items() if points)
        budgets = ", ".join(f"{c:g}" for c in sorted(set(ceilings.values())))
        alt = f"Line chart of epsilon after each round. At the end: {ends}. Budget: {budgets}."
        drawn["epsilon"] = charts.epsilon(spent, ceilings, alt)
    if any(generator.values()):
        what = "loss of the generator"
        what += ", and of the discriminator on generated images" if any(discriminator.values()) else ""
        alt = f"Line charts over the rounds, one line a hospital: {what}."
        drawn["losses"] = charts.losses(generator, discriminator, alt)
    saturated = per_hospital("saturated_share")
    if any(share for points in saturated.values() for _, share in points):
        alt = "Line chart: share of values that were limited, by hospital and round."
        drawn["saturation"] = charts.saturation(saturated, alt)
    times = [t for t in (phase_times(run, r) for r in run.rounds) if t]
    if times:
        alt = "Stacked bars of the seconds of each round by phase; the table below holds the numbers."
        drawn["phases"] = charts.phases(times, alt)
    carried = [r for r in rounds if r["bytes_up"]]
    if carried and found["float32_bytes"]:
        up = [(r["round"], float(max(r["bytes_up"].values()))) for r in carried]
        down = [(r["round"], float(r["bytes_down"])) for r in carried]
        alt = (
            f"Line chart: bytes of one hospital in one round. At the end up {bytes_text(up[-1][1])}, down"
            f" {bytes_text(down[-1][1])}; plaintext float32 {bytes_text(found['float32_bytes'])} each way."
        )
        drawn["traffic"] = charts.traffic(
            {"up, encrypted update": up}, {"down, encrypted sum": down}, found["float32_bytes"], alt
        )
    if rows := _utility_rows(run):
        chance = _shared([a.tstr.chance for a in run.arms if a.tstr])
        values = "; ".join(f"{row.label} {row.auc[0]:.3f}" for row in rows)
        alt = f"Dot chart of area under the ROC curve and accuracy by arm. Area: {values}."
        drawn["utility"] = charts.utility(rows, chance, alt)
    if near := _similarity_rows(run):
        values = "; ".join(f"{row.label} {row.psnr:.1f}" for row in near)
        alt = f"Dot chart of PSNR and SSIM by arm. PSNR in dB: {values}."
        drawn["similarity"] = charts.similarity(near, alt)
    return drawn


def _utility_rows(run: RunRecord) -> list[charts.UtilityRow]:
    rows = []
    for arm in run.arms:
        if arm.tstr:
            scores = (arm.tstr.auc.mean, arm.tstr.auc.std), (arm.tstr.accuracy.mean, arm.tstr.accuracy.std)
            rows.append(charts.UtilityRow(arm.label, _arm_colour(run, arm), *scores))
    if rows and run.real and run.real.tstr:
        auc, accuracy = run.real.tstr.auc, run.real.tstr.accuracy
        scores = (auc.mean, auc.std), (accuracy.mean, accuracy.std)
        rows.append(charts.UtilityRow(run.real.label, drawing.MUTED, *scores))
    return rows


def _similarity_rows(run: RunRecord) -> list[charts.SimilarityRow]:
    rows = [
        charts.SimilarityRow(arm.label, _arm_colour(run, arm), arm.similarity.psnr, arm.similarity.ssim)
        for arm in run.arms
        if arm.similarity
    ]
    if untouched := _untouched(run):
        rows.append(charts.SimilarityRow(untouched["label"], drawing.MUTED, untouched["psnr"], untouched["ssim"]))
    return rows


def _arm_colour(run: RunRecord, arm: Arm) -> str:
    places = {f"alone-{h.name}": i for i, h in enumerate(run.hospitals)}
    if run.study.is_private and not arm.private:
        return drawing.ALARM
    return drawing.stand_in(places[arm.name]) if arm.name in places else drawing.INK


def _untouched(run: RunRecord) -> dict[str, Any] | None:
    """The inputs as they are, scored like outputs; the same for every arm, for they are made in the same way."""
    found = next((arm.similarity for arm in run.arms if arm.similarity), None)
    if found is None:
        return None
    return {
        "label": "input as it is",
        **{name: getattr(found, f"{name}_input") for name in ("psnr", "ssim", "mae", "dice", "iou")},
    }


def _shared(values: Sequence[T]) -> T | None:
    """The value that all have; None where they differ."""
    return values[0] if values and all(v == values[0] for v in values) else None


def _judged(run: RunRecord) -> dict[str, Any]:
    """By what arms are judged: "tstr", "similarity" or nothing, and the sentence that says how, or why not."""
    by = {"tstr": any(a.tstr for a in run.arms), "similarity": any(a.similarity for a in run.arms)}
    scores = [a.tstr or a.similarity for a in run.arms]
    masks = any(a.similarity.dice is not None for a in run.arms if a.similarity)
    words = recipe_words.how_judged(
        run.study,
        recipes.load(run.study).judged,
        scored=any(by.values()) or any(a.translation for a in run.arms),
        tested_on=_shared([s.tested_on for s in scores if s]),
        masks=masks,
    )
    by_one = next((name for name, is_so in by.items() if is_so), "")
    return {"by": by_one, "words": words, "untouched": _untouched(run), "masks": masks}


def _quality(run: RunRecord) -> dict[str, Any] | None:
    """Arms as sets of images: a row each, then the hospitals' own images."""
    rows = [(arm.label, arm.private, arm.quality) for arm in run.arms if arm.quality]
    if not rows:
        return None
    if run.real and run.real.quality:
        count = _settings([run.real.quality])["synthetic_images"]
        rows.append((f"{count:.0f} of the hospitals' own images (not synthetic)", True, run.real.quality))

    def cells(quality: Quality) -> list[str]:
        return [_cell(quality, name, form) for name, (_, form) in {**LOWER, **HIGHER}.items()]

    shown = [(label, private, cells(quality)) for label, private, quality in rows]
    return {"rows": shown, **_how_measured([quality for _, _, quality in rows])}


def _translations(run: RunRecord) -> dict[str, Any] | None:
    """Images brought to the other domain, as sets: a row for the images as they are, then one an arm."""
    arms = [(arm.label, arm.private, arm.translation) for arm in run.arms if arm.translation]
    if not arms:
        return None
    forms = {"kid": "{:.3f}", "mmd": "{:.3f}"}

    def cells(qualities: Sequence[Quality]) -> list[str]:
        return [_cell(q, name, form) for q in qualities for name, form in forms.items()]

    first = arms[0][2]
    rows = [("as they are (no network)", True, cells([t.before for t in first]))]
    rows += [(label, private, cells([t.after for t in found])) for label, private, found in arms]
    return {
        "ways": [f"{t.source} to {t.target}" for t in first],
        "rows": rows,
        **_how_measured([q for _, _, found in arms for t in found for q in (t.before, t.after)]),
    }


def _cell(quality: Quality, name: str, form: str) -> str:
    return form.format(quality.numbers[name]).replace("%", " %") if name in quality.numbers else "not measured"


def _how_measured(qualities: Sequence[Quality]) -> dict[str, Any]:
    """What stands under a table of sets: on which images, through which extractor, and why a number is missing."""
    reasons = [missing.reason for q in qualities for missing in q.not_measured]
    words = {"statement": qualities[0].statement, "reasons": list(dict.fromkeys(reasons))}
    return {**words, "settings": _settings(qualities)}


def _settings(qualities: Sequence[Quality]) -> dict[str, float | str]:
    """Of all measures together; where they differ, those of the first."""
    return {k: v for q in reversed(qualities) for m in reversed(q.measurements) for k, v in m.settings.items()}


def _comparison(run: RunRecord) -> str:
    """What the arms say, in words, with the spread beside the difference where there is one."""
    if any(a.similarity for a in run.arms):
        unit, what = " dB", "outputs come to a PSNR of"
        scores = {a.name: (a.similarity.psnr, 0.0) for a in run.arms if a.similarity}
    else:
        unit, what = "", "the generator reaches an area of"
        scores = {a.name: (a.tstr.auc.mean, a.tstr.auc.std) for a in run.arms if a.tstr}
    alone = {name: score for name, score in scores.items() if name.startswith("alone-")}
    if "federated" not in scores or not alone:
        return ""

    def told(value: float) -> str:
        return f"{value:.2f}{unit}" if unit else f"{value:.3f}"

    best_name = max(alone, key=lambda name: alone[name][0])
    (together, spread_one), (best, spread_two) = scores["federated"], alone[best_name]
    words = "above" if together >= best else "below"
    said = (
        f"Trained together, {what} {told(together)}. That is {told(abs(together - best))} {words} the best single"
        f" hospital ({best_name.removeprefix('alone-')}, {told(best)})"
    )
    if not unit:
        spread = 2 * math.hypot(spread_one, spread_two)
        verdict = "more than" if abs(together - best) > spread else "within"
        said += f", {verdict} twice the combined standard deviation ({spread:.3f})"
    if untouched := _untouched(run):
        said += f"; the inputs as they are: {told(untouched['psnr'])}"
    if "fedavg" in scores:
        said += f". Plain averaging of both networks in place of the study's aggregation: {told(scores['fedavg'][0])}"
    return said + "."


def _film(run: RunRecord) -> tuple[str, list[Picture]]:
    """Whose film strip it is, and its frames."""
    for hospital in run.hospitals:
        if hospital.samples:
            frames = []
            for number in _thin(sorted(hospital.samples), FILM_FRAMES):
                caption = f"after round {number}" if number else "before training"
                same = "drawn inputs" if recipe_words.is_translation(run.study) else "latent points"
                alt = f"Generated images {caption}, the same {same} in every frame"
                frames.append(_picture(hospital.samples[number], caption, alt))
            return hospital.name, frames
    return "", []


def _beside(run: RunRecord) -> list[Picture]:
    """The newest generated images, then each hospital's own."""
    pictures = []
    for hospital in run.hospitals:
        if hospital.samples:
            number = max(hospital.samples)
            what = "what is made of drawn inputs" if recipe_words.is_translation(run.study) else "synthetic"
            caption = f"{what}, after round {number}: the one generator that every hospital holds"
            alt = f"Generated images, rows: {', '.join(recipes.load(run.study).row_names())}"
            pictures.append(_picture(hospital.samples[number], caption, alt))
            break
    for i, hospital in enumerate(run.hospitals):
        if hospital.real:
            kind = "phantoms" if hospital.drawn else "images from the folder given"
            rows = "and below each its target" if run.study.images.paired else "one row a class"
            alt = f"Images that {hospital.name} trained on, {rows}"
            caption = f"{hospital.name}: its own {kind}, {rows}"
            pictures.append(_picture(hospital.real, caption, alt, drawing.site_colour(i)))
    return pictures


def _arms(run: RunRecord) -> list[tuple[Any, Picture | None]]:
    """Each arm with its picture, if that is there yet."""
    found = []
    for arm in run.arms:
        path = run.folder / arm.picture
        alt = f"Images generated by: {arm.label}; rows: {', '.join(recipes.load(run.study).row_names())}"
        found.append((arm, _picture(path, arm.label, alt) if path.is_file() else None))
    return found


def _picture(path: Path, caption: str, alt: str, colour: str = "") -> Picture:
    data = path.read_bytes()[: MAX_PICTURE_BYTES + 1]
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR" or not 33 <= len(data) <= MAX_PICTURE_BYTES:
        raise RunError("RUN_RECORD", "not a PNG of at most 16 MiB", path.name)
    width, height = struct.unpack(">II", data[16:24])
    uri = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(uri, width, height, caption, alt, colour)


def _traffic_rows(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bytes per round; consecutive rounds with the same bytes share a row."""
    rows: list[dict[str, Any]] = []
    for turn in rounds:
        if not turn["bytes_up"]:
            continue
        sizes = sorted(turn["bytes_up"].values())
        row = {"up": sizes, "down": turn["bytes_down"]}
        if rows and {k: rows[-1][k] for k in row} == row and rows[-1]["last"] == turn["round"] - 1:
            rows[-1]["last"] = turn["round"]
        else:
            rows.append({"first": turn["round"], "last": turn["round"], **row})
    return rows


def _thin(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def study_toml(study: Study) -> str:
    """The study as TOML, without the hospitals' public keys: a simulation makes its own."""
    values = study.model_dump(mode="json")
    if study.privacy == Privacy(unit="none"):
        values["privacy"] = "none"  # the short form shows no number that is not used
    top = {k: v for k, v in values.items() if not isinstance(v, dict) and k != "sites"}
    blocks = [_toml_lines(top)]
    for site in values["sites"]:
        keyless = {k: v for k, v in site.items() if not k.endswith("_key")}
        blocks.append(["[[sites]]", *_toml_lines(keyless)])
    blocks += [[f"[{k}]", *_toml_lines(v)] for k, v in values.items() if isinstance(v, dict)]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    # JSON's strings, numbers and arrays are TOML's too, but for one control character that JSON leaves bare.
    pairs = {k: json.dumps(v, ensure_ascii=False).replace("\x7f", "\\u007f") for k, v in values.items()}
    return [f"{k} = {text}" for k, text in pairs.items()]


def _percent(share: float) -> str:
    """``7.2 %``, ``0.04 %``, ``99.97 %``."""
    percent = 100 * share
    if 0 < percent < 0.01:
        return "under 0.01 %"
    return f"{percent:.2f} %" if percent < 0.1 or 99 < percent < 100 else f"{percent:.1f} %"


def _at_most(share: float) -> str:
    """Like `_percent` but never rounded down, for a bound; and never up to 100 %."""
    digits = 1 if share <= 0.99 else 2
    step = 10**digits
    percent = math.ceil(round(100 * share * step, 6)) / step
    return f"{percent:.{digits}f} %" if percent < 100 or share == 1 else "over 99.99 %"


def _plain(value: float) -> str:
    """``1e-4`` rather than ``0.0001``."""
    if value and abs(value) < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError("RUN_PATH", f"cannot be written ({error.strerror})", str(path)) from None
