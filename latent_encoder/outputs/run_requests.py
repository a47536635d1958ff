"""Requests of a run over images: ids that are the same in each run, and the names of their files.

A request without an id gets one made of its image's place and of the fields that decide its content. The place of an image in
a folder is its path below that folder, so the id stays if the folder is moved. The place of an image that is named is its
absolute path; earlier versions used that for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from uuid import NAMESPACE_URL, uuid5

from errors import InvalidRequest, in_utf8
from latent_encoder.access import AllowedFolders, absolute
from latent_encoder.outputs.names import OutputFiles, output_files
from latent_encoder.outputs.owners import Owner, owner_in
from latent_encoder.outputs.places import Folder, existing_place
from latent_encoder.outputs.stored_names import StoredNames
from latent_encoder.storage.locations import ObjectPath, WebUrl, is_url, lasting, location_of
from models import CONTENT_FIELDS, EncodeRequest

ALWAYS_IN_IDS = {"vae_model_name", "upscale_method", "megapixels", "latent_format"}
"""The fields that an id is made of, with the image's place: a request that differs in one of them has another id. The other
content fields count only if they are not at their default, because they came later."""


class RunRequest(EncodeRequest):
    """A request of a run, with facts that no sender can give."""

    source_id: str | None = None
    """The id by the absolute path; None if the request was given an id."""
    inside: str | None = None
    """The path below the folder that was given; None if the image itself was named."""
    contested: bool = False
    """An image before it in the run has the same id, because it has the same path below another folder."""
    output_name: str | None = None
    """The part that the names of its files have in common; None for stem and id."""
    unwritten: bool = False
    """A listing of its folder, made when the run began, has none of its files, so nobody looks for them one by one. If another
    process writes them meanwhile, the look under the claim finds them."""

    def with_id(self, request_id: str) -> RunRequest:
        """Return the same request with another id."""
        return self.model_copy(update={"request_id": request_id})


def source_of(image_path: str) -> str:
    """Return the place of an image that is named: its absolute path, or its URL without a signature."""
    if not is_url(image_path):
        return str(absolute(image_path))
    try:
        return lasting(image_path)
    except ValueError:  # the request is refused
        return image_path


def files_of(request: EncodeRequest) -> OutputFiles:
    """Return the paths of a request's files.

    Raises:
        InvalidRequest: no response can hold them.
    """
    name = request.output_name if isinstance(request, RunRequest) else None
    return output_files(request.output_dir, request.image_path, request.request_id, request.latent_format, name)


def may_have_files(request: EncodeRequest) -> bool:
    """Return whether files of the request may be there from before."""
    return not (isinstance(request, RunRequest) and request.unwritten)


def marked(request: RunRequest, names: StoredNames) -> RunRequest:
    """Return the request, marked as unwritten if the output folder has metadata of it in no format and under no id.

    Its names count as written from now on: a later request of the run may get the same.
    """
    others = _other_ids(request) if request.source_id is not None and request.output_name is None else ()
    try:
        files = files_of(request)
        if request.contested or not names.cover(files.folder):
            return request
        if any(names.have_metadata(files_of(each)) for each in (request, *map(request.with_id, others))):
            return request
    except InvalidRequest:  # it gets an error response
        return request
    names.add(files)
    return request.model_copy(update={"unwritten": True})


def source_id_of(request: EncodeRequest) -> str | None:
    return request.source_id if isinstance(request, RunRequest) else None


def lasting_id(place: str, request: EncodeRequest) -> str:
    """Return the id of a request for an image at that place."""
    used = {name for name in CONTENT_FIELDS if getattr(request, name) != EncodeRequest.model_fields[name].default}
    asked = request.model_dump_json(include=ALWAYS_IN_IDS | used)
    return str(uuid5(NAMESPACE_URL, in_utf8(f"{place} {asked}")))


def with_lasting_id(request: EncodeRequest, inside: str | None = None) -> RunRequest:
    """Return the request with an id that is the same for every equal request. `inside` is the path below a folder."""
    source_id = lasting_id(source_of(request.image_path), request)
    request_id = source_id if inside is None else lasting_id(inside, request)
    return RunRequest(**{**request.model_dump(), "request_id": request_id}, source_id=source_id, inside=inside)


def settled(request: RunRequest, allowed: AllowedFolders, image_sha256: Callable[[], str | None]) -> RunRequest:
    """Return the request with the id under which the output folder has its files, or will have them.

    Files that are there for the same image and the same fields keep their id, whichever folder was given then. If its own id
    has the files of another image, from another folder, it gets an id that is made of the image's content too.
    `image_sha256` reads the image; None if that fails.

    Raises:
        AccessDenied: the output folder is none of those that are allowed.
    """
    if request.source_id is None or request.output_name is not None or request.unwritten:
        return request
    try:
        with existing_place(files_of(request).folder, allowed) as folder:
            return _settled_in(folder, request, image_sha256)
    except OSError:  # there is no folder yet
        return _by_content(request, image_sha256()) if request.contested else request


def _settled_in(folder: Folder, request: RunRequest, image_sha256: Callable[[], str | None]) -> RunRequest:
    own = _owner(folder, request)
    if own is not None and own.source_id in (None, request.source_id):
        return request
    for other in map(request.with_id, _other_ids(request)):
        owner = _owner(folder, other)
        if owner is not None and (owner.source_id or other.request_id) == request.source_id:
            return other
    if own is None and not request.contested:
        return request
    sha256 = image_sha256()
    return request if own is not None and own.image_sha256 == sha256 else _by_content(request, sha256)


def _owner(folder: Folder, request: RunRequest) -> Owner | None:
    return owner_in(folder, files_of(request).metadata.name)


def _other_ids(request: RunRequest) -> Iterator[str]:
    """Yield the other ids that the image may have: by its absolute path, and by its path below each folder above it."""
    try:
        place = location_of(request.image_path) if is_url(request.image_path) else absolute(request.image_path)
    except ValueError:  # the request is refused
        return
    if isinstance(place, WebUrl):
        return
    # A bucket has no folder above it.
    above = (str(place),) if isinstance(place, ObjectPath) else ()
    parts = place.parts[2:] if isinstance(place, ObjectPath) else place.parts
    places = (*above, *(str(PurePosixPath(*parts[number:])) for number in range(len(parts))))
    yield from (other for place in places if (other := lasting_id(place, request)) != request.request_id)


def _by_content(request: RunRequest, image_sha256: str | None) -> RunRequest:
    """Return the request with an id that two images share only if their content is the same; else by the absolute path."""
    place = source_of(request.image_path) if image_sha256 is None else f"{image_sha256} {request.inside}"
    return request.with_id(lasting_id(place, request))
