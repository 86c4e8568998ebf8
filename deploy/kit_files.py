"""What stands in a kit: templates with their blanks filled in. No secret passes through here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from importlib import metadata, resources

from fedmedgan.deploy.environment import OFF_SWITCHES
from fedmedgan.deploy.kit_config import COORDINATOR_TOML, Consortium
from fedmedgan.deploy.site_config import SiteConfig

BLANK = re.compile(r"@[A-Z_]+@")


def hospital(consortium: Consortium, site: str, wheel: str) -> dict[str, bytes]:
    """File name -> content, for one hospital; certificate and keys come on top.

    Args:
        wheel: name of the wheel that the kit holds, "" where the package comes from an index.
    """
    config = SiteConfig(site=site, host=consortium.coordinator.host, port=consortium.coordinator.port)
    blanks = _blanks(consortium, wheel) | {
        "SITE": site,
        "RUNTIME_PORT": str(config.runtime_port),
        "EGRESS": config.host if _is_address(config.host) else "<the coordinator's address>",
    }
    site_toml = (
        f"# {site} in the consortium {consortium.name}. Nothing in here is secret; README.md says what to do with it.\n"
        f'site = "{site}"\nhost = "{config.host}"\nport = {config.port}\nruntime_port = {config.runtime_port}\n'
    )
    return {
        "README.md": _filled("site.README.md", blanks),
        "site.toml": site_toml.encode(),
        "fedmedgan-site.service": _filled("fedmedgan-site.service", blanks),
        "compose.yaml": _filled("site.compose.yaml", blanks),
        "Dockerfile": _filled("site.Dockerfile", blanks),
        **_common(wheel),
    }


def coordinator(consortium: Consortium, wheel: str) -> dict[str, bytes]:
    """File name -> content, for the coordinator; certificates and keys come on top."""
    blanks = _blanks(consortium, wheel)
    return {
        "README.md": _filled("coordinator.README.md", blanks),
        COORDINATOR_TOML: consortium.to_toml().encode(),
        "fedmedgan-server.service": _filled("fedmedgan-server.service", blanks),
        "nginx.conf": _filled("nginx.conf", blanks),
        "compose.yaml": _filled("coordinator.compose.yaml", blanks),
        "Dockerfile": _filled("coordinator.Dockerfile", blanks),
        **_common(wheel),
    }


def template(name: str) -> str:
    return (resources.files("fedmedgan.deploy") / "templates" / name).read_text(encoding="utf-8")


def _common(wheel: str) -> dict[str, bytes]:
    ignored = ["*", "!constraints.txt", *([f"!{wheel}"] if wheel else [])]  # no key reaches the builder of images
    return {
        "constraints.txt": template("constraints.txt").encode(),
        "fedmedgan.env": "".join(f"{name}={value}\n" for name, value in OFF_SWITCHES.items()).encode(),
        ".dockerignore": ("\n".join(ignored) + "\n").encode(),
    }


def _blanks(consortium: Consortium, wheel: str) -> dict[str, str]:
    def install(extra: str) -> str:
        return f"./{wheel}[{extra}]" if wheel else f"fedmedgan[{extra}]=={metadata.version('fedmedgan')}"

    return {
        "CONSORTIUM": consortium.name,
        "HOSPITALS": ", ".join(consortium.names),
        "ADDRESS": consortium.coordinator.address,
        "HOST": consortium.coordinator.host,
        "PORT": str(consortium.coordinator.port),
        "SUPERLINK_PORT": str(consortium.coordinator.superlink_port),
        "INSTALL_HOSPITAL": install("hospital"),
        "INSTALL_SERVER": install("server"),
        "DOCKER_COPY": f"constraints.txt {wheel}".strip(),
        "SYSTEMD_ENVIRONMENT": "\n".join(f"Environment={name}={value}" for name, value in OFF_SWITCHES.items()),
    }


def _filled(name: str, blanks: Mapping[str, str]) -> bytes:
    """A template with its ``@BLANKS@``; one that nobody fills in is a KeyError."""
    return BLANK.sub(lambda match: blanks[match.group()[1:-1]], template(name)).encode()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
