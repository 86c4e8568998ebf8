"""`site.toml` of a hospital's start-up kit: where the coordinator is and which files of the kit prove who is who.

The kit's maker writes it and nothing in it is secret. The rules that outrank a study stand in the hospital's own
`policy.toml`, never in here.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import SiteName

NAME = "site.toml"

Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9:][A-Za-z0-9.:-]{0,252}$")]
Port = Annotated[int, Field(ge=1, le=65_535)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A file beside `site.toml`: no folder, so a kit cannot point outside itself."""


class SiteConfig(BaseModel):
    """What a hospital's SuperNode and `site doctor` need to reach the coordinator."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: SiteName
    """This hospital's name in the study's roster."""
    host: Host
    """DNS name or address of the coordinator, as its certificate names it."""
    port: Port
    """Port of the SuperLink, or of the reverse proxy before it: HTTPS."""
    ca: FileName = "ca.crt"
    """Certificate authority of the consortium, PEM."""
    supernode_key: FileName = "supernode.key"
    """SuperNode's private key, OpenSSH format, elliptic curve P-384."""
    runtime_port: Port = 9094
    """Loopback port of the SuperNode's own Runtime API; unique on its machine."""
    health_host: Host | None = None
    """gRPC health service of the SuperLink, where the coordinator lets hospitals reach it; no TLS."""
    health_port: Port | None = None

    @property
    def address(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def health_address(self) -> str | None:
        """``host:port`` of the gRPC health service, None where hospitals cannot reach it."""
        if self.health_port is None:
            return None
        host = self.health_host or self.host
        return f"[{host}]:{self.health_port}" if ":" in host else f"{host}:{self.health_port}"

    @classmethod
    def load(cls, kit: Path) -> SiteConfig:
        """Read ``site.toml`` of a kit.

        Raises:
            RunError: KIT_PATH, there is no such file; KIT_CONFIG, a value is not valid.
        """
        path = kit / NAME
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise RunError("KIT_PATH", f"{NAME} cannot be read ({error.strerror})", str(kit)) from None
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in problem["loc"])
            raise RunError("KIT_CONFIG", problem["msg"], f"{NAME}: {key}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError("KIT_CONFIG", f"not valid TOML: {error}", NAME) from None
