"""The Study: what it accepts, what it refuses and how it says so."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmedgan.shared.errors import HINTS, DataError, FedMedGanError, StudyError
from fedmedgan.shared.study import from_dict, load, parse
from fedmedgan.simulations import DEFAULT_STUDY

SITES = "".join(f'[[sites]]\nname = "{n}"\npatients = 120\n' for n in ("north", "south", "west"))
HEAD = 'name = "demo"\n'


def study(extra: str = "", head: str = HEAD, sites: str = SITES):
    return parse(head + sites + extra)


def test_defaults_give_a_valid_study_with_a_stable_hash():
    s = study()
    assert s.hash == study().hash
    assert re.fullmatch("[0-9a-f]{64}", s.hash)
    assert s.total_steps == s.training.rounds * s.training.local_steps
    assert s.sampling_rate(s.sites[0]) == 32 / 120


def test_the_built_in_study_says_where_a_value_is_not_the_default():
    text = DEFAULT_STUDY.read_text(encoding="utf-8")
    blocks = {block.split("]")[0]: block.splitlines() for block in text.split("\n[")}
    built_in, default = parse(text), study()
    for section in ("images", "gan", "training", "aggregation", "privacy", "secure_sum", "convergence"):
        of, usual = (getattr(s, section).model_dump() for s in (built_in, default))
        for key in {k for k in of if of[k] != usual[k]}:
            (line,) = (line for line in blocks[section] if line.startswith(f"{key} = "))
            assert "default" in line, key


def test_the_hash_survives_a_round_trip_through_json():
    s = study("[privacy]\nepsilon = 3.5\n")
    assert from_dict(s.model_dump(mode="json")).hash == s.hash


@pytest.mark.parametrize(
    "change",
    [
        "[privacy]\nepsilon = 8.000001\n",
        "[training]\nrounds = 11\n",
        "[images]\nsize = 32\n",
        "[gan]\ninit_seed = 2\n",
        "[secure_sum]\nbits = 9\n",
    ],
)
def test_any_change_is_another_study(change):
    assert study(change).hash != study().hash


BAD = {
    "nan": ("[privacy]\nepsilon = nan\n", "CONFIG_NOT_FINITE"),
    "infinite": ("[privacy]\nepsilon = inf\n", "CONFIG_NOT_FINITE"),
    "minus infinity": ("[training]\ngenerator_lr = -inf\n", "CONFIG_NOT_FINITE"),
    "zero epsilon": ("[privacy]\nepsilon = 0.0\n", "CONFIG_RANGE"),
    "negative clip": ("[privacy]\nclip_norm = -1.0\n", "CONFIG_RANGE"),
    "bool is no number": ("[privacy]\nepsilon = true\n", "CONFIG_TYPE"),
    "text is no number": ('[privacy]\nepsilon = "4"\n', "CONFIG_TYPE"),
    "delta 0": ("[privacy]\ndelta = 0.0\n", "CONFIG_DELTA"),
    "delta 1": ("[privacy]\ndelta = 1.0\n", "CONFIG_DELTA"),
    "delta 2": ("[privacy]\ndelta = 2.0\n", "CONFIG_DELTA"),
    "delta not below 1/n": ("[privacy]\ndelta = 0.00834\n", "CONFIG_DELTA"),
    "rounds 0": ("[training]\nrounds = 0\n", "CONFIG_RANGE"),
    "rounds negative": ("[training]\nrounds = -5\n", "CONFIG_RANGE"),
    "rounds huge": ("[training]\nrounds = 1000000000000\n", "CONFIG_RANGE"),
    "steps a float": ("[training]\nlocal_steps = 2.5\n", "CONFIG_TYPE"),
    "batch above patients": ("[training]\npatients_per_step = 121\n", "CONFIG_RANGE"),
    "size not listed": ("[images]\nsize = 65\n", "CONFIG_RANGE"),
    "classes twice": ('[images]\nclasses = ["a", "a"]\n', "CONFIG_RANGE"),
    "bits 17": ("[secure_sum]\nbits = 17\n", "CONFIG_RANGE"),
    "misspelt key": ("[privacy]\nepsilonn = 3.0\n", "CONFIG_UNKNOWN_KEY"),
    "misspelt section": ("[privcy]\nepsilon = 3.0\n", "CONFIG_UNKNOWN_KEY"),
    "duplicate key": ("[privacy]\nepsilon = 3.0\nepsilon = 4.0\n", "CONFIG_SYNTAX"),
    "weight negative": ('[[sites]]\nname = "x"\npatients = 99\nweight = -1\n', "CONFIG_RANGE"),
    "weight a float": ('[[sites]]\nname = "x"\npatients = 99\nweight = 1.5\n', "CONFIG_TYPE"),
    "site name with a slash": ('[[sites]]\nname = "a/b"\npatients = 99\n', "STUDY_ROSTER"),
    "site name with dots": ('[[sites]]\nname = "../x"\npatients = 99\n', "STUDY_ROSTER"),
    "site name with a newline": ('[[sites]]\nname = "a\\nb"\npatients = 99\n', "STUDY_ROSTER"),
    "same site twice": ('[[sites]]\nname = "north"\npatients = 99\n', "STUDY_ROSTER"),
    "site without patients": ('[[sites]]\nname = "x"\n', "CONFIG_MISSING_KEY"),
    "no BatchNorm": ('[gan]\nnorm = "batch"\n', "PRIVACY_MODEL"),
}


@pytest.mark.parametrize(("text", "code"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_refused_with_one_line(text, code):
    with pytest.raises(StudyError) as caught:
        study(text)
    assert caught.value.code == code
    assert "\n" not in caught.value.line()
    assert caught.value.line().startswith(f"error[{code}]: ")


def test_a_misspelt_key_is_told_its_neighbour():
    with pytest.raises(StudyError, match="did you mean 'epsilon'"):
        study("[privacy]\nepsilonn = 3.0\n")
    with pytest.raises(StudyError, match="did you mean 'patients'"):
        parse(HEAD + SITES.replace("patients", "patiens"))


def test_fewer_than_three_sites_are_refused():
    with pytest.raises(StudyError) as caught:
        parse(HEAD + '[[sites]]\nname = "a"\npatients = 99\n[[sites]]\nname = "b"\npatients = 99\n')
    assert caught.value.code == "STUDY_ROSTER"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "CONFIG_NOT_FOUND"),
        (b"", "CONFIG_EMPTY"),
        (b" \n\n", "CONFIG_EMPTY"),
        (b"name = ", "CONFIG_SYNTAX"),
        (b"\xff\xfe\x00", "CONFIG_ENCODING"),
        (b"x = 1\n" + b"#" * (1 << 20), "CONFIG_TOO_LARGE"),
        (b"a = " + b"[" * 10_000, "CONFIG_SYNTAX"),
    ],
    ids=["missing", "empty", "blank", "syntax", "encoding", "large", "nested"],
)
def test_bad_files(tmp_path: Path, content, code):
    path = tmp_path / "study.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError) as caught:
        load(path)
    assert caught.value.code == code


def test_a_byte_order_mark_and_crlf_are_accepted(tmp_path: Path):
    path = tmp_path / "study.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + SITES).replace("\n", "\r\n").encode())
    assert load(path).hash == study().hash


@given(st.text(max_size=200))
def test_any_text_is_a_study_or_a_typed_error(text):
    try:
        parse(text)
    except StudyError as error:
        assert "\n" not in error.line()


@given(st.dictionaries(st.sampled_from(["name", "sites", "privacy", "training", "x"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)))  # fmt: skip
def test_any_values_are_a_study_or_a_typed_error(values):
    try:
        from_dict(values)
    except StudyError as error:
        assert "\n" not in error.line()


def test_every_code_has_a_hint_and_errors_travel_between_processes():
    import pickle

    error = DataError("DATA_EMPTY", "nothing\nhere", "folder")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DataError)
    assert again.line() == error.line() == f"error[DATA_EMPTY]: nothing here; folder; {HINTS['DATA_EMPTY']}"
    assert all(hint and not hint.endswith(".") for hint in HINTS.values())
    assert issubclass(DataError, FedMedGanError)


def test_every_code_that_is_raised_has_a_hint_and_every_hint_is_raised_somewhere():
    root = Path(__file__).parents[1]
    rooms = ("server", "client", "shared", "deploy", "audit", "simulations", "cli")
    sources = [p for room in rooms for p in (root / room).rglob("*.py") if p.name != "errors.py"]
    families = "CONFIG|STUDY|DATA|DICOM|PRIVACY|BUDGET|LEDGER|AUDIT|HE|KEY|ROUND|MSG|MODEL|RUN|KIT|NET|SITE"
    used = set(re.findall(rf'"((?:{families})_[A-Z_]+)"', "\n".join(p.read_text() for p in sources)))
    assert used <= set(HINTS), f"no hint: {sorted(used - set(HINTS))}"
    assert set(HINTS) <= used, f"never raised: {sorted(set(HINTS) - used)}"
