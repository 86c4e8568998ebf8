"""Recipes with planted mixings: each is refused before a study is signed. What cannot be seen is listed, too."""

from __future__ import annotations

import hashlib
import textwrap

import pytest
from test_recipes import KINDS, study_of, trainer_of

from fedmedgan.client import gans
from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.training import estimate
from fedmedgan.client.training.estimate import refuse_mixing
from fedmedgan.client.training.mixing import Trial
from fedmedgan.shared.errors import PrivacyError, StudyError

HEAD = """
import torch
from torch import nn
from torch.nn import functional
from fedmedgan.client.gans.recipe import Records
from fedmedgan.client.gans.cdcgan import ConditionalDCGAN as Base, Discriminator, Generator
from fedmedgan.client.gans.pix2pix import Pix2Pix
from fedmedgan.client.gans.wgan_gp import WGANGP
"""


def in_a_layer(code: str, made: str = "self.seen = 0") -> str:
    """A discriminator that does this to its images."""
    return f"""
class D(Discriminator):
    def __init__(self, images, gan):
        super().__init__(images, gan)
        {made}
    def forward(self, x, y):
{textwrap.indent(textwrap.dedent(code), " " * 8)}
        return super().forward(x, y)
class RECIPE(Base):
    def build(self):
        return Generator(self.images, self.gan), D(self.images, self.gan)
"""


def in_the_inputs(code: str) -> str:
    """A recipe that does this to the images x and labels y of its records."""
    return f"""
class RECIPE(Base):
    def discriminator_inputs(self, generator, records, fakes, random):
        x, y, _ = records
        if len(x):
{textwrap.indent(textwrap.dedent(code), " " * 12)}
        return super().discriminator_inputs(generator, Records(x, y, x), fakes, random)
"""


def in_the_fakes(code: str) -> str:
    """A recipe that does this to the images `made` and `labels` of its fakes, with the images x and labels y drawn."""
    return f"""
class RECIPE(Base):
    def discriminator_inputs(self, generator, records, fakes, random):
        x, y, _ = records
        labels = fakes.labels_F
        with torch.no_grad():
            made = generator(*fakes)
        if len(x):
{textwrap.indent(textwrap.dedent(code), " " * 12)}
        is_real = (torch.arange(len(x) + len(made)) < len(x)).float()
        return torch.cat([x, made]), torch.cat([y, labels]), is_real
"""


def in_the_losses(expression: str) -> str:
    """A recipe that returns this, of the losses l of its rows."""
    return f"""
class RECIPE(Base):
    def discriminator_losses(self, d, *inputs):
        l = super().discriminator_losses(d, *inputs)
        return {expression}
"""


