"""The benchmark of the private step, at a size that takes seconds: every network that it names has its four figures."""

from __future__ import annotations

import pytest
import torch
from conftest import load_benchmark


@pytest.fixture
def benchmark():
    threads = torch.get_num_threads()
    yield load_benchmark("private_step")
    torch.set_num_threads(threads)


def test_every_network_is_measured_by_its_own_name(benchmark, monkeypatch):
    kept = {}
    monkeypatch.setattr(benchmark, "CASES", [(28, 4, network) for network in benchmark.NETWORKS])
    monkeypatch.setattr(benchmark, "TURNS", 1)
    monkeypatch.setattr(benchmark, "SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "write", lambda name, **what: kept.update(what))
    benchmark.main()
    assert len(kept["figures"]) == 4 * len(benchmark.NETWORKS)
    assert all(value > 0 for value in kept["figures"].values())
    assert len({(row["weights"], row["norm"]) for row in kept["rows"]}) == len(benchmark.NETWORKS)
