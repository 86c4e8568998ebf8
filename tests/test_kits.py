"""Start-up kits: what is in them, what stays untouched, what is noticed, and the real tools that read them."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from real_flower import Flower, make_kits, until

from fedmedgan.deploy import certificates, kit_config, kits
from fedmedgan.deploy.environment import OFF_SWITCHES
from fedmedgan.deploy.kit_config import Consortium
from fedmedgan.deploy.site_config import SiteConfig
from fedmedgan.shared.errors import RunError
from fedmedgan.simulations.ports import free_port

ROOT = Path(__file__).parents[1]
NAMES = ("north", "south", "west")


def consortium(*names: str, host: str = "fedmedgan.example.org", port: int = 443) -> Consortium:
    hospitals = tuple({"name": name} for name in names or NAMES)
    return Consortium.model_validate(
        {"name": "chest", "coordinator": {"host": host, "port": port}, "hospitals": hospitals}
    )


@pytest.fixture
def made(tmp_path) -> Path:
    kits.make(consortium(), tmp_path / "kits")
    return tmp_path / "kits"


def contents(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Bytes, mode and modification time of every file."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mode, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


# ---- what is in them


def test_a_hospitals_kit_holds_what_it_needs_and_no_other_secret(made):
    for name in NAMES:
        kit = made / name
        assert SiteConfig.load(kit).address == "fedmedgan.example.org:443"
        assert SiteConfig.load(kit).site == name
        private = load_ssh_private_key((kit / "supernode.key").read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name == "secp384r1"
        assert load_ssh_public_key((kit / "supernode.pub").read_bytes()) == private.public_key()
        assert (kit / "supernode.pub").read_bytes() == (made / "coordinator/supernodes" / f"{name}.pub").read_bytes()
        assert [p.name for p in kit.iterdir() if b"PRIVATE KEY" in p.read_bytes()] == ["supernode.key"]
    assert len({(made / name / "supernode.key").read_bytes() for name in NAMES}) == 3


def test_private_keys_are_their_owners_alone(made):
    secrets = [made / "ca/ca.key", made / "coordinator/server.key", *(made / n / "supernode.key" for n in NAMES)]
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for folder in (made, *made.iterdir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


@pytest.mark.parametrize("host", ["fedmedgan.example.org", "192.0.2.7", "2001:db8::7"])
def test_the_server_certificate_is_good_for_the_host_and_for_loopback(tmp_path, host):
    kits.make(consortium(host=host), tmp_path / "kits")
    kit = tmp_path / "kits" / "coordinator"
    for name in (host, "localhost", "127.0.0.1"):
        kind = "-verify_ip" if re.fullmatch(r"[0-9.]+|.*::.*", name) else "-verify_hostname"
        command = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", kind, name, "-CAfile", "ca.crt"]
        done = subprocess.run([*command, "server.crt"], cwd=kit, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert x509.load_pem_x509_certificate((kit / "server.crt").read_bytes()).issuer.rfc4514_string().endswith("chest")


def test_no_blank_is_left_in_any_file(made):
    for path in made.rglob("*"):
        if path.is_file() and b"PRIVATE KEY" not in path.read_bytes() and path.suffix != ".sig":
            assert not re.search(r"@[A-Z_]+@", path.read_text()), path


def test_every_off_switch_is_in_every_unit_and_container(made):
    for kit, unit in ((made / "north", "fedmedgan-site.service"), (made / "coordinator", "fedmedgan-server.service")):
        for name, value in OFF_SWITCHES.items():
            assert f"Environment={name}={value}\n" in (kit / unit).read_text()
            assert f"{name}={value}\n" in (kit / "fedmedgan.env").read_text()
        service = next(iter(yaml.safe_load((kit / "compose.yaml").read_text())["services"].values()))
        assert service["env_file"] == ["fedmedgan.env"]


def test_units_wait_for_flower_to_let_go_of_a_key(made):
    unit = (made / "north/fedmedgan-site.service").read_text()
    assert {"Restart=always", "RestartSec=20", "StartLimitIntervalSec=0"} <= set(unit.splitlines())


def test_the_kits_constraints_are_the_repositorys(made):
    assert (made / "north/constraints.txt").read_bytes() == (ROOT / "constraints.txt").read_bytes()


def test_a_wheel_goes_into_the_kits_and_is_what_they_install(tmp_path):
    wheel = tmp_path / "fedmedgan-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    kits.make(consortium(), tmp_path / "kits", wheel)
    kits.make(consortium(*NAMES, "east"), tmp_path / "kits")
    for name in ("north", "east", "coordinator"):
        kit = tmp_path / "kits" / name
        assert (kit / wheel.name).read_bytes() == b"a wheel"
        assert f"COPY constraints.txt {wheel.name} ./" in (kit / "Dockerfile").read_text()
        assert f"!{wheel.name}" in (kit / ".dockerignore").read_text()
        assert kits.verify(kit) == []
    assert f"'./{wheel.name}[hospital]'" in (tmp_path / "kits/north/README.md").read_text()
    assert f"'./{wheel.name}[server]'" in (tmp_path / "kits/coordinator/README.md").read_text()


# ---- making again


def test_without_its_ca_no_kit_is_made(made):
    """A new CA would give the coordinator a certificate that no hospital with an older kit trusts."""
    (made / "ca").rename(made.parent / "elsewhere")
    with pytest.raises(RunError) as caught:
        kits.make(consortium(), made)
    assert caught.value.code == "KIT_PATH"
    (made.parent / "elsewhere").rename(made / "ca")
    assert kits.make(consortium(), made).new == ()


def test_one_hospital_more_touches_nobody_elses_kit(made):
    before = {name: contents(made / name) for name in (*NAMES, "ca")}
    done = kits.make(consortium(*NAMES, "east"), made)
    assert (done.new, done.kept) == (("east",), NAMES)
    assert {name: contents(made / name) for name in before} == before
    assert {p.stem for p in (made / "coordinator/supernodes").iterdir()} == {*NAMES, "east"}
    assert kit_config.load(made / "coordinator/coordinator.toml") == consortium(*NAMES, "east")
    for name in (*NAMES, "east", "coordinator"):
        assert kits.verify(made / name) == []


def test_a_kit_that_was_sent_and_deleted_is_not_made_again(made):
    shutil.rmtree(made / "south")
    public = (made / "coordinator/supernodes/south.pub").read_bytes()
    assert kits.make(consortium(*NAMES, "east"), made).new == ("east",)
    assert not (made / "south").exists()
    assert (made / "coordinator/supernodes/south.pub").read_bytes() == public


def test_killed_before_the_coordinators_kit_the_next_run_goes_on(made):
    public = (made / "north/supernode.pub").read_bytes()
    shutil.rmtree(made / "coordinator")
    (made / ".west.part").mkdir()
    shutil.rmtree(made / "west")
    assert kits.make(consortium(), made).new == ("west",)
    assert (made / "coordinator/supernodes/north.pub").read_bytes() == public


def test_the_servers_certificate_is_kept_until_it_ends_soon(made, monkeypatch):
    server = (made / "coordinator/server.crt").read_bytes()
    kits.make(consortium(), made)
    assert (made / "coordinator/server.crt").read_bytes() == server
    monkeypatch.setattr(certificates, "RENEW_DAYS", certificates.SERVER_DAYS)
    kits.make(consortium(), made)
    assert (made / "coordinator/server.crt").read_bytes() != server
    assert kits.verify(made / "coordinator") == []


@pytest.mark.parametrize("other", [{"host": "elsewhere.example.org"}, {"port": 8443}])
def test_another_address_is_refused_where_kits_were_made(made, other):
    before = contents(made)
    with pytest.raises(RunError) as caught:
        kits.make(consortium(**other), made)
    assert caught.value.code == "KIT_CONFIG"
    assert contents(made) == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RunError) as caught:
        kits.make(consortium(), tmp_path)
    assert caught.value.code == "KIT_PATH"


# ---- verifying


def how(kit: Path) -> dict[str, str]:
    return {difference.name: difference.how for difference in kits.verify(kit)}


def test_verify_names_every_file_that_is_not_as_it_was_made(made):
    kit = made / "north"
    (kit / "site.toml").write_text((kit / "site.toml").read_text().replace("443", "444"))
    (kit / "compose.yaml").unlink()
    (kit / "sitecustomize.py").touch()
    (kit / "Dockerfile").rename(kit / "d")
    (kit / "Dockerfile").symlink_to("d")
    (kit / "supernode.key").chmod(0o640)
    expected = {"site.toml": "changed", "compose.yaml": "missing", "sitecustomize.py": "extra", "d": "extra"}
    assert how(kit) == expected | {"Dockerfile": "unsafe", "supernode.key": "unsafe"}
    with pytest.raises(RunError) as caught:
        kits.require_unchanged(kit)
    assert caught.value.code == "KIT_CHANGED"
    assert all(name in caught.value.what for name in expected)


def test_verify_notices_new_sums_that_the_ca_did_not_sign(made):
    kit = made / "north"
    (kit / "site.toml").write_text((kit / "site.toml").read_text().replace("443", "444"))
    names = [line.split("  ")[1] for line in (kit / "SHA256SUMS").read_text().splitlines()]
    (kit / "SHA256SUMS").write_text(
        "".join(f"{hashlib.sha256((kit / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    )
    assert how(kit) == {"SHA256SUMS": "not signed"}


def test_verify_refuses_what_is_no_kit(tmp_path):
    with pytest.raises(RunError) as caught:
        kits.verify(tmp_path)
    assert caught.value.code == "KIT_PATH"


def test_the_commands_of_the_readme_check_a_kit(made):
    readme = (made / "north/README.md").read_text()
    block = re.search(r"## 1\. Check the kit\n\n```bash\n(.*?)```", readme, re.DOTALL)
    command = ["bash", "-ec", block.group(1)]
    done = subprocess.run(command, cwd=made / "north", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ca = certificates.load_certificate(made / "ca/ca.crt")
    assert certificates.fingerprint(ca) in done.stdout
    assert kits.verify(made / "north") == []
    (made / "north/site.toml").write_text("")
    assert subprocess.run(command, cwd=made / "north", capture_output=True).returncode != 0


def test_a_copied_kit_keeps_its_secrets_modes_and_replaces_an_older_one(made, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    kits.copy(made / "coordinator", home / "kit")
    kits.make(consortium(*NAMES, "east"), made)
    kits.copy(made / "coordinator", home / "kit")
    assert (home / "kit/supernodes/east.pub").exists()
    assert stat.S_IMODE((home / "kit/server.key").stat().st_mode) == 0o600
    assert [p.name for p in home.iterdir()] == ["kit"]
    (made / "coordinator/nginx.conf").write_text("")
    with pytest.raises(RunError):
        kits.copy(made / "coordinator", home / "kit")
    assert kits.verify(home / "kit") == []


# ---- consortium.toml

GOOD = 'name = "chest"\n[coordinator]\nhost = "h.example.org"\n' + "".join(
    f'[[hospitals]]\nname = "{name}"\n' for name in NAMES
)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('host = "h', 'hots = "h', "unknown key 'hots', did you mean 'host'?"),
        ("[coordinator]", "[cordinator]", "unknown key 'cordinator', did you mean 'coordinator'?"),
        ('host = "h.example.org"\n', "", "the key 'host' is missing"),
        ('host = "h.example.org"', 'host = "h example"', "coordinator.host"),
        ('host = "h.example.org"', 'host = "h.example.org; }"', "coordinator.host"),
        ('host = "h.example.org"', 'host = "h"\nport = 0', "coordinator.port"),
        ('host = "h.example.org"', 'host = "h"\nport = "443"', "coordinator.port"),
        ('name = "west"', 'name = "south"', "two hospitals are called 'south'"),
        ('name = "west"', 'name = "coordinator"', "no hospital may be called 'coordinator'"),
        ('name = "west"', 'name = "../west"', "hospitals.2.name"),
        ('[[hospitals]]\nname = "west"\n', "", "hospitals"),
        ("name = ", "name =", None),
        ('name = "chest"', 'name = "chest', "not valid TOML"),
    ],
)
def test_a_wrong_consortium_is_one_clear_line(tmp_path, old, new, said):
    path = tmp_path / "consortium.toml"
    path.write_text(GOOD.replace(old, new, 1))
    if said is None:
        assert kit_config.load(path).names == list(NAMES)
        return
    with pytest.raises(RunError) as caught:
        kit_config.load(path)
    assert caught.value.code == "KIT_CONFIG"
    assert said in caught.value.line()


def test_a_missing_consortium_is_named(tmp_path):
    with pytest.raises(RunError) as caught:
        kit_config.load(tmp_path / "no.toml")
    assert caught.value.code == "KIT_PATH"


# ---- the real tools


@pytest.mark.parametrize(("kit", "unit"), [("north", "fedmedgan-site"), ("coordinator", "fedmedgan-server")])
def test_systemd_takes_the_unit(made, tmp_path, kit, unit):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not on this machine")
    text = (made / kit / f"{unit}.service").read_text()
    (tmp_path / f"{unit}.service").write_text(text.replace("/opt/fedmedgan/bin", str(Path(sys.executable).parent)))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / f"{unit}.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if unit in line]
    assert complaints == [] and done.returncode == 0, done.stderr


class Door:
    """nginx as the coordinator's kit configures it, and a SuperLink behind it."""

    def __init__(self, folder: Path) -> None:
        self.port, superlink_port = free_port(), free_port()
        self.kit = make_kits(folder / "kits", port=self.port, superlink_port=superlink_port)
        self.flower = Flower(folder, superlink_port, self.kit)
        text = (self.kit / "nginx.conf").read_text()
        for old, new in (
            ("/var/lib/fedmedgan-coordinator/kit", str(self.kit)),
            ("/run/nginx.pid", str(folder / "nginx.pid")),
            ("/var/log/nginx", str(folder)),
        ):
            assert old in text
            text = text.replace(old, new)
        self.conf = folder / "nginx.conf"
        self.conf.write_text(text)
        self.context = ssl.create_default_context(cafile=str(self.kit / "ca.crt"))

    def ask(self, method: str, path: str) -> tuple[int, bytes]:
        """Status and body; the path goes out as it stands here."""
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=20, context=self.context)
        try:
            connection.request(method, path, b"", {"Content-Type": PROTOBUF_MEDIA_TYPE})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def start(self) -> None:
        nginx = shutil.which("nginx") or "nginx"
        done = subprocess.run([nginx, "-t", "-c", str(self.conf)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.flower.start_superlink()
        self.flower.start("nginx", [nginx, "-c", str(self.conf), "-g", "daemon off;"], dict(os.environ))

        def answers() -> bool:
            try:
                return self.ask("GET", "/")[0] == 403
            except OSError:
                return False

        until(answers, 20, "nginx is up")


@pytest.fixture
def door(tmp_path) -> Iterator[Door]:
    if shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None:
        pytest.skip("nginx is not on this machine")
    opened = Door(tmp_path)
    yield opened
    opened.flower.stop()


@pytest.mark.slow
def test_hospitals_reach_the_fleet_through_nginx_and_nothing_else(door):
    door.start()
    for path in (
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/health",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "/v1/control/../fleet/pull-messages",
        "//v1/control/list-runs",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages?a=b",
    ):
        assert door.ask("POST", path)[0] == 403, path
    assert door.ask("GET", "/v1/fleet/pull-messages")[0] == 403
    status, body = door.ask("POST", "/v1/fleet/pull-messages")
    assert status == 401, "the SuperLink itself says that this is nobody it knows"
    assert b"nginx" not in body

    # A SuperNode that comes through the door is online.
    door.flower.start_supernode("north", port=door.port)

    def online() -> bool:
        return "online" in json.dumps(json.loads(door.flower.flwr("supernode", "ls", "test", "--format", "json")))

    until(online, 60, "the SuperNode is online through nginx")