MIXINGS = {
    "dropout": in_a_layer("x = functional.dropout(x, 0.3)"),
    "a mean that is detached": in_a_layer("x = x - x.mean(0).detach()"),
    "statistics of large batches": in_a_layer("if len(x) > 8: x = x - x.mean(0)"),
    "groups of four": in_a_layer(
        "if len(x) % 4 == 0: x = x - x.view(-1, 4, *x.shape[1:]).mean(1).repeat_interleave(4, 0)"
    ),
    "centred inputs": in_the_inputs("x = x - x.mean(0)"),
    "each row sees the next": in_the_inputs("x = torch.cat([x[:-1] + x[1:], x[-1:]])"),
    "each row sees all later ones": in_the_inputs("x = x.flip(0).cumsum(0).flip(0)"),
    "centred by class": in_the_inputs("x = x - torch.stack([x[y == c].mean(0) for c in y])"),
    "noise that the size of the batch seeds": in_the_inputs(
        "x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x)))"
    ),
    "noise that the labels seed": in_the_inputs(
        "x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(int(y.sum())))"
    ),
    "noise that the pixels seed": in_the_inputs(
        "x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.sum() * 1000) % 2**31))"
    ),
    "a loss over the size of the batch": in_the_losses("l / len(l)"),
    "hard examples": in_the_losses("l * (l >= l.median().detach())"),
    "views of other rows": in_the_losses("torch.cat([l, l.roll(1)])"),
    "a relativistic loss": """
class RECIPE(Base):
    def row_losses(self, answers, is_real, labels):
        return functional.softplus((answers - answers.mean().detach()) * (1 - 2 * is_real))
""",
    "classes balanced in the batch": """
class RECIPE(Base):
    def discriminator_inputs(self, generator, records, fakes, random):
        x, y, r = super().discriminator_inputs(generator, records, fakes, random)
        return x, y, r, 1 / torch.bincount(records.labels_R, minlength=4).clamp(min=1).float()[y]
    def discriminator_losses(self, d, x, y, r, w):
        return super().discriminator_losses(d, x, y, r) * w
""",
    "feature matching": """
class RECIPE(Base):
    def discriminator_inputs(self, generator, records, fakes, random):
        if len(records.labels_R): self.seen = records.images_R1SS.mean(0)
        return super().discriminator_inputs(generator, records, fakes, random)
    def generator_loss(self, generator, discriminator, fakes):
        return (generator(*fakes).mean(0) - self.seen).square().mean()
""",
    "the limit of a critic from patients": """
class RECIPE(Base):
    def discriminator_inputs(self, generator, records, fakes, random):
        if len(records.labels_R): self.seen = records.images_R1SS.abs().mean()
        return super().discriminator_inputs(generator, records, fakes, random)
    def after_discriminator_step(self, discriminator):
        with torch.no_grad():
            for p in discriminator.parameters(): p.clamp_(-self.seen, self.seen)
""",
    "a pool of earlier records": """
class RECIPE(Base):
    def __init__(self, study):
        super().__init__(study)
        self.pool = []
    def discriminator_inputs(self, generator, records, fakes, random):
        x, y, _ = records
        self.pool = [*self.pool, *x][-50:]
        x = torch.stack([self.pool[i % len(self.pool)] for i in range(len(x))]) if len(x) else x
        return super().discriminator_inputs(generator, Records(x, y, x), fakes, random)
""",
    "behind a coin, centred": in_the_inputs("if float(random.uniform(1)) > 0.5: x = x - x.mean(0)"),
    "seldom, with the next": in_the_inputs(
        "coins = random.uniform(len(x)).view(-1, 1, 1, 1).float()\nx = torch.where(coins > 0.97, x.roll(1, 0), x)"
    ),
    "noise that the size of the batch scales, for some": in_the_inputs(
        "if float(random.uniform(1)) < 0.05: x = x * len(x)"
    ),
    "fakes with the labels of the drawn": in_the_fakes("labels = y.repeat(len(labels))[: len(labels)]"),
    "fakes with the first label": in_the_fakes("labels = y[:1].expand(len(labels))"),
    "fakes with the image of the first": in_the_fakes("made = 0.9 * made + 0.1 * x[:1]"),
    "fakes with a mean of the images": in_the_fakes("made = made + 0.1 * x.mean(0)"),
    "as many fakes as records": in_the_fakes("made, labels = made[: len(x)], labels[: len(x)]"),
    "a mean that runs": in_a_layer(
        "old = self.mean\nif len(x): self.mean = (0.9 * self.mean + 0.1 * x.mean(0)).detach()\nx = x - old",
        "self.mean = torch.zeros(1, 28, 28)",
    ),
    "a buffer that keeps an image": in_a_layer(
        "if len(x): self.last = x[0].detach().clone()", 'self.register_buffer("last", torch.zeros(1, 28, 28))'
    ),
    "a weight that keeps an image": in_a_layer(
        "if len(x): self.last.data.copy_(x[0].detach())",
        "self.last = nn.Parameter(torch.zeros(1, 28, 28), requires_grad=False)",
    ),
    "a bare weight that no layer owns": in_a_layer("x = x * self.gain", "self.gain = nn.Parameter(torch.ones(1))"),
}
POOL = """
from fedmedgan.client.gans.cyclegan import CycleGAN
class RECIPE(CycleGAN):
    def __init__(self, study):
        super().__init__(study)
        self.pool = []
    def discriminator_inputs(self, generator, records, fakes, random):
        images, made, own = super().discriminator_inputs(generator, records, fakes, random)
        shown = []
        for image in made:
            if len(self.pool) < 50:
                self.pool.append(image)
            elif float(random.uniform(1)) > 0.5:
                i = int(random.integers(1, 50))
                self.pool[i], image = image, self.pool[i]
            shown.append(image)
        return images, torch.stack(shown) if shown else made, own
"""
"""The pool of 50 of the CycleGAN paper."""
GENERATORS = {
    "a private generator's step": """
class RECIPE(Pix2Pix):
    def generator_losses(self, g, d, *inputs):
        l = super().generator_losses(g, d, *inputs)
        return l * l.mean().detach()
""",
}


@pytest.fixture
def study_with(tmp_path, monkeypatch):
    """The study of a recipe that is given as text."""
    monkeypatch.setattr(gans, "__path__", [*gans.__path__, str(tmp_path)])

    def made(text: str, **sections):
        name = "planted" + hashlib.sha256(text.encode()).hexdigest()[:8]
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        return study_of(name, **sections)

    return made


