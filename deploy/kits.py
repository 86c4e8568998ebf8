"""Start-up kits: one folder for each party, made by one command, checked by another.

    kits/ca/            the CA and its private key: stays with whoever makes kits
    kits/coordinator/   TLS certificate, the hospitals' public SuperNode keys, nginx, systemd, compose
    kits/NAME/          for one hospital: where the coordinator is, the CA, its own SuperNode key, systemd, compose

Keys in kits are for transport. Keys that open updates or sign messages are made by each party itself, later.

situation                                   what `make` does
first time                                  makes everything
again, one hospital more                    makes its kit and the coordinator's; all others stay byte for byte
again, a hospital's kit was sent and gone   nothing: its public key in the coordinator's kit says that it was made
again, a hospital removed                   its key leaves the coordinator's kit
again, another host, port or name           KIT_CONFIG: kits that were sent would be wrong
server certificate ends within 90 days      renewed
the CA's key is kept elsewhere              KIT_PATH: a new CA would shut the others out
killed half way                             a kit appears whole or not at all; make again
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedmedgan.deploy import certificates, kit_config, kit_files
from fedmedgan.deploy.kit_config import COORDINATOR_TOML, Consortium
from fedmedgan.shared.errors import RunError

SUMS, SIGNATURE, CA = "SHA256SUMS", "SHA256SUMS.sig", "ca.crt"
SECRETS = ("server.key", "supernode.key")


@dataclass(frozen=True)
class Made:
    """What `make` did."""

    new: tuple[str, ...]
    """Hospitals whose kit was made now."""
    kept: tuple[str, ...]
    """Hospitals whose kit was left as it was."""
    ca_fingerprint: str


@dataclass(frozen=True)
class Difference:
    """One file of a kit that is not as it was made."""

    name: str
    how: str
    """``changed``, ``missing``, ``extra``, ``unsafe`` or ``not signed``."""


def make(consortium: Consortium, out: Path, wheel: Path | None = None) -> Made:
    """Make the kits that are not there yet, and the coordinator's.

    Args:
        out: folder of all kits; new, or of an earlier `make`.
        wheel: a wheel of fedmedgan that goes into the new kits; by default the one of an earlier `make`, if any.

    Raises:
        RunError: KIT_CONFIG, KIT_PATH, KIT_CHANGED.
    """
    try:
        if wheel is not None and (wheel.suffix != ".whl" or not wheel.is_file()):
            raise RunError("KIT_PATH", "this is not a wheel", str(wheel), hint="give the .whl that `pip wheel .` wrote")
        out.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_earlier(consortium, out)
        wheel = wheel or next(iter(sorted((out / "coordinator").glob("*.whl"))), None)
        ca_key, ca = _ca(out / "ca", consortium.name)
        return _make(consortium, out, wheel, ca_key, ca)
    except OSError as error:
        raise RunError("KIT_PATH", f"cannot be written ({error.strerror})", str(error.filename or out)) from None


def verify(kit: Path) -> list[Difference]:
    """Files of a kit that differ from what was signed when it was made; empty if it is as made.

    Raises:
        RunError: KIT_PATH, the folder is not a kit.
    """
    try:
        listed = (kit / SUMS).read_bytes()
        signature = (kit / SIGNATURE).read_bytes()
        lines = [line.split("  ", 1) for line in listed.decode().splitlines()]
        sums = {name: digest for digest, name in lines}
        found = {str(path.relative_to(kit)): path for path in sorted(kit.rglob("*")) if not path.is_dir()}
        return _differences(kit, sums, found, listed, signature)
    except OSError as error:
        raise RunError("KIT_PATH", f"not a kit: {error.strerror}", str(kit)) from None
    except ValueError:
        return [Difference(SUMS, "changed")]


def require_unchanged(kit: Path) -> None:
    """Raises RunError KIT_CHANGED where a kit is not as it was made, KIT_PATH where it is none."""
    different = verify(kit)
    if different:
        raise RunError("KIT_CHANGED", "; ".join(f"{d.name}: {d.how}" for d in different), str(kit))


def copy(kit: Path, to: Path) -> None:
    """Put a kit into a party's own folder, in place of an older one, after checking it.

    Raises:
        RunError: KIT_CHANGED, KIT_PATH.
    """
    require_unchanged(kit)
    try:
        if to.exists() and to.samefile(kit):
            return
        part = to.with_name(f".{to.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(kit, part)
        part.chmod(0o700)
        for name in SECRETS:
            if (part / name).exists():
                (part / name).chmod(0o600)
        _replace(part, to)
    except OSError as error:
        raise RunError("KIT_PATH", f"cannot be written ({error.strerror})", str(to)) from None
    require_unchanged(to)


# ---- making


def _check_earlier(consortium: Consortium, out: Path) -> None:
    """Kits that were sent name a consortium and an address; those cannot be changed behind the hospitals' backs."""
    known = out / "coordinator" / COORDINATOR_TOML
    if not known.exists():
        if any(out.iterdir()) and not (out / "ca").is_dir():
            raise RunError("KIT_PATH", "the folder holds something else", str(out), hint="choose a new folder")
        return
    earlier = kit_config.load(known)
    if (earlier.name, earlier.coordinator) != (consortium.name, consortium.coordinator):
        what = f"kits for {earlier.name} at {earlier.coordinator.address} were made here"
        hint = "make kits for another name or address in another folder, and send them to all hospitals"
        raise RunError("KIT_CONFIG", what, str(out), hint=hint)


