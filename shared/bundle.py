"""The one Flower app bundle (FAB) that is accepted. It names the installed code and carries none.

Flower sends a zip with every run, unpacks it at each hospital, puts it first on Python's path and runs what lies in
it. A hospital runs its INSTALLED package only, so the zip must hold the two files below, byte for byte, and Flower's
own list of them; the hospital's gate (fedmedgan.deploy.gate) checks that and unpacks nothing all the same.

bundle                                            check
a file more: code, a folder ``fedmedgan/``, ...   RUN_BUNDLE
another ``pyproject.toml``: other entry points    RUN_BUNDLE
a name twice, absolute, or with ``..``            RUN_BUNDLE
a size that is not the file's (zip bomb)          RUN_BUNDLE, before anything is inflated
bytes before, between or after the members        RUN_BUNDLE
not a zip, encrypted, truncated                   RUN_BUNDLE
compressed otherwise, or stored                   accepted: the contents count
"""

from __future__ import annotations

import hashlib
import zipfile
from io import BytesIO
from pathlib import Path

from fedmedgan.shared.errors import RunError

MAX_BYTES = 1 << 16
FOLDER_SETTING = "coordinator-folder"
"""Key of the run's configuration that tells the coordinator's app its own folder."""

PYPROJECT = f"""[project]
name = "fedmedgan"
version = "1.0.0"
description = "Runs the fedmedgan that each party has installed. This bundle carries no code."

[tool.flwr.app]
publisher = "fedmedgan"
fab-include = [
    "README.md",
]

[tool.flwr.app.components]
serverapp = "fedmedgan.server.app:app"
clientapp = "fedmedgan.client.app:app"

[tool.flwr.app.config]
{FOLDER_SETTING} = ""
""".encode()
"""In the form in which Flower writes it into the zip, so that bytes can be compared."""

README = b"""# fedmedgan

This Flower app bundle names the entry points of the installed package fedmedgan and carries no code.
A hospital's gate refuses any other bundle.
"""

FILES = {"pyproject.toml": PYPROJECT, "README.md": README}


def write(folder: Path) -> None:
    """Write the app folder that ``flwr run`` makes the bundle from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)


def check(fab: bytes) -> None:
    """Is this the bundle, and nothing else?

    Args:
        fab: the zip as the hospital's SuperNode received it.

    Raises:
        RunError: RUN_BUNDLE; the text names no content of the bundle.
    """
    if len(fab) > MAX_BYTES:
        raise _refused("it is larger than the one bundle that is accepted")
    try:
        with zipfile.ZipFile(BytesIO(fab)) as archive:
            _check(archive, len(fab))
    except RunError:
        raise
    except Exception:  # whatever a damaged zip makes a parser say
        raise _refused("it is not a zip as Flower makes them") from None


def _check(archive: zipfile.ZipFile, size: int) -> None:
    manifest = "\n".join(f"{name},{hashlib.sha256(data).hexdigest()},{len(data) * 8}" for name, data in FILES.items())
    expected = {**FILES, ".info/CONTENT": manifest.encode()}
    members = archive.infolist()
    if sorted(member.filename for member in members) != sorted(expected):
        raise _refused("it holds other files than the bundle that only names the installed package")
    headers = sum(30 + 46 + 2 * len(member.filename) + member.compress_size for member in members)
    if headers + 22 != size:  # local headers, data, central directory and its end leave no room for anything else
        raise _refused("it holds bytes outside its files")
    for member in members:
        content = expected[member.filename]
        if member.file_size != len(content) or archive.read(member) != content:
            raise _refused(f"its {member.filename} is not the one that names the installed package")


def _refused(what: str) -> RunError:
    return RunError("RUN_BUNDLE", what, "Flower app bundle")
