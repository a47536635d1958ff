"""Mistakes about the whole run, found before ComfyUI is loaded: no image of it could succeed.

Faults in the content of an image, and in a line of a list, are error responses of their own.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import filterfalse
from pathlib import Path
from typing import Any

from config import Settings
from errors import ImageInvalid, ImageNotFound
from latent_encoder.access import AllowedFolders, absolute, place_of
from latent_encoder.admission import refuse_more_megapixels
from latent_encoder.model_files import require_vae
from latent_encoder.outputs.bucket import open_bucket_folder
from latent_encoder.outputs.claims import Claim
from latent_encoder.outputs.folder import reported
from latent_encoder.outputs.locks import key_of
from latent_encoder.requests import parse_request
from latent_encoder.standalone.inputs import STDIN, ImageSelection, refuse_shared_id
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.images import read_from_url
from latent_encoder.storage.locations import ObjectPath, is_url, location_of
from latent_encoder.storage.stores import NoBucket, Unusable, require_packages_for
from utils import custom_node_path, find_path

HOPELESS = (errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that can lead nowhere, whoever follows it."""


def check_run(settings: Settings, selection: ImageSelection, fields: Mapping[str, Any]) -> None:
    """Refuse a run that cannot succeed. Nothing is written, and only the given paths are looked up.

    Args:
        settings: the settings in force.
        selection: the command line's choice of images.
        fields: the request's fields that the command line gives; None for each that it leaves out.

    Raises:
        RequestError: a field, an image's path, the VAE's name or the output folder cannot be used.
        UnusableInputs: one request id is given for several images.
        SetupError: there is no ComfyUI, or no package of CUSTOM_NODES.
    """
    refuse_shared_id(selection, fields)
    image = selection.paths[0] if selection.single else "-"
    request = parse_request({**fields, "image_path": image}, settings.request_defaults)
    refuse_more_megapixels(request, settings)
    outputs = AllowedFolders.of_outputs(settings)
    inputs = AllowedFolders.of_inputs(settings)
    named = selection.named_images
    for path in named:
        inputs.check(path)
    require_packages_for(*selection.paths)
    if writes := _is_used("output_dir", selection, fields):
        outputs.check(request.output_dir)
    tree = find_path(settings.comfyui_path)
    for package in settings.custom_nodes:
        custom_node_path(tree, package)
    if _is_used("vae_model_name", selection, fields):
        require_vae(request.vae_model_name, settings)
    _require_images(named)
    _require_buckets(named, inputs.urls)
    if writes:
        _require_writable(request.output_dir, outputs)


def _is_used(field: str, selection: ImageSelection, fields: Mapping[str, Any]) -> bool:
    """Return whether a field is an option, or a default that an image of the run takes its value from."""
    name = selection.input_list
    if name is None or fields.get(field) is not None:
        return True
    if name == STDIN:
        return False  # its lines are not known yet, and a pipe can be read once only
    try:
        place = Path(name)
        return place.is_file() and any(_leaves_out(field, line) for line in place.read_bytes().splitlines())
    except (OSError, ValueError):
        return False  # reading the list reports it


def _leaves_out(field: str, line: bytes) -> bool:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(request, dict) and request.get(field) is None


def _require_images(paths: Sequence[str]) -> None:
    """Raise an error that names every path that leads nowhere.

    Raises:
        ImageNotFound: a path does not exist.
        ImageInvalid: a path cannot lead anywhere.
    """
    missing = []
    for path in filterfalse(is_url, paths):
        try:
            absolute(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path)
        except OSError as exc:
            if exc.errno in HOPELESS:
                raise ImageInvalid(f"Image file cannot be read: {path} ({exc.strerror})") from exc
    if missing:
        raise ImageNotFound(f"Image file not found: {', '.join(missing)}")


def _require_buckets(urls: Sequence[str], allowed: AllowedUrls) -> None:
    """Read the first image in each bucket, without its bytes: a missing bucket or wrong credentials fail for all of them.

    A missing image is refused if it is the only one, as a file is.

    Raises:
        RequestError: the image cannot be read.
    """
    first: dict[tuple[str, str], str] = {}
    for url in filter(is_url, urls):
        place = location_of(url)
        if isinstance(place, ObjectPath):
            first.setdefault((place.scheme, place.bucket), url)
    for url in first.values():
        try:
            read_from_url(url, allowed, 0)
        except ImageInvalid as exc:
            if isinstance(exc.__context__, Unusable):  # otherwise it has a byte, or none
                raise
        except ImageNotFound as exc:
            if len(urls) == 1 or isinstance(exc.__context__, NoBucket):
                raise


def _require_writable(path: str, allowed: AllowedFolders) -> None:
    """Check that files can be written to the output folder, or that it can be made. Leave nothing there.

    Raises:
        AccessDenied: it is in none of the allowed folders.
        OutputDirNotWritable: it cannot be made or written to.
    """
    place = place_of(path)
    if isinstance(place, ObjectPath):
        require_packages_for(path)
        probe = Claim(open_bucket_folder(place, allowed), key_of(secrets.token_hex(16)))
        probe.take(str(place))
        probe.release()
        return
    with reported(absolute(path)):
        place = allowed.resolve(path)
        existing = _existing_folder(place)
        if existing == place:
            with allowed.open_folder(path):
                pass  # it has to be listed too
        with tempfile.TemporaryFile(dir=existing):
            pass


def _existing_folder(place: Path) -> Path:
    """Return the folder, or the nearest one above it that exists.

    Raises:
        OSError: a file is in the way, or a name is too long.
    """
    for folder in (place, *place.parents):
        try:
            state = folder.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(state.st_mode):
            for name in place.relative_to(folder).parts:
                with suppress(FileNotFoundError):
                    (folder / name).lstat()  # fails if the name is too long for this file system
            return folder
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
