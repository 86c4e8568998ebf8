"""``consortium.toml``, which kits are made from, and ``coordinator.toml``, which the coordinator's kit holds.

name = "chest"

[coordinator]
host = "fedmedgan.example.org"   # DNS name or address under which hospitals reach it
port = 443                       # nginx
superlink_port = 9092            # loopback, behind nginx

[[hospitals]]
name = "north"                   # as in the study
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedmedgan.deploy.site_config import Host, Port
from fedmedgan.shared.errors import RunError
from fedmedgan.shared.study import MAX_FILE_BYTES, MAX_SITES, MIN_SITES, SiteName

COORDINATOR_TOML = "coordinator.toml"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Coordinator(_Part):
    """Where the coordinator is."""

    host: Host
    """DNS name or address that hospitals reach."""
    port: Port = 443
    """Of nginx; equal to `superlink_port` where there is no nginx, on one machine."""
    superlink_port: Port = 9092
    """Loopback port of the SuperLink."""

    @property
    def address(self) -> str:
        """``host:port``, with brackets around an IPv6 address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Member(_Part):
    """A hospital."""

    name: SiteName


class Consortium(_Part):
    """Everybody who gets a kit."""

    name: SiteName
    coordinator: Coordinator
    hospitals: Annotated[tuple[Member, ...], Field(min_length=MIN_SITES, max_length=MAX_SITES)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [hospital.name for hospital in self.hospitals]
        twice = sorted({name for name in names if names.count(name) > 1})
        taken = sorted({"ca", "coordinator"} & set(names))
        if twice or taken:
            what = f"two hospitals are called {twice[0]!r}" if twice else f"no hospital may be called {taken[0]!r}"
            raise RunError("KIT_CONFIG", what, "hospitals")
        return self

    @property
    def names(self) -> list[str]:
        return [hospital.name for hospital in self.hospitals]

    def to_toml(self) -> str:
        """As it stands in the coordinator's kit."""
        lines = [
            f"name = {json.dumps(self.name)}",
            "",
            "[coordinator]",
            f"host = {json.dumps(self.coordinator.host)}",
            f"port = {self.coordinator.port}",
            f"superlink_port = {self.coordinator.superlink_port}",
        ]
        for name in self.names:
            lines += ["", "[[hospitals]]", f"name = {json.dumps(name)}"]
        return "\n".join(lines) + "\n"


def load(path: Path) -> Consortium:
    """Read ``consortium.toml`` or ``coordinator.toml``.

    Raises:
        RunError: KIT_PATH, it cannot be read; KIT_CONFIG, one clear line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RunError("KIT_CONFIG", "the file is larger than 1 MiB", str(path))
        values = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
        return Consortium.model_validate(_tuples(values))
    except OSError as error:
        hint = "give the path of a consortium.toml; docs/deployment.md shows one"
        raise RunError("KIT_PATH", f"cannot be read ({error.strerror})", str(path), hint=hint) from None
    except ValidationError as error:
        raise _first_problem(error, str(path)) from None
    except (ValueError, RecursionError) as error:  # TOML and UTF-8
        raise RunError("KIT_CONFIG", f"not valid TOML: {error}", str(path)) from None


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list) else value


def _first_problem(error: ValidationError, where: str) -> RunError:
    """Pydantic's complaint as one of ours; an unknown key first, because it explains a missing one."""
    problem = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    location = problem["loc"]
    key, place = str(location[-1]), f"{where}: {'.'.join(map(str, location))}"
    if problem["type"] == "extra_forbidden":
        models: dict[Any, type[BaseModel]] = {"coordinator": Coordinator, "hospitals": Member}
        model = models[location[0]] if len(location) > 1 else Consortium
        close = difflib.get_close_matches(key, model.model_fields, n=1)
        guess = f", did you mean {close[0]!r}?" if close else ""
        return RunError("KIT_CONFIG", f"unknown key {key!r}{guess}", place)
    if problem["type"] == "missing":
        return RunError("KIT_CONFIG", f"the key {key!r} is missing", place)
    return RunError("KIT_CONFIG", problem["msg"][0].lower() + problem["msg"][1:], place)
