"""The names of files: safe, within the limits, and different for different requests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import get_args
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.files import prepare_output_folder
from latent_encoder.outputs.names import OutputFiles, output_files, safe_id, safe_name
from models import IMAGE_FILES, FileFormat

PLACE = "/tmp"  # noqa: S108  # nothing is written there

PARTS = st.text("aB0_-.é/", min_size=1, max_size=6)
LIKE_CHECKSUMS = st.builds(lambda text: f"{text}-{hashlib.sha256(text.encode()).hexdigest()[:16]}", PARTS)
LONG = st.builds(lambda text, length: (text * 200)[:length], PARTS, st.integers(90, 160))
IDS = st.one_of(PARTS, LIKE_CHECKSUMS, LONG, st.uuids().map(str), st.text(min_size=1))
STEMS = st.one_of(PARTS, LONG).filter(lambda text: Path(f"{text}.png").stem == text)


def all_names(stem: str, request_id: str, latent_format: FileFormat = "pt") -> set[str]:
    files = output_files(PLACE, f"{stem}.png", request_id, latent_format)
    return {path.name for path in (files.latent, files.metadata, *(getattr(files, name) for name in IMAGE_FILES))}


@given(STEMS, IDS, STEMS, IDS, st.sampled_from(get_args(FileFormat)), st.sampled_from(get_args(FileFormat)))
@example("photo", "a_b", "photo_a", "b", "pt", "pt")
@example("photo_a", "b-0123456789abcdef", "photo", "a_b-0123456789abcdef", "pt", "comfy")
@example("x", "a/b", "x", safe_id("a/b", 115), "pt", "pt")
@example("x_y", "a", "x", safe_id("y_a", 115), "pt", "pt")
@example("a/b", "1", safe_name("a/b", 115), "1", "pt", "pt")
def test_requests_with_different_ids_share_no_file(
    stem: str, request_id: str, other_stem: str, other_id: str, first: FileFormat, second: FileFormat
) -> None:
    """Whatever the stems and the formats, no file of one request id has the name of another's."""
    shared = all_names(stem, request_id, first) & all_names(other_stem, other_id, second)
    assert not shared or request_id == other_id


@given(st.text("ab_-/", min_size=3, max_size=9))
def test_one_text_is_split_in_one_way(text: str) -> None:
    """Pairs that give the same text when an underscore joins them have different names."""
    pairs = [(text[:n], text[n + 1 :]) for n, character in enumerate(text) if character == "_" and 0 < n < len(text) - 1]
    names = {f"{safe_name(stem, 100)}_{safe_id(request_id, 100)}" for stem, request_id in pairs}
    assert len(names) == len(pairs)


@given(STEMS, st.uuids())
def test_uuid_stays_in_the_names(stem: str, request_id: UUID) -> None:
    """A UUID is the text after the last underscore, in lower and upper case."""
    for written in (str(request_id), str(request_id).upper()):
        unique = output_files(PLACE, f"{stem}.png", written).latent.stem
        assert unique == f"latent_{safe_name(stem, 115)}_{written}"


def test_id_with_an_underscore_has_sixteen_digits_of_its_checksum(tmp_path: Path) -> None:
    """`photo` with `a_b` and `photo_a` with `b` had the same files before."""
    checksum = hashlib.sha256(b"a_b").hexdigest()[:16]
    assert output_files(str(tmp_path), "photo.jpg", "a_b").latent.name == f"latent_photo_a_b-{checksum}.pt"
    assert output_files(str(tmp_path), "photo_a.png", "b").latent.name == "latent_photo_a_b.pt"


@given(STEMS, IDS, st.sampled_from(get_args(FileFormat)))
def test_files_are_found_by_the_latents_name(stem: str, request_id: str, latent_format: FileFormat) -> None:
    """The path of the latent is enough to find the other files."""
    files = output_files(PLACE, f"{stem}.png", request_id, latent_format)
    assert OutputFiles.of(files.latent) == files


@given(st.text(), st.integers(10, 255))
def test_safe_name_is_safe_and_short(text: str, limit: int) -> None:
    """A safe name has only letters, digits, dot, underscore and dash, within the limit."""
    safe = safe_name(text, limit)
    assert len(safe) <= limit
    assert all(character.isascii() and (character.isalnum() or character in "._-") for character in safe)


@given(st.text(), st.text())
def test_different_texts_keep_different_names(first: str, second: str) -> None:
    """A checksum distinguishes texts whose safe characters are equal."""
    assert (safe_name(first, 100) == safe_name(second, 100)) == (first == second)


@given(st.from_regex(r"[A-Za-z0-9._-]{1,50}", fullmatch=True))
def test_harmless_text_stays_as_it_is(text: str) -> None:
    """A usual stem or UUID stays recognisable."""
    assert safe_name(text, 100) == text


def test_names_are_those_of_the_contract(tmp_path: Path) -> None:
    """`latent_<stem>_<request_id>.pt`, `scaled_image_<stem>_<request_id>.png`, `<latent file name>.json`."""
    files = output_files(str(tmp_path), "/data/photo.final.jpg", "123-abc")
    assert files.latent == tmp_path / "latent_photo.final_123-abc.pt"
    assert files.scaled_image == tmp_path / "scaled_image_photo.final_123-abc.png"
    assert files.metadata == tmp_path / "latent_photo.final_123-abc.pt.json"


def test_changed_name_has_eight_digits_of_its_checksum(tmp_path: Path) -> None:
    """A name that file systems or shells cannot handle is made safe, and stays unique."""
    checksum = hashlib.sha256("写真 1".encode()).hexdigest()[:8]
    assert output_files(str(tmp_path), "写真 1.png", "a/../b").latent.name.startswith(f"latent____1-{checksum}_a_.._b-")


def test_longest_names_can_be_written(tmp_path: Path) -> None:
    """A stem and an id of any length give names that the file system takes."""
    files = output_files(str(tmp_path / "not" / "yet" / "there"), "s" * 5000 + ".png", "r" * 5000)
    prepare_output_folder(files.folder, ANYWHERE, 0)
    for path in (files.latent, files.scaled_image, files.metadata):
        path.touch()
        assert len(path.name) <= os.pathconf(tmp_path, "PC_NAME_MAX")


def test_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path starts at the working folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("./output", "output/there/..", f"/{tmp_path}/there/../output"):
        assert output_files(folder, "x.png", "1").latent == tmp_path / "output" / "latent_x_1.pt"
