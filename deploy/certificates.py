"""TLS certificates and SuperNode keys of a consortium: transport only. They open no update and sign no message.

thing             what it is                                    who holds the private half
ca                ECDSA P-384, X.509 v3, ten years              whoever makes the kits
server            ECDSA P-256, signed by the CA, 825 days       coordinator
SuperNode         ECDSA P-384, OpenSSH format (Flower's)        one hospital

Certificates carry what Python 3.13 and OpenSSL ask for in strict mode (RFC 5280 4.2.1: key identifiers, critical
basic constraints and key usage).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmedgan.shared.errors import RunError

CA_DAYS = 3652
SERVER_DAYS = 825
RENEW_DAYS = 90
"""A server certificate with less than this left is made anew."""
ALWAYS = ("localhost", "127.0.0.1")
"""Names under which the coordinator's own machine reaches its SuperLink."""


def private_key(curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve)


def make_ca(name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """A certificate authority that signs servers of one consortium and nothing below it."""
    key = private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedmedgan consortium {name}")])
    builder = _builder(subject, subject, key.public_key(), key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True, digital_signature=True), critical=True)
    return key, builder.sign(key, hashes.SHA384())


def make_server(
    ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, host: str
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Certificate of the coordinator for `host` (DNS name or address) and for its own loopback."""
    key = private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    names = [_general_name(name) for name in dict.fromkeys((host, *ALWAYS))]
    builder = _builder(subject, ca.subject, key.public_key(), ca_key.public_key(), SERVER_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return key, builder.sign(ca_key, hashes.SHA384())


def still_good(certificate: x509.Certificate, ca: x509.Certificate, host: str) -> bool:
    """Does this server certificate name the host, come from the CA, and last a while longer?"""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return _general_name(host) in list(names) and left.days > RENEW_DAYS


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate, hex in pairs: what ``openssl x509 -fingerprint -sha256`` prints."""
    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def sign(ca_key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """ECDSA with SHA-384, DER: what ``openssl dgst -sha384 -verify`` checks."""
    return ca_key.sign(message, ec.ECDSA(hashes.SHA384()))


def is_signed(ca: x509.Certificate, signature: bytes, message: bytes) -> bool:
    public = ca.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(signature, message, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


# ---- files


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8, not encrypted: a server must start by itself. The file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def supernode_pair() -> tuple[bytes, bytes]:
    """A SuperNode's private and public key, as Flower reads them (``ssh-keygen -t ecdsa -b 384``)."""
    key = private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return private, public + b"\n"


def write_secret(path: Path, content: bytes) -> None:
    """A new file that its owner alone can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def load_certificate(path: Path) -> x509.Certificate:
    """Raises RunError KIT_PATH, KIT_CHANGED."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise RunError("KIT_PATH", f"{path.name} cannot be read ({error.strerror})", str(path.parent)) from None
    except ValueError:
        raise RunError("KIT_CHANGED", f"{path.name} is not a certificate", str(path.parent)) from None


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises RunError KIT_PATH, KIT_CHANGED."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise RunError("KIT_PATH", f"{path.name} cannot be read ({error.strerror})", str(path.parent)) from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise RunError("KIT_CHANGED", f"{path.name} is not the CA's private key", str(path.parent))
    return key


# ---- X.509


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer_public: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # hospitals' clocks differ a little
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
    )


def _usage(**wanted: bool) -> x509.KeyUsage:
    names: Sequence[str] = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: wanted.get(name, False) for name in names})


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
