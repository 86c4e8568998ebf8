"""What `fedmedgan consortium` does around the parties it starts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmedgan.shared.errors import RunError
from fedmedgan.simulations import ports
from fedmedgan.simulations.deployed import Deployed

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


@pytest.mark.skipif(not RANGE.exists(), reason="only Linux says which ports connections are given")
def test_a_port_that_is_meant_for_a_server_is_never_given_to_a_connection():
    first = int(RANGE.read_text().split()[0])
    found = ports.free_ports(200)
    assert len(set(found)) == 200
    assert max(found) < first


def test_a_hospital_whose_process_ends_is_named_at_once(tmp_path):
    """Not after the whole time of the study."""
    deployed = Deployed(tmp_path / "run")
    deployed.server = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "run/logs/west.log").write_text("error[KIT_CONFIG]: the kit is for east; west\n")
        deployed.sites["west"] = subprocess.Popen(["true"])
        began = time.monotonic()
        with pytest.raises(RunError, match=r"west's process ended: error\[KIT_CONFIG\]"):
            deployed.wait(50)
        assert time.monotonic() - began < 10
    finally:
        deployed.stop()
