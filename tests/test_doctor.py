"""`site doctor` against a real SuperLink with TLS, node authentication and health service, and a real home."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from conftest import tiny_study
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from ledgers import ledger_of, terms
from typer.testing import CliRunner

from fedmedgan.cli import doctor as command
from fedmedgan.cli import output
from fedmedgan.client import checkpoint, joining
from fedmedgan.deploy import certificates, doctor, hospital_checks, kit_config, kits, network_checks
from fedmedgan.deploy.check import Check, Place, check
from fedmedgan.deploy.kit_config import Consortium, Member
from fedmedgan.deploy.site_config import SiteConfig
from fedmedgan.shared.agreement import Identity, assemble, sign
from fedmedgan.shared.errors import HINTS, RunError
from fedmedgan.shared.privacy.events import TrainingSteps
from fedmedgan.shared.privacy.history import read
from fedmedgan.shared.secure_sum import keys
from fedmedgan.simulations.phantoms import vendor_for, write_hospital
from fedmedgan.simulations.ports import free_port

BIN = Path(sys.executable).parent
SITE = "site-0"
MODEL = {"generator.w": np.zeros(3, np.float32)}


# ---- a coordinator


@dataclass(frozen=True)
class Authority:
    """A certificate authority of its own, and what it issues."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, called: str = "authority") -> Authority:
        folder.mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, called)])
        now = datetime.now(UTC)
        root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        (folder / "ca.crt").write_bytes(root.public_bytes(Encoding.PEM))
        write_key(folder / "ca.key", key)
        return cls(folder)

    def issue(self, name: str, *, start: int = -1, end: int = 365) -> tuple[Path, Path]:
        """Certificate and key for localhost and 127.0.0.1, valid from day `start` to day `end`."""
        authority = load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        root = x509.load_pem_x509_certificate((self.folder / "ca.crt").read_bytes())
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=start))
            .not_valid_after(now + timedelta(days=end))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(authority, hashes.SHA256())
        )
        (self.folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        write_key(self.folder / f"{name}.key", key)
        return self.folder / f"{name}.crt", self.folder / f"{name}.key"


def write_key(path: Path, key: ec.EllipticCurvePrivateKey, format: PrivateFormat = PrivateFormat.PKCS8) -> None:
    path.write_bytes(key.private_bytes(Encoding.PEM, format, NoEncryption()))
    path.chmod(0o600)


def make_kits(out: Path, host: str, port: int) -> Path:
    """Kits of a consortium whose coordinator is there."""
    hospitals = tuple(Member(name=f"site-{i}") for i in range(3))
    where = kit_config.Coordinator(host=host, port=port, superlink_port=port)
    kits.make(Consortium(name="tiny", coordinator=where, hospitals=hospitals), out)
    return out


@dataclass(frozen=True)
class Coordinator:
    kits: Path
    port: int
    health_port: int

    @property
    def node_key(self) -> ec.EllipticCurvePrivateKey:
        """The SuperNode's key in the kit of site-0; registered."""
        key = load_ssh_private_key((self.kits / SITE / "supernode.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def fleet(self) -> FleetHttpClient:
        """What the SuperNode of site-0 uses."""
        trust = (self.kits / SITE / "ca.crt").read_bytes()
        signing = NodeAuthHttpInterceptor(self.node_key, self.node_key.public_key())
        return FleetHttpClient.from_server_address(f"localhost:{self.port}", False, trust, [signing])


@pytest.fixture(scope="session")
def coordinator(tmp_path_factory) -> Iterator[Coordinator]:
    """A SuperLink as the coordinator's kit starts it, with gRPC health service."""
    folder = tmp_path_factory.mktemp("superlink")
    port, health_port = free_port(), free_port()
    made = Coordinator(make_kits(folder / "kits", "localhost", port), port, health_port)
    arguments = {
        "--host": "127.0.0.1",
        "--port": port,
        "--ssl-ca-certfile": made.kits / "coordinator" / "ca.crt",
        "--ssl-certfile": made.kits / "coordinator" / "server.crt",
        "--ssl-keyfile": made.kits / "coordinator" / "server.key",
        "--database": folder / "state.db",
        "--health-server-address": f"127.0.0.1:{health_port}",
    }
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    with (folder / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "flower-superlink", *flags, *(str(part) for pair in arguments.items() for part in pair)],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "FLWR_HOME": str(folder), "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_for(port, process, folder / "superlink.log")
        request = RegisterNodeRequest(public_key=public_key_to_bytes(made.node_key.public_key()))
        trust = ssl.create_default_context(cafile=made.kits / SITE / "ca.crt")
        connection = http.client.HTTPSConnection("localhost", port, context=trust)
        headers = {"Content-Type": network_checks.PROTOBUF_MEDIA_TYPE}
        connection.request("POST", "/v1/control/register-node", request.SerializeToString(), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        connection.close()
        yield made
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the SuperLink did not start:\n{log.read_text()}")


@contextmanager
def https_server(certificate: tuple[Path, Path], *, host: str = "127.0.0.1", date: float = 0.0, status: int = 200):
    """A server whose Date header lies `date` seconds from now, and whose every answer has one status."""

    class Answer(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) + timedelta(seconds=date), usegmt=True)

        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer((host, 0), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that does not trust us hangs up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# ---- a hospital


@pytest.fixture(scope="session")
def joined(tmp_path_factory) -> Path:
    """The home of a hospital that has joined a study which all have signed; its data lies beside it."""
    folder = tmp_path_factory.mktemp("hospital")
    write_hospital(folder / "data", patients=24, seed=5, vendor=vendor_for(0), size=32)
    home, study = folder / "home", tiny_study(3)
    book, data = Path("..", "budget-book"), str(folder / "data")
    identities = [joining.init_home(home, site=SITE, data=data, max_epsilon=25, budget_book=book, device="cpu")]
    others = {site.name: keys.generate_identity() for site in study.sites[1:]}
    identities += [joining.identity(name, own) for name, own in others.items()]
    relay = Ed25519PrivateKey.generate()
    public = relay.public_key().public_bytes_raw().hex()
    identities.append(Identity(role="coordinator", name="relay", signing_key=public).signed(relay))
    study = assemble(study, identities)
    agreement = joining.join(home, study)
    for name, own in others.items():
        agreement = agreement.with_signature(name, sign(study, own.signing))
    joining.keep(home, agreement)
    return home


@pytest.fixture(scope="session")
def closed(tmp_path_factory) -> Path:
    """Kits that name a port where nobody listens."""
    return make_kits(tmp_path_factory.mktemp("closed") / "kits", "127.0.0.1", free_port())


@pytest.fixture
def place(joined, closed, tmp_path) -> Place:
    """A copy of that home, with a kit whose coordinator is not there."""
    shutil.copytree(joined, tmp_path / "home")
    shutil.copytree(joined.parent / "budget-book", tmp_path / "budget-book")
    kits.copy(closed / SITE, tmp_path / "home" / "kit")
    return Place(tmp_path / "home", tmp_path / "home" / "kit")


@pytest.fixture
def connected(place, coordinator) -> Place:
    """With the kit of the coordinator that is."""
    kits.copy(coordinator.kits / SITE, place.kit)
    return place


@pytest.fixture
def authority(place, tmp_path) -> Authority:
    """An authority that can issue anything, and that this hospital trusts."""
    made = Authority.make(tmp_path / "authority")
    shutil.copy(made.folder / "ca.crt", place.kit)
    return made


def point(place: Place, host: str, port: int, **more: str | int) -> Place:
    """The same hospital, with a site.toml that names that coordinator."""
    values = {"site": SITE, "host": host, "port": port} | more
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    (place.kit / "site.toml").write_text(text)
    return place


def failed(check: Check, code: str, hint: str = "") -> str:
    """What the check says, once it is sure that it failed with this code and tells what to do."""
    assert (check.ok, check.code) == ("failed", code), check
    assert (hint in check.hint) if hint else (check.hint == HINTS[code]), check
    return check.what


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


# ---- everything


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_hospital_that_is_well(connected):
    before = everything_in(connected.home)
    checks = {check.name: check for check in doctor.examine(connected.home)}
    assert {name: check.ok for name, check in checks.items()} == {
        "policy": "ok",
        "kit": "ok",
        "DNS": "ok",
        "port": "ok",
        "TLS certificate": "ok",
        "health": "ok",
        "clock": "ok",
        "SuperNode key": "ok",
        "disk": "ok",
        "GPU": "skipped",
        "data": "ok",
        "keys": "ok",
        "study": "ok",
        "model": "ok",
        "ledger": "ok",
        "budget": "ok",
    }, checks
    assert checks["health"].what == "GET /health: 200"
    assert checks["TLS certificate"].what == f"trusted, for {certificates.SERVER_DAYS - 1} days"
    assert not any(check.hint for check in checks.values())
    assert "8 of 8 looked at can be used" in checks["data"].what
    assert "round 1 fits" in checks["budget"].what
    assert everything_in(connected.home) == before


def test_one_fault_is_told_once(place):
    checks = doctor.examine(place.home)
    assert [check.name for check in checks if check.ok == "failed"] == ["port"]
    waiting = {check.name for check in checks if check.what == "waits for: port"}
    assert waiting == {"TLS certificate", "health", "clock", "SuperNode key"}


def test_an_empty_folder_gets_advice_and_no_traceback(tmp_path):
    checks = doctor.examine(tmp_path)
    assert {check.code for check in checks if check.ok == "failed"} == {"CONFIG_NOT_FOUND", "KIT_PATH", "KEY_MISSING"}
    assert all(check.hint for check in checks if check.ok == "failed")


def test_a_check_that_falls_over_fails_and_keeps_the_text_to_itself(place):
    @check("broken")
    def broken(place: Place) -> str:
        raise ZeroDivisionError("the patient's name")

    assert "name" not in failed(broken(place), "RUN_CRASHED", "bug")


# ---- the network


def test_a_key_that_the_coordinator_does_not_know(connected):
    write_key(connected.kit / "supernode.key", ec.generate_private_key(ec.SECP384R1()), PrivateFormat.OpenSSH)
    failed(network_checks.registered(connected), "NET_KEY", "flwr supernode register")


def test_asking_for_the_key_does_not_disturb_the_supernode(connected, coordinator):
    """Not before it starts, not while it runs."""
    public = public_key_to_bytes(coordinator.node_key.public_key())
    assert network_checks.registered(connected).ok == "ok"
    with coordinator.fleet() as supernode:
        # Flower refuses this where a node of that key is online already: so the doctor did not make it so.
        node_id = supernode.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id
        assert network_checks.registered(connected).ok == "ok"
        beat = SendNodeHeartbeatRequest(node=Node(node_id=node_id), heartbeat_interval=30)
        assert supernode.SendNodeHeartbeat(beat).success
        with pytest.raises(Exception, match="412"):
            supernode.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
        supernode.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


@pytest.mark.parametrize(("seconds", "known"), [(-100, True), (4, True), (8, False), (-400, False)])
def test_the_superlink_takes_signatures_from_the_past_only(seconds, known, connected, monkeypatch):
    """What the limits of the clock's check rest on."""

    class Moved(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=seconds)

    monkeypatch.setattr(network_checks, "datetime", Moved)
    found = network_checks.registered(connected)
    if known:
        assert found.ok == "ok"
    else:
        failed(found, "NET_KEY", "timedatectl")


@pytest.mark.parametrize("name", ["fedmedgan consortium tiny", "another"])
def test_the_wrong_authority(name, connected, tmp_path):
    """Also where it calls itself by the right name."""
    shutil.copy(Authority.make(tmp_path / "other", name).folder / "ca.crt", connected.kit)
    for look in (network_checks.certificate, network_checks.clock, network_checks.registered):
        failed(look(connected), "NET_TLS")


def test_a_ca_file_that_is_none(connected):
    (connected.kit / "ca.crt").write_text("hello")
    failed(network_checks.certificate(connected), "NET_TLS", "kit")
    (connected.kit / "ca.crt").unlink()
    failed(network_checks.certificate(connected), "KIT_PATH", "kit")


@pytest.mark.parametrize(
    ("days", "host", "hint"),
    [
        ((-10, -1), "127.0.0.1", "has to renew its certificate"),
        ((1, 10), "127.0.0.1", "timedatectl"),
        ((-1, 10), "127.0.0.2", "`host` of site.toml"),
    ],
    ids=["expired", "not yet", "another address"],
)
def test_a_certificate_that_is_not_valid(days, host, hint, place, authority):
    issued = authority.issue("server", start=days[0], end=days[1])
    with https_server(issued, host=host) as port:
        failed(network_checks.certificate(point(place, host, port)), "NET_TLS", hint)


def test_a_certificate_of_another_name(place, authority, monkeypatch):
    """No second name leads to this machine everywhere, so the name is looked up here."""
    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: known("127.0.0.1", *rest, **more))
    with https_server(authority.issue("server")) as port:
        failed(network_checks.certificate(point(place, "other.example", port)), "NET_TLS", "`host` of site.toml")


def test_a_certificate_that_ends_soon_is_a_warning(place, authority):
    with https_server(authority.issue("server", end=20)) as port:
        found = network_checks.certificate(point(place, "127.0.0.1", port))
    assert (found.ok, found.what) == ("ok", "trusted, for 19 days")
    assert "renew" in found.hint


def test_a_port_that_speaks_no_tls(place, coordinator):
    failed(network_checks.certificate(point(place, "127.0.0.1", coordinator.health_port)), "NET_TLS")


def test_a_closed_port_and_a_host_that_nobody_knows(place):
    assert "connection refused" in failed(network_checks.port(place), "NET_PORT")
    unknown = point(place, "coordinator.invalid", 443)
    assert "coordinator.invalid" in failed(network_checks.dns(unknown), "NET_DNS")
    for look in (network_checks.port, network_checks.clock, network_checks.health, network_checks.registered):
        failed(look(unknown), "NET_DNS")


def test_health_by_grpc_and_by_https(connected, coordinator):
    assert network_checks.health(connected).what == "GET /health: 200"
    shown = point(connected, "localhost", coordinator.port, health_port=coordinator.health_port)
    assert network_checks.health(shown).what == "gRPC health service: SERVING"
    closed = point(connected, "localhost", coordinator.port, health_port=free_port())
    assert "UNAVAILABLE" in failed(network_checks.health(closed), "NET_HEALTH")


@pytest.mark.parametrize(("status", "ok"), [(404, "skipped"), (403, "skipped"), (502, "failed")])
def test_health_behind_a_reverse_proxy(status, ok, place, authority):
    with https_server(authority.issue("server"), status=status) as port:
        found = network_checks.health(point(place, "127.0.0.1", port))
        key = network_checks.registered(place)
    assert found.ok == ok and str(status) in found.what
    failed(key, "NET_KEY", "/v1/fleet/")


@pytest.mark.parametrize(
    ("date", "well"), [(0.0, True), (50.0, True), (70.0, False), (600.0, False), (-3.0, True), (-9.0, False)]
)
def test_a_clock_that_is_wrong(date, well, place, authority):
    """`date`: how far the coordinator's clock is before ours."""
    with https_server(authority.issue("server"), date=date) as port:
        found = network_checks.clock(point(place, "127.0.0.1", port))
    if well:
        assert found.ok == "ok", found
    else:
        assert ("behind" if date > 0 else "ahead of") in failed(found, "NET_CLOCK", "timedatectl")


# ---- the kit


def test_a_kit_that_was_altered_or_is_another_hospitals(place, closed):
    assert network_checks.kit(place).ok == "ok"
    with (place.kit / "compose.yaml").open("a") as file:
        file.write("# hello\n")
    assert "compose.yaml: changed" in failed(network_checks.kit(place), "KIT_CHANGED")
    kits.copy(closed / "site-1", place.kit)
    assert "site-1" in failed(network_checks.kit(place), "KIT_CONFIG", "kit")


def test_a_supernode_key_that_others_may_read(place):
    (place.kit / "supernode.key").chmod(0o640)
    failed(network_checks.kit(place), "KEY_PERMISSIONS", "chmod 600")


def test_a_supernode_key_that_is_none(place):
    (place.kit / "supernode.key").write_text("hello")
    failed(network_checks.kit(place), "KEY_FORMAT", "kit")
    (place.kit / "supernode.key").unlink()
    failed(network_checks.kit(place), "KEY_MISSING", "kit")


@pytest.mark.parametrize(
    "text",
    ["port = 1", "site = 'a'\nhost = 'h'\nport = 1\nca = '../ca.crt'", "site = 'a'\nhost = 'h'\nport = 1\nx = 1"],
)
def test_a_site_toml_that_is_not_valid(text, place):
    (place.kit / "site.toml").write_text(text)
    failed(network_checks.kit(place), "KIT_CONFIG")


def test_addresses_of_a_site_toml():
    v4 = SiteConfig(site="a", host="relay.example", port=443, health_port=8444)
    assert (v4.address, v4.health_address) == ("relay.example:443", "relay.example:8444")
    v6 = SiteConfig(site="a", host="::1", port=443)
    assert (v6.address, v6.health_address) == ("[::1]:443", None)


# ---- this machine


@pytest.mark.parametrize(("free", "model", "needed"), [(1, 0, 5), (6, 2, 8)])
def test_a_full_disk(free, model, needed, place, monkeypatch):
    """Sizes in GB. A large model needs more."""
    real = os.statvfs

    def full(path):
        values = list(real(path))
        values[4] = free * 10**9 // values[1]  # f_bavail, in units of f_frsize
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "statvfs", full)
    with (place.home / "model.safetensors").open("wb") as file:
        file.truncate(model * 10**9)  # a file of holes
    assert failed(hospital_checks.disk(place), "SITE_DISK").startswith(f"{free}.0 GB free, {needed}.0 GB are needed")


def test_a_home_that_is_not_there(tmp_path):
    failed(hospital_checks.disk(Place(tmp_path / "nowhere", tmp_path)), "SITE_DISK")


def test_a_disk_that_does_not_keep_what_is_written(place, monkeypatch):
    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    assert "Input/output error" in failed(hospital_checks.disk(place), "SITE_DISK")
    assert not list(place.home.glob(".doctor-*"))


def test_a_gpu_that_is_wanted_and_missing_or_full(place, monkeypatch):
    assert hospital_checks.gpu(place).ok == "skipped"
    rewrite(place.home / "policy.toml", 'device = "cpu"', 'device = "cuda"')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    failed(hospital_checks.gpu(place), "RUN_DEVICE")
    rewrite(place.home / "policy.toml", 'device = "cuda"', 'device = "auto"')
    assert hospital_checks.gpu(place).ok == "skipped"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 80 * 10**9))
    assert "1.0 of 80.0 GB free" in failed(hospital_checks.gpu(place), "SITE_GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 80 * 10**9))
    assert hospital_checks.gpu(place).what == "a GPU, 40.0 of 80.0 GB free"


def test_data_that_cannot_be_used_names_no_file(place, tmp_path):
    policy = place.home / "policy.toml"
    folder = Path(place.policy().data)
    rewrite(policy, str(folder), str(tmp_path / "nowhere"))
    failed(hospital_checks.data(place), "DATA_PATH")
    (tmp_path / "nowhere").mkdir()
    failed(hospital_checks.data(place), "DATA_TOO_FEW")
    for i in range(30):
        (tmp_path / "nowhere" / f"Doe^Jane-{i}.dcm").write_bytes(b"Doe^Jane")
    what = failed(hospital_checks.data(place), "SITE_DATA", "dataset check")
    assert "DICOM_NOT_DICOM" in what and "Doe" not in what
    shutil.copy(next(folder.rglob("*.dcm")), tmp_path / "nowhere" / "A.dcm")  # comes first, so it is looked at
    found = hospital_checks.data(place)
    assert found.ok == "ok" and "31 files, 1 of 8" in found.what


def test_data_is_looked_at_before_any_study(place):
    (place.home / "study.json").unlink()
    assert hospital_checks.data(place).ok == "ok"


# ---- keys, study, ledger, budget


def test_keys(place, tmp_path, monkeypatch):
    assert "no key epoch yet" in hospital_checks.keys(place).what
    keys.store_next(place.home / "keys", keys.new_epoch(1, (SITE, "site-1", "site-2")))
    keys.activate_next(place.home / "keys", 1)
    assert hospital_checks.keys(place).what == "identity and key epoch 1"
    (place.home / "keys" / "identity.key").chmod(0o644)
    failed(hospital_checks.keys(place), "KEY_PERMISSIONS")
    shutil.rmtree(place.home / "keys")
    failed(hospital_checks.keys(place), "KEY_MISSING", "site init")
    keys.generate_identity().save(place.home / "keys", b"a long passphrase")
    failed(hospital_checks.keys(place), "KEY_PASSPHRASE")
    (tmp_path / "passphrase").write_bytes(b"a long passphrase")
    (tmp_path / "passphrase").chmod(0o600)
    monkeypatch.setenv("FEDMEDGAN_PASSPHRASE_FILE", str(tmp_path / "passphrase"))
    assert hospital_checks.keys(place).ok == "ok"
    failed(hospital_checks.study(place), "STUDY_KEYS")  # another identity than the one that joined


def test_a_study_that_is_not_signed_granted_or_joined(place):
    path = place.home / "study.json"
    agreement = place.agreement()
    assert "signed by all 3" in hospital_checks.study(place).what
    signed = {name: text for name, text in agreement.signatures.items() if name != "site-2"}
    path.write_bytes(type(agreement)(agreement.study, signed).to_json())
    early = hospital_checks.study(place)  # before the first roll call
    assert early.ok == "ok" and "the signatures of site-2 come" in early.what
    own = {name: text for name, text in agreement.signatures.items() if name != SITE}
    path.write_bytes(type(agreement)(agreement.study, own).to_json())
    failed(hospital_checks.study(place), "STUDY_SIGNATURE")
    rewrite(place.home / "policy.toml", "max_epsilon = 25.0", "max_epsilon = 3.0")
    assert hospital_checks.study(place).code in ("STUDY_POLICY", "BUDGET_EXHAUSTED")
    path.unlink()
    assert (hospital_checks.study(place).ok, hospital_checks.budget(place).ok) == ("skipped", "skipped")


def test_a_hospital_that_was_stopped_or_has_left(place):
    epoch = keys.new_epoch(1, (SITE, "site-1", "site-2"))
    keys.store_next(place.home / "keys", epoch)
    keys.activate_next(place.home / "keys", 1)
    (place.home / joining.REJECTED).write_text(json.dumps({"epoch": 1, "sums": 3}))
    failed(hospital_checks.study(place), "KEY_STOPPED", "site rotate")
    joining.allow_rotation(place.home)
    assert hospital_checks.study(place).ok == "ok"
    joining.leave(place.home)
    failed(hospital_checks.study(place), "RUN_LEFT")


def test_a_model_that_is_damaged_or_of_another_study(place):
    path = place.home / "model.safetensors"
    checkpoint.write(path, MODEL, round=1, study=place.agreement().study.hash)
    assert hospital_checks.model(place).what == "of round 1, undamaged"
    checkpoint.write(path, MODEL, round=1, study="0" * 64)
    failed(hospital_checks.model(place), "MODEL_MISMATCH")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    failed(hospital_checks.model(place), "MODEL_HASH")


def test_a_ledger_that_is_damaged_shortened_or_gone(place):
    path, study = place.home / "ledger.jsonl", place.agreement().study
    early = path.read_bytes()
    with ledger_of(place.home) as ledger:
        ledger.reserve(study.hash, 1, [TrainingSteps(1.0, 0.25, 2)])
    whole, whole_bytes = read(path), path.read_bytes()
    notes = {"ledger_seq": whole.seq, "ledger_head": whole.head}
    checkpoint.write(place.home / "model.safetensors", MODEL, round=1, study=study.hash, **notes)
    assert hospital_checks.ledger(place).what.startswith("3 records, the chain is whole")
    with path.open("r+b") as file:
        file.seek(60)
        file.write(b"X")
    failed(hospital_checks.ledger(place), "LEDGER_CORRUPT")
    path.write_bytes(early)
    failed(hospital_checks.ledger(place), "LEDGER_ROLLBACK")
    with ledger_of(place.home) as ledger:
        ledger.reserve(study.hash, 1, [TrainingSteps(1.0, 0.25, 1)])
    failed(hospital_checks.ledger(place), "LEDGER_FORK")
    (place.home / "model.safetensors").unlink()
    assert hospital_checks.ledger(place).ok == "ok", "the book has not seen the records that were replaced"
    path.write_bytes(whole_bytes)
    place.book().saw(whole)
    path.write_bytes(early)
    failed(hospital_checks.ledger(place), "LEDGER_ROLLBACK")
    path.unlink()
    failed(hospital_checks.ledger(place), "LEDGER_ROLLBACK")
    with ledger_of(place.home, "site-1") as ledger:
        ledger.open_study(study.hash, terms(delta=0.01, ceiling=20.0))
    failed(hospital_checks.ledger(place), "LEDGER_OWNER")


def test_a_budget_that_does_not_hold_the_next_round(place):
    study = place.agreement().study
    assert "epsilon 0 of 20 in this study, 0 of 25 in all; round 1 fits" in hospital_checks.budget(place).what
    noise = json.loads((place.home / joining.NOISE).read_text())["noise_multiplier"]
    step = TrainingSteps(noise, study.sampling_rate(study.site(SITE)), study.training.local_steps)
    with ledger_of(place.home) as ledger:
        for round in (1, 2):
            ledger.reserve(study.hash, round, [step])
    assert "in this study" in failed(hospital_checks.budget(place), "BUDGET_EXHAUSTED")
    checkpoint.write(place.home / "update.safetensors", MODEL, round=2)  # the last round, trained and paid
    assert "no further round" in hospital_checks.budget(place).what
    (place.home / joining.NOISE).unlink()
    (place.home / "update.safetensors").unlink()
    failed(hospital_checks.budget(place), "CONFIG_NOT_FOUND", "sign")


# ---- the command


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("doctor")(command.doctor)
    app.command("other")(lambda: None)
    return app


def test_the_command_prints_a_line_a_check_and_the_hints_and_exits_with_2(app, place):
    done = CliRunner().invoke(app, ["doctor", "--home", str(place.home)])
    assert done.exit_code == 2
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) >= len(doctor.CHECKS)
    address = f"127.0.0.1:{place.config().port}"
    assert f"NET_PORT: no connection (connection refused); {address}; {HINTS['NET_PORT']}" in done.stdout.splitlines()


def test_the_command_gives_json_and_exits_with_0_where_all_is_well(app, connected, monkeypatch):
    monkeypatch.setattr(output, "_format", "json")
    done = CliRunner().invoke(app, ["doctor", "--home", str(connected.home), "--kit", str(connected.kit)])
    assert done.exit_code == 0, done.stdout
    data = json.loads(done.stdout)["data"]
    assert data["healthy"] and len(data["checks"]) == len(doctor.CHECKS)
    assert set(data["checks"][0]) == {"name", "ok", "what", "hint", "code"}
    # Nothing of a header or of a file name goes out: neither names of phantoms' files nor their patients' IDs.
    folder = Path(connected.policy().data)
    assert not any(path.name in done.stdout for path in folder.rglob("*.dcm"))


def test_every_code_of_the_doctor_has_a_hint():
    with pytest.raises(KeyError):
        RunError("NET_NOTHING", "x")
    assert {code for code in HINTS if code.startswith(("NET_", "SITE_"))} == {
        *("NET_DNS", "NET_PORT", "NET_TLS", "NET_HEALTH", "NET_CLOCK", "NET_KEY"),
        *("SITE_DISK", "SITE_GPU", "SITE_DATA"),
    }
