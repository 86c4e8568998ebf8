"""Can this hospital reach the coordinator, and is it the right one?

What is asked, and why, follows from what Flower 1.41 does:

| check | what is asked | what is well |
|---|---|---|
| TLS certificate | a handshake that trusts the kit's ca.crt alone | chain, name and dates are valid |
| health | gRPC health service where the kit names one, GET /health elsewhere | SERVING, or 200 |
| clock | the Date header of any answer | inside Flower's window, which takes nothing from the future |
| SuperNode key | a signed ActivateNode with a heartbeat interval of 0 | refused for the interval (400) |

The last one changes nothing: Flower looks the key up (unknown: 412), then refuses the interval (400), and only then
would activate. So a SuperNode that runs with the same key does not notice.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import stat
import time
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedmedgan.deploy import kits
from fedmedgan.deploy.check import Place, Skip, check
from fedmedgan.deploy.site_config import NAME, SiteConfig
from fedmedgan.shared.errors import CryptoError, RunError

SECONDS = 5.0
"""How long one question to the coordinator may take."""
MAX_BEHIND = 60.0
MAX_AHEAD = float(SYSTEM_TIME_TOLERANCE)
"""Seconds between this clock and the coordinator's. Flower takes signatures that are up to 305 s old, but none from
more than 5 s ahead of its own clock."""
RENEW_DAYS = 30
"""Days before the end of a certificate from which on the doctor warns."""
GET_KIT = "ask the coordinator for this hospital's kit again"


def _ask(
    place: Place, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str, bytes]:
    """GET, or POST where there is a body; trusts the kit's authority alone. Returns status, Date header and answer.

    Raises:
        RunError: KIT_*, NET_DNS, NET_PORT, NET_TLS.
    """
    config = place.config()
    try:
        connection = http.client.HTTPSConnection(config.host, config.port, timeout=SECONDS, context=_trust(place))
        try:
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers.get("Date", ""), answer.read(1 << 16)
        finally:
            connection.close()
    except ssl.SSLError as error:
        raise _tls_error(error, config) from None
    except OSError as error:
        raise _connection_error(error, config) from None
    except http.client.HTTPException as error:
        raise RunError("NET_PORT", f"no HTTPS answer ({type(error).__name__})", config.address) from None


def _trust(place: Place) -> ssl.SSLContext:
    path = place.kit / place.config().ca
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError:
        raise RunError("NET_TLS", "not a certificate authority in PEM", path.name, hint=GET_KIT) from None
    except OSError as error:
        raise RunError("KIT_PATH", f"cannot be read ({error.strerror})", path.name, hint=GET_KIT) from None
    return context


def _connection_error(error: OSError, config: SiteConfig) -> RunError:
    if isinstance(error, socket.gaierror):
        return RunError("NET_DNS", "the coordinator's name is not known here", config.host)
    what = "no answer in time" if isinstance(error, TimeoutError) else error.strerror or type(error).__name__
    return RunError("NET_PORT", f"no connection ({what.lower()})", config.address)


def _tls_error(error: ssl.SSLError, config: SiteConfig) -> RunError:
    code = getattr(error, "verify_code", 0)  # names of these numbers: OpenSSL's x509_vfy.h
    said = getattr(error, "verify_message", "") or error.reason or "no TLS"
    hints = {
        9: "set this machine's clock: timedatectl set-ntp true",
        10: "if this machine's clock is right, the coordinator has to renew its certificate",
        62: "`host` of site.toml must be a name in the coordinator's certificate; " + GET_KIT,
        64: "`host` of site.toml must be an address in the coordinator's certificate; " + GET_KIT,
    }
    return RunError("NET_TLS", said.lower(), config.address, hint=hints.get(code, ""))


@check("kit")
def kit(place: Place) -> str:
    config, own = place.config(), place.policy().site
    _supernode_key(place)
    kits.require_unchanged(place.kit)
    if config.site != own:
        raise RunError("KIT_CONFIG", f"the kit is for {config.site!r}, this is {own!r}", NAME, hint=GET_KIT)
    return f"{config.site}, coordinator at {config.address}; as it was made"


@check("DNS")
def dns(place: Place) -> str:
    config = place.config()
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _connection_error(error, config) from None
    return f"{config.host} is {', '.join(sorted({str(entry[4][0]) for entry in found}))}"


@check("port")
def port(place: Place) -> str:
    config = place.config()
    try:
        socket.create_connection((config.host, config.port), timeout=SECONDS).close()
    except OSError as error:
        raise _connection_error(error, config) from None
    return f"{config.address} is open"


@check("TLS certificate")
def certificate(place: Place) -> str | tuple[str, str]:
    config, context = place.config(), _trust(place)
    try:
        with (
            socket.create_connection((config.host, config.port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=config.host) as secured,
        ):
            chain = [secured.getpeercert() or {}, *context.get_ca_certs()]
    except ssl.SSLError as error:
        raise _tls_error(error, config) from None
    except OSError as error:
        raise _connection_error(error, config) from None
    ends = min(ssl.cert_time_to_seconds(str(one["notAfter"])) for one in chain)
    days = int((ends - time.time()) // 86_400)
    warning = f"ask the coordinator to renew it: {days} days are left" if days < RENEW_DAYS else ""
    return f"trusted, for {days} days", warning


@check("health")
def health(place: Place) -> str:
    address = place.config().health_address
    if address is None:
        status, *_ = _ask(place, "/health")
        if status >= 500:
            raise RunError("NET_HEALTH", f"GET /health was answered with {status}", place.config().address)
        if status != 200:
            raise Skip(f"the coordinator does not show its health to hospitals ({status})")
        return "GET /health: 200"
    import grpc  # type: ignore[import-untyped]
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

    try:
        with grpc.insecure_channel(address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    except grpc.RpcError as error:
        raise RunError("NET_HEALTH", f"gRPC health service: {error.code().name}", address) from None
    said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise RunError("NET_HEALTH", f"gRPC health service: {said}", address)
    return f"gRPC health service: {said}"


@check("clock")
def clock(place: Place) -> str:
    before = time.time()
    _, date, _ = _ask(place, "/health")
    between = (before + time.time()) / 2
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except ValueError:
        raise Skip("the coordinator's answer has no date") from None
    ahead = between - (theirs + 1)  # the header was rounded down, and is renewed once a second
    if not -MAX_BEHIND <= ahead <= MAX_AHEAD:
        side = "ahead of" if ahead > 0 else "behind"
        raise RunError("NET_CLOCK", f"this clock is {abs(ahead):.0f} s {side} the coordinator's", "clock")
    return f"within {max(1.0, abs(ahead)):.0f} s of the coordinator's"


@check("SuperNode key")
def registered(place: Place) -> str:
    private = _supernode_key(place)
    public = public_key_to_bytes(private.public_key())
    now = datetime.now(UTC).isoformat()
    headers = {
        "Content-Type": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public).decode(),
        TIMESTAMP_HEADER: now,
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(private, now.encode())).decode(),
    }
    request = ActivateNodeRequest(public_key=public, heartbeat_interval=0.0)
    status, _, body = _ask(place, "/v1/fleet/activate-node", request.SerializeToString(), headers)
    where = place.config().address
    if status == 400 and _flower_code(body) == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return "registered with the coordinator"
    if status == 401:
        hint = "set this machine's clock: timedatectl set-ntp true; then " + GET_KIT
        raise RunError("NET_KEY", "the coordinator does not accept the key's signature", where, hint=hint)
    if status == 412 and _flower_code(body) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        raise RunError("NET_KEY", "the coordinator does not know this SuperNode's key", where)
    hint = "the coordinator's reverse proxy must let /v1/fleet/ through"
    raise RunError("NET_KEY", f"the question for the key was answered with {status}", where, hint=hint)


def _flower_code(body: bytes) -> int:
    """Number of Flower's error, 0 where the answer is not one of Flower's."""
    try:
        return int(json.loads(body)["code"])
    except (ValueError, KeyError, TypeError):
        return 0


def _supernode_key(place: Place) -> ec.EllipticCurvePrivateKey:
    path = place.kit / place.config().supernode_key
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise CryptoError("KEY_PERMISSIONS", "others than the owner may read the key", path.name)
        private = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise CryptoError("KEY_MISSING", f"cannot be read ({error.strerror})", path.name, hint=GET_KIT) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise CryptoError("KEY_FORMAT", "not an OpenSSH key on an elliptic curve", path.name, hint=GET_KIT)
    return private
