"""The result object: what was computed from patients cannot be had from what may leave, nor be put into a release."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from fedmedgan.client.release.images import NotMeasurable
from fedmedgan.client.release.rule import (
    FREE,
    MUST_STAY,
    Evaluation,
    Measurement,
    NotMeasured,
    Rule,
    refuse_in_release,
)
from fedmedgan.shared.errors import PrivacyError

FREE_ONE = Measurement("ms_ssim", "free", {"ms_ssim": 0.25}, {"synthetic_images": 40})
OF = {"real_images": 6789, "extractor_sha256": "ab12", "extractor_trained_on": "phantoms", "extractor_accuracy": 0.9}
SECRET = Measurement("fid", "sensitive", {"fid": 12345.5}, OF)
SECRET_REASON = NotMeasured("kid", "sensitive", "KID needs at least 20 images; 1357 given")
FREE_REASON = NotMeasured("duplicates", "free", "the duplicate rate needs at least 2 images")
HIDDEN = ("12345", "6789", "1357", "fid", "kid", "KID", "ab12", "sensitive", "patient")


def local() -> Evaluation:
    return Evaluation(Rule.LOCAL, (FREE_ONE, SECRET), (SECRET_REASON, FREE_REASON), "")


def test_what_may_leave_holds_no_word_of_what_must_stay():
    free = local().may_leave()
    assert free.numbers() == {"ms_ssim": 0.25}
    assert free["ms_ssim"] is FREE_ONE
    assert [n.name for n in free.not_measured] == ["duplicates"]
    assert "fid" not in free
    with pytest.raises(KeyError):
        free["fid"]
    shown = (repr(free), free.text(), json.dumps(free.record()), pickle.dumps(free).decode("latin-1"))
    for text in shown:
        assert not [word for word in HIDDEN if word in text], text
    assert free.statement == FREE
    assert free.record()["must_stay"] is False
    refuse_in_release(free.record())
    assert free.may_leave() == free


def test_the_local_result_says_that_it_must_stay_and_shows_no_number_by_accident():
    evaluation = local()
    assert evaluation.numbers() == {"ms_ssim": 0.25, "fid": 12345.5}
    assert MUST_STAY in evaluation.text()
    assert "12346" in evaluation.text() and "1357 given" in evaluation.text()
    assert evaluation.record()["statement"] == MUST_STAY
    assert not [word for word in ("12345", "6789", "1357") if word in repr(evaluation)]


@pytest.mark.parametrize("rule", [Rule.PUBLIC, Rule.RELEASE])
@pytest.mark.parametrize("parts", [((SECRET,), ()), ((), (SECRET_REASON,))])
def test_no_other_rule_can_hold_it(rule, parts):
    with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
        Evaluation(rule, *parts)
    Evaluation(Rule.LOCAL, *parts)


def test_public_numbers_may_leave_and_say_of_which_images():
    public = Evaluation(Rule.PUBLIC, (FREE_ONE, Measurement("fid", "public", {"fid": 1.0}, {})), (), "drawn phantoms")
    assert public.may_leave() is public
    assert "drawn phantoms" in public.statement
    refuse_in_release(public.record())


def test_a_release_refuses_a_record_that_must_stay_at_any_depth():
    record = local().record()
    for hidden in (
        record,
        {"card": {"quality": record}},
        [1, "x", {"cards": [record]}],
        json.loads(json.dumps({"a": record})),
        {"numbers": record["measurements"]},  # without the mark, the measurements still carry theirs
    ):
        with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
            refuse_in_release(hidden)
    refuse_in_release({"a": [1, 2.5, None, "must_stay"], "must_stay": False})


def test_a_rule_is_one_of_three():
    assert [Rule.of(name) for name in ("public", "local", "release")] == list(Rule)
    assert Rule.of(Rule.LOCAL) is Rule.LOCAL
    for wrong in (None, "", "Public", "free", 1, True, Rule):
        with pytest.raises(PrivacyError, match="PRIVACY_RELEASE"):
            Rule.of(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_is_finite(value):
    with pytest.raises(NotMeasurable, match="no finite number"):
        Measurement("fid", "free", {"fid": value}, {})


def test_the_error_survives_a_process_pool():
    error = pickle.loads(pickle.dumps(NotMeasurable("too few", "class 1")))
    assert (type(error), error.code, error.what, error.where) == (
        NotMeasurable,
        "DATA_EVALUATION",
        "too few",
        "class 1",
    )
    assert copy.deepcopy(local()) == local()
