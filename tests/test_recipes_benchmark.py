"""The benchmark that trains every recipe by the command has a valid study of each."""

from __future__ import annotations

from conftest import load_benchmark
from test_recipes import PACKAGED

from fedmedgan.client.gans import recipe as recipes
from fedmedgan.client.gans.pix2pix import Pix2Pix
from fedmedgan.shared.study import parse


def test_every_recipe_and_every_task_has_a_private_study_that_fits():
    benchmark, seen = load_benchmark("recipes"), set()
    for case in benchmark.CASES:
        study, text = benchmark.study_of(case)
        assert parse(text).hash == study.hash
        assert study.is_private
        recipes.load(study).networks()
        seen.add((study.gan.recipe, study.gan.task))
    assert {name for name, _ in seen} == set(PACKAGED)
    assert {task for name, task in seen if name == "pix2pix"} == set(Pix2Pix.tasks)