@pytest.mark.parametrize("text", MIXINGS.values(), ids=MIXINGS.keys())
def test_a_mixing_is_refused(study_with, text):
    with pytest.raises(PrivacyError) as caught:
        refuse_mixing(study_with(text, images={"classes": ("a", "b", "c")}))
    assert caught.value.code == "PRIVACY_MODEL"


@pytest.mark.parametrize("name", [name for name in MIXINGS if name.startswith("fakes with the")])
def test_the_probe_of_a_round_finds_fakes_that_depend_on_patients(study_with, name):
    one = trainer_of(study_with(MIXINGS[name], images={"classes": ("a", "b", "c")}))
    one.train(1)
    assert one.checks["rows"] == "failed"


@pytest.mark.parametrize("text", GENERATORS.values(), ids=GENERATORS.keys())
def test_a_mixing_of_a_private_generator_is_refused(study_with, text):
    with pytest.raises(PrivacyError) as caught:
        refuse_mixing(study_with(text, gan={"private": "both", "task": "denoise"}))
    assert caught.value.code == "PRIVACY_MODEL"


def test_what_has_passed_is_not_tried_again_but_another_study_and_other_code_are(monkeypatch):
    """Simulated hospitals all sign the same study, and a trial takes seconds."""
    study, tried, load = study_of("vanilla", training={"generator_lr": 0.003}), [], recipes.load
    monkeypatch.setattr(estimate, "_trainer", lambda study: tried.append(study.hash) or trainer_of(study))
    for _ in range(2):
        refuse_mixing(study)
    assert tried == [study.hash]
    other = study.training.model_copy(update={"generator_lr": 0.002})
    refuse_mixing(study.model_copy(update={"training": other}))
    assert len(tried) == 2
    monkeypatch.setattr(recipes, "load", lambda study: type("Other", (type(load(study)),), {})(study))
    refuse_mixing(study)
    assert len(tried) == 3


def test_what_was_refused_is_refused_again(study_with):
    study = study_with(in_a_layer("x = x - x.mean(0)"))
    for _ in range(2):
        with pytest.raises(PrivacyError):
            refuse_mixing(study)


def test_a_mixing_of_batches_as_large_as_a_step_is_refused(study_with):
    study = study_with(in_a_layer("if len(x) > 70: x = x - x.mean(0)"))
    refuse_mixing(study)
    large = study.training.model_copy(update={"patients_per_step": 40})
    with pytest.raises(PrivacyError):
        refuse_mixing(study.model_copy(update={"training": large}))


def test_the_image_pool_of_the_cyclegan_paper_is_refused(study_with):
    """A fake of a patient would come back in a step that did not draw that patient."""
    with pytest.raises(PrivacyError) as caught:
        refuse_mixing(study_with(POOL, gan={"private": "both"}, images={"classes": ("a", "b")}))
    assert caught.value.code == "PRIVACY_MODEL"


def test_the_probe_of_a_round_draws_anew(study_with):
    """A mixing behind a coin shows in some round."""
    one = trainer_of(study_with(MIXINGS["behind a coin, centred"], images={"classes": ("a", "b", "c")}))
    for _ in range(12):  # two probes each: all of them on one side of the coin once in eight million
        one.train(1)
    assert one.checks["rows"] == "failed"


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_found_in_the_recipes_that_are_there(name):
    for seed in (1, 2):
        assert Trial(trainer_of(study_of(name)), seed).found() == ""


def test_fakes_of_a_mixing_generator_are_part_of_no_record():
    """One patient would move the sum by up to 22 C: each fake would depend on who else was drawn."""
    with pytest.raises(StudyError) as caught:
        refuse_mixing(study_of("wgan_gp", gan={"generator_norm": "batch"}))
    assert caught.value.code == "PRIVACY_MODEL"
    refuse_mixing(study_of("wgan", gan={"generator_norm": "batch"}))


@pytest.mark.parametrize(
    ("name", "setting"), [("wgan_gp", {"views": 2}), ("wgan", {"real_label": 0.9}), ("pix2pix", {"views": 2})]
)
def test_a_setting_that_a_recipe_has_no_use_for_is_refused(name, setting):
    with pytest.raises(StudyError, match="no use"):
        refuse_mixing(study_of(name, training=setting))


UNSEEN = {
    "a rule that random images do not trigger": in_a_layer("if (x[:, :, 0] > 0.9).all(): x = x - x.mean(0)"),
    "a rule of a late step": in_a_layer("self.seen += 1\nif self.seen > 10_000: x = x - x.mean(0)"),
}


@pytest.mark.parametrize("text", UNSEEN.values(), ids=UNSEEN.keys())
def test_what_hides_is_not_found_and_the_page_says_so(study_with, text):
    """The limit, written down in docs/write-a-recipe.md: a recipe is code that somebody has to read."""
    refuse_mixing(study_with(text))
