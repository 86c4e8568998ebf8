"""The hospital's gate, with a real SuperLink, TLS, node authentication and a hostile coordinator.

Two SuperNodes get the same run. One was started with the gate, one without: the pushed code must run at the second
(or the attack is not one) and not at the first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp.client_app import LoadClientAppError
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND
from flwr.supernode.runtime import run_clientapp
from real_flower import Flower, make_kits, until

from fedmedgan.deploy import gate
from fedmedgan.deploy.environment import environment
from fedmedgan.shared import bundle
from fedmedgan.shared.errors import RunError
from fedmedgan.simulations.ports import free_port

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own

PYPROJECT = """
[project]
name = "fedmedgan"
version = "1.0.0"
[tool.flwr.app]
publisher = "fedmedgan"
[tool.flwr.app.components]
serverapp = "evil_server:app"
clientapp = "fedmedgan.client.app:app"
[tool.flwr.app.config]
coordinator-folder = ""
"""
SERVER = """
import json, time
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    asked = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes]
    answers = grid.send_and_receive(asked, timeout=120)
    said = [a.error.reason if a.has_error() else "answered" for a in answers]
    Path(context.run_config["coordinator-folder"], "said.json").write_text(json.dumps(said))
"""
CLIENT = """
from pathlib import Path
from flwr.clientapp import ClientApp
from flwr.app import Message, RecordDict
app = ClientApp()

@app.query()
def query(message, context):
    Path(context.node_config["home"], "PUSHED-CODE-RAN").touch()
    return Message(RecordDict(), reply_to=message)
"""


def hostile_app(folder: Path) -> Path:
    """A bundle that brings its own package `fedmedgan`, as a coordinator could push it."""
    shadow = folder / "fedmedgan" / "client"
    shadow.mkdir(parents=True)
    for package in (folder / "fedmedgan", shadow):
        (package / "__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "evil_server.py").write_text(SERVER)
    (shadow / "app.py").write_text(CLIENT)
    return folder


@pytest.fixture
def consortium(tmp_path) -> Iterator[Flower]:
    port = free_port()
    running = Flower(tmp_path, port, make_kits(tmp_path / "kits", port=port, superlink_port=port))
    yield running
    running.stop()


@pytest.mark.slow
def test_pushed_code_runs_without_the_gate_and_never_behind_it(consortium, tmp_path):
    consortium.start_superlink()
    gate.write_programs(tmp_path / "gate")
    guarded = consortium.start_supernode("guarded", tmp_path / "gate")
    open_to_all = consortium.start_supernode("open-to-all")
    app = hostile_app(tmp_path / "hostile")
    consortium.flwr("run", str(app), "test", "-c", f'coordinator-folder="{tmp_path}"')
    said = until(lambda: (tmp_path / "said.json").exists() and (tmp_path / "said.json").read_text(), 180, "answers")

    assert (open_to_all / "PUSHED-CODE-RAN").exists(), "the attack of this test is not one"
    assert not (guarded / "PUSHED-CODE-RAN").exists()
    assert sorted(json.loads(said)) == ["An exception was raised when attempting to load `ClientApp`", "answered"]
    assert not (guarded / "flwr" / "apps").exists(), "nothing was unpacked"
    assert (open_to_all / "flwr" / "apps").exists()
    event = json.loads((guarded / "events.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "bundle_refused"
    assert "RUN_BUNDLE" in event["error"]
    assert "error[RUN_BUNDLE]" in (tmp_path / "guarded.log").read_text()


def pulled(monkeypatch, fab: bytes, home: Path, command: str = gate.ALLOWED) -> Any:
    """What the gate makes of a task whose bundle is `fab`: Flower's loader as it is then."""
    context = SimpleNamespace(node_config={"home": str(home)})
    for name in gate.REPLACED:
        monkeypatch.setattr(run_clientapp, name, getattr(run_clientapp, name))
    task = (None, context, SimpleNamespace(run_id=7), SimpleNamespace(content=fab))
    monkeypatch.setattr(run_clientapp, "pull_task_input", lambda client: task)
    gate.close_gate(command)
    assert run_clientapp.pull_task_input(None) == task
    run_clientapp.install_from_fab(fab, skip_prompt=True)
    return run_clientapp.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)


@pytest.fixture
def honest(tmp_path) -> bytes:
    bundle.write(tmp_path / "fedmedgan")
    return build_fab_from_disk(tmp_path / "fedmedgan")


def test_the_accepted_bundle_is_answered_by_the_installed_app(monkeypatch, honest, tmp_path):
    from fedmedgan.client.app import app

    load = pulled(monkeypatch, honest, tmp_path)
    assert load("fedmedgan/fedmedgan", "1.0.0", "0" * 64) is app
    assert not (tmp_path / "events.jsonl").exists()


def test_another_kind_of_task_is_refused_whatever_it_carries(monkeypatch, honest, tmp_path, capfd):
    """The coordinator says that its app is an agent, and Flower starts another program, which unpacks the bundle."""
    load = pulled(monkeypatch, honest, tmp_path, "flwr-agentapp")
    with pytest.raises(LoadClientAppError):
        load("fedmedgan/fedmedgan", "1.0.0", "0" * 64)
    assert "flwr-agentapp" in (tmp_path / "events.jsonl").read_text()
    assert "error[RUN_BUNDLE]" in capfd.readouterr().err


def test_every_kind_of_task_leads_to_the_gate(tmp_path):
    gate.write_programs(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(TASK_TYPE_TO_COMMAND.values())
    for program in tmp_path.iterdir():
        assert os.access(program, os.X_OK)
        assert shutil.which(program.name, path=environment(tmp_path, tmp_path)["PATH"]) == str(program)


@pytest.mark.parametrize("name", gate.REPLACED)
def test_it_fails_closed_where_flower_has_no_such_name(monkeypatch, tmp_path, name):
    monkeypatch.delattr(run_clientapp, name)
    with pytest.raises(RunError) as caught:
        gate.write_programs(tmp_path / "gate")
    assert caught.value.code == "RUN_FLOWER"
    assert not (tmp_path / "gate").exists()


def test_it_fails_closed_for_another_flower(monkeypatch):
    monkeypatch.setattr(gate.flwr, "__version__", "1.42.0")
    with pytest.raises(RunError, match=r"1\.42\.0"):
        gate.check_flower()
