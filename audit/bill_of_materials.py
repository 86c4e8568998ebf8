"""The software bill of materials of this installation: CycloneDX 1.6, JSON.

Listed is what fedmedgan needs and what that needs in turn, as far as it is installed: by the machine that writes the
bill. What trained stands in the ledger's `open` records.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = "fedmedgan"
EXTRAS = frozenset({"hospital", "codecs-gpl"})
"""Parts of fedmedgan that a hospital may have."""


@lru_cache(maxsize=1)
def bill_of_materials(made: str) -> str:
    """The bill as JSON text; equal installations and times give equal bytes.

    Args:
        made: its time, as in a ledger.

    ======================================  ==========================================
    case                                    result
    ======================================  ==========================================
    a requirement that is not installed     left out (other platforms, other extras)
    two packages that need each other       listed once each
    no licence in a package's metadata      a component without a licence
    ======================================  ==========================================
    """
    found: dict[str, Component] = {}
    edges: dict[str, set[str]] = {}
    waiting: list[tuple[str, frozenset[str]]] = [(ROOT, EXTRAS)]
    asked: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        distribution = metadata.distribution(name)
        found.setdefault(name, _component(name, distribution))
        for needed, with_extras in _needs(distribution, extras):
            edges.setdefault(name, set()).add(needed)
            waiting.append((needed, with_extras))
    named = " ".join(f"{name}=={component.version}" for name, component in sorted(found.items()))
    bom = Bom(serial_number=uuid5(NAMESPACE_URL, f"{made} {named}"))
    bom.metadata.timestamp = datetime.strptime(made, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    bom.metadata.component = found[ROOT]
    for name in sorted(found):
        if name != ROOT:
            bom.components.add(found[name])
        bom.register_dependency(found[name], [found[needed] for needed in sorted(edges.get(name, ()))])
    return JsonV1Dot6(bom).output_as_string(indent=1) + "\n"


def _needs(distribution: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """Installed packages that a package needs: (name, extras of it)."""
    for line in distribution.requires or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *sorted(extras))):
            continue
        name = canonicalize_name(requirement.name)
        if _is_installed(name):
            yield name, frozenset(requirement.extras)


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _component(name: str, distribution: metadata.Distribution) -> Component:
    said = _licence(distribution.metadata)
    return Component(
        type=ComponentType.APPLICATION if name == ROOT else ComponentType.LIBRARY,
        name=name,
        version=distribution.version,
        purl=PackageURL("pypi", name=name, version=distribution.version),
        bom_ref=f"{name}=={distribution.version}",
        licenses=[LicenseFactory().make_from_string(said)] if said else [],
    )


def _licence(about: metadata.PackageMetadata) -> str:
    """An SPDX expression if the package gives one, else the name that it uses; empty if it gives none."""
    expressions, free = about.get_all("License-Expression") or [], about.get_all("License") or []
    classifiers = [line for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    named = [line.rsplit("::", 1)[1].strip() for line in classifiers] + [line for line in free if len(line) <= 60]
    return next(iter([*expressions, *named]), "")
