"""The one Flower app bundle: Flower's own builder makes it from our folder, and nothing else passes."""

from __future__ import annotations

import zipfile
from io import BytesIO

import pytest
from flwr.cli.build import build_fab_from_disk, build_fab_from_files
from flwr.common.config import get_fab_config, validate_config
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmedgan.shared import bundle
from fedmedgan.shared.errors import RunError

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's own


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("app") / "fedmedgan"
    bundle.write(folder)
    return build_fab_from_disk(folder)


def members(fab: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(fab)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def refused(fab: bytes) -> str:
    with pytest.raises(RunError) as caught:
        bundle.check(fab)
    assert caught.value.code == "RUN_BUNDLE"
    return caught.value.what


def test_what_flower_makes_from_our_folder_is_accepted_and_names_the_installed_package(honest):
    bundle.check(honest)
    config = get_fab_config(honest)
    components = config["tool"]["flwr"]["app"]["components"]
    assert components == {"serverapp": "fedmedgan.server.app:app", "clientapp": "fedmedgan.client.app:app"}
    assert config["tool"]["flwr"]["app"]["config"] == {bundle.FOLDER_SETTING: ""}
    valid, errors, _ = validate_config(config, check_module=True)
    assert valid, errors


def test_how_it_is_compressed_does_not_matter(honest):
    bundle.check(packed(members(honest), zipfile.ZIP_STORED))


@pytest.mark.parametrize("name", ["fedmedgan/__init__.py", "fedmedgan/client/app.py", "x.py", "data.json", "LICENSE"])
def test_flowers_own_bundle_with_one_file_more_is_refused(name):
    pyproject = bundle.PYPROJECT.replace(b'    "README.md",\n', b'    "README.md",\n    "**/*",\n')
    fab, _ = build_fab_from_files({**bundle.FILES, "pyproject.toml": pyproject, name: b"x = 1\n"})
    assert name in members(fab)
    assert "other files" in refused(fab)


@pytest.mark.parametrize("name", ["../evil.py", "/etc/evil", "C:\\evil", "./README.md", "README.md/", ".info/more"])
def test_names_that_leave_the_folder_or_hide_are_refused(honest, name):
    assert "other files" in refused(packed(members(honest) | {name: b""}))


def test_another_pyproject_is_refused(honest):
    other = members(honest)
    other["pyproject.toml"] = other["pyproject.toml"].replace(b"fedmedgan.client.app:app", b"fedmedgan.client.xpp:app")
    assert "pyproject.toml" in refused(packed(other))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(honest):
    buffer = BytesIO(honest)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("README.md", b"second")
    assert "other files" in refused(buffer.getvalue())


def test_a_missing_file_is_refused(honest):
    files = members(honest)
    for name in files:
        refused(packed({n: content for n, content in files.items() if n != name}))


def test_a_bomb_is_refused_before_it_is_inflated(honest):
    other = members(honest)
    other["README.md"] = bytes(30_000_000)
    fab = packed(other)
    assert len(fab) < bundle.MAX_BYTES
    assert "README.md" in refused(fab)
    assert "larger" in refused(packed(other, zipfile.ZIP_STORED))


def test_bytes_outside_the_files_are_refused(honest):
    refused(b"#!/bin/sh\n" + honest)
    refused(honest + b"more")
    with zipfile.ZipFile(BytesIO(honest)) as archive:
        middle = archive.start_dir
    buffer = BytesIO(honest)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"a comment"
    refused(buffer.getvalue())
    refused(honest[:middle] + b"hidden" + honest[middle:])


@pytest.mark.parametrize("fab", [b"", b"PK", b"not a zip" * 100, bytes(1 << 17)])
def test_what_is_no_zip_is_refused(fab):
    refused(fab)


@settings(deadline=None, max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_what_is_read(honest, place, bit):
    """Either the bundle is refused, or what anybody would unpack from it is what the honest one holds."""
    flipped = bytearray(honest)
    flipped[int(place * len(flipped))] ^= 1 << bit
    try:
        bundle.check(bytes(flipped))
    except RunError as error:
        assert error.code == "RUN_BUNDLE"
    else:
        assert members(bytes(flipped)) == members(honest)