def _ca(folder: Path, name: str) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """The CA of this folder, made once; not again once kits were made with it: hospitals would not know it.

    Raises:
        RunError: KIT_PATH.
    """
    if not folder.exists() and (folder.parent / "coordinator").exists():
        hint = "put the folder `ca` back beside the kits while kits are made"
        raise RunError("KIT_PATH", "the certificate authority of these kits is not here", str(folder), hint=hint)
    if not folder.exists():
        part = _fresh(folder)
        key, certificate = certificates.make_ca(name)
        certificates.write_secret(part / "ca.key", certificates.key_pem(key))
        (part / CA).write_bytes(certificates.certificate_pem(certificate))
        part.rename(folder)
    return certificates.load_key(folder / "ca.key"), certificates.load_certificate(folder / CA)


def _make(
    consortium: Consortium, out: Path, wheel: Path | None, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate
) -> Made:
    common = {CA: certificates.certificate_pem(ca), **({wheel.name: wheel.read_bytes()} if wheel else {})}
    wheel_name = wheel.name if wheel else ""
    new, kept, public_keys = [], [], {}
    for name in consortium.names:
        known = out / "coordinator" / "supernodes" / f"{name}.pub"
        here = out / name / "supernode.pub"
        if known.exists() or here.exists():  # `here` alone: killed before the coordinator's kit was made
            public_keys[name] = (known if known.exists() else here).read_bytes()
            kept.append(name)
            continue
        private, public_keys[name] = certificates.supernode_pair()
        files = kit_files.hospital(consortium, name, wheel_name) | common | {"supernode.pub": public_keys[name]}
        _write_kit(out / name, files, {"supernode.key": private}, ca_key)
        new.append(name)
    server_key, server = _server(out / "coordinator", consortium.coordinator.host, ca_key, ca)
    files = kit_files.coordinator(consortium, wheel_name) | common | {"server.crt": server}
    files |= {f"supernodes/{name}.pub": public for name, public in public_keys.items()}
    _write_kit(out / "coordinator", files, {"server.key": server_key}, ca_key)
    return Made(tuple(new), tuple(kept), certificates.fingerprint(ca))


def _server(folder: Path, host: str, ca_key: ec.EllipticCurvePrivateKey, ca: x509.Certificate) -> tuple[bytes, bytes]:
    """Key and certificate of the coordinator's server: the ones that are there, or new ones near their end."""
    key, certificate = folder / "server.key", folder / "server.crt"
    there = certificate.exists() and key.exists()
    if there and certificates.still_good(certificates.load_certificate(certificate), ca, host):
        return key.read_bytes(), certificate.read_bytes()
    new_key, new = certificates.make_server(ca_key, ca, host)
    return certificates.key_pem(new_key), certificates.certificate_pem(new)


def _write_kit(
    folder: Path, files: Mapping[str, bytes], secrets: Mapping[str, bytes], ca_key: ec.EllipticCurvePrivateKey
) -> None:
    part = _fresh(folder)
    for name, content in files.items():
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_bytes(content)
    for name, content in secrets.items():
        certificates.write_secret(part / name, content)
    contents = {**files, **secrets}
    sums = "".join(f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)).encode()
    (part / SUMS).write_bytes(sums)
    (part / SIGNATURE).write_bytes(certificates.sign(ca_key, sums))
    _replace(part, folder)


def _fresh(folder: Path) -> Path:
    """An empty folder beside `folder`, for it to be renamed from."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    return part


def _replace(part: Path, folder: Path) -> None:
    """Put a finished folder in the place of the one that is there."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ---- checking


def _differences(
    kit: Path, sums: Mapping[str, str], found: Mapping[str, Path], listed: bytes, signature: bytes
) -> list[Difference]:
    different = []
    if (kit / CA).exists() and not certificates.is_signed(certificates.load_certificate(kit / CA), signature, listed):
        different.append(Difference(SUMS, "not signed"))
    for name in sorted({*sums, *found} - {SUMS, SIGNATURE}):
        if name not in found:
            how = "missing"
        elif name not in sums:
            how = "extra"
        elif found[name].is_symlink():
            how = "unsafe"
        elif hashlib.sha256(found[name].read_bytes()).hexdigest() != sums[name]:
            how = "changed"
        elif name in SECRETS and os.stat(found[name]).st_mode & 0o077:
            how = "unsafe"
        else:
            continue
        different.append(Difference(name, how))
    return different
