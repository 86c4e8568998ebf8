"""No value of a DICOM header is found anywhere after a study: the benchmark's search at a small size, and that it sees.

The full measurement, with every tag of the dictionary and Flower's own engine, is ``benchmarks/faults/phi.py``.
"""

from __future__ import annotations

import base64
import re
import sys
import warnings
from pathlib import Path

import pydicom
import pytest
from test_patients import InProcess

from fedmedgan.client.data import dicom, patients, worker

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from faults import phi

SOME_TAGS = phi.dictionary_tags()[::12]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(site -> folder of planted files, number of markers in one file)."""
    return phi.write_data(tmp_path_factory.mktemp("data") / f"{phi.NAMED}-archive", SOME_TAGS)


def measured(planted: int, traces: list[phi.Trace]) -> dict[str, float]:
    return {figure.name: figure.measured for figure in phi.figures(planted, 1, traces)}


def test_the_markers_are_really_there(data):
    folders, planted = data
    assert len(phi.dictionary_tags()) > 2500
    for path in phi.files_of(*folders.values()):
        raw = path.read_bytes()
        named = set(re.findall(rb"ZZPHI[0-9A-F]{8}", raw))
        assert len(named) >= 100
        assert planted >= len(named)
        for needle in phi.NEEDLES:
            assert needle.encode() in raw, needle
        dataset = pydicom.dcmread(path)
        assert {element.VR for element in dataset} >= {"PN", "LO", "SH", "LT", "ST", "UT", "UI", "DA", "TM", "DS", "SQ"}


def test_nothing_of_a_header_is_written_sent_or_printed_in_a_whole_study(data, tmp_path):
    folders, planted = data
    traces = phi.in_process(tmp_path / "run", folders)
    kinds = {re.sub(r"\d+", "", trace.place) for trace in traces}
    assert {"report.html", "journal.db", "events.jsonl", "message from node , train"} <= kinds
    found = measured(planted, traces)
    assert found["R16_found"] == 0
    assert found["R16_names_at_home"] > 0, "the hospital's own cache lists its files: the search sees them"


def test_nothing_of_a_header_is_shown_of_broken_files(data, tmp_path):
    folders, planted = data
    phi.write_broken(tmp_path / "broken", next(phi.files_of(folders["site-0"])), SOME_TAGS)
    traces = phi.dataset_checks({"site-0": tmp_path / "broken"}, ("human",))
    shown = b"".join(trace.data for trace in traces)
    for code in (b"DICOM_TRUNCATED", b"DICOM_RESCALE", b"DATA_UNSAFE_PATH", b"DICOM_MODALITY", b"DICOM_BURNED_IN"):
        assert code in shown
    assert measured(planted, traces)["R16_found"] == 0


def test_a_value_that_leaks_is_found(data, tmp_path, monkeypatch):
    """A decoder that puts the Patient ID into its reason: the hospital's cache would keep it."""
    folders, planted = data
    examine = worker.examine

    def leaking(path: str, task: worker.Task) -> worker.Answer:
        answer = examine(path, task)
        answer.reason = str(pydicom.dcmread(path).PatientID)
        return answer

    monkeypatch.setattr(patients, "WorkerPool", InProcess)
    monkeypatch.setattr(worker, "examine", leaking)
    with warnings.catch_warnings():
        dicom.silence_pydicom()
        traces = phi.in_process(tmp_path / "run", folders)
    assert measured(planted, traces)["R16_found"] > 0


@pytest.mark.parametrize(
    "kept",
    [
        b"..ZZPHI00100010..",
        b"..zzphi00100010..",
        "..ZZPHI..".encode("utf-16"),
        b"ZZPHI".hex().encode(),
        base64.b64encode(b"ZZPHI^DOE"),
        base64.b64encode(b"xZZPHI^DOE"),
        base64.b64encode(b"xyZZPHI^DOE"),
        b"born 18870417",
    ],
)
def test_the_search_sees_every_form(kept):
    assert phi.search(phi.Trace("somewhere", kept), phi.NEEDLES)


def test_names_of_files_may_be_in_the_hospitals_own_home_and_nowhere_else():
    name = f"{phi.NAMED}^3.dcm".encode()
    home, outside = phi.Trace("cache", name, at_home=True), phi.Trace("journal.db", name)
    assert (measured(1, [home])["R16_found"], measured(1, [home])["R16_names_at_home"]) == (0, 1)
    assert measured(1, [outside])["R16_found"] == 1
