"""The writing of a request's files, and the decision about files that another process wrote meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial

import torch

from errors import OutputDirNotWritable
from latent_encoder.access import AllowedFolders
from latent_encoder.comfy_runtime import ComfyRuntime
from latent_encoder.outputs.bucket import open_bucket_folder
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.drawing import Drawn, Undrawn
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.outputs.files import PUBLISHING, WRITING, StagedFiles, Writers
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.metadata import latent_facts, metadata_of
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.objects import StagedObjects
from latent_encoder.outputs.owners import metadata_in, owners_of, refuse_files_of_another
from latent_encoder.outputs.places import Folder, open_place, staged_in
from latent_encoder.outputs.png import png_bytes
from latent_encoder.outputs.preview import preview_png
from latent_encoder.outputs.publications import Publications
from latent_encoder.outputs.run_requests import source_id_of
from latent_encoder.outputs.staging import Staging
from latent_encoder.outputs.stored_responses import StoredFiles, parsed, stored_in, success_response
from latent_encoder.outputs.wanted import Wanted
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.telemetry.steps import timed
from models import EncodeRequest, Metadata, SuccessResponse


class Publishing:
    """The last stage of an encode, for requests of any folder. Each method may be called from any thread."""

    def __init__(self, runtime: ComfyRuntime, wanted: Wanted, allowed: AllowedFolders, clock: Callable[[], datetime]) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self._allowed = allowed
        self._clock = clock
        self._own = Publications()

    def write(self, encoded: Encoded) -> SuccessResponse:
        """Write the latent, the scaled image, the preview and the roundtrip image if they are set, and last the metadata.

        If another process wrote the files of this request meanwhile, these stay, and the response is theirs.

        Raises:
            AccessDenied, InvalidRequest, OutputDirNotWritable: the files cannot be written. None of them is left behind.
        """
        files = encoded.prepared.files
        with (
            _writers_in(files),
            open_place(files.folder, self._allowed) as folder,
            staged_in(folder, files.shared_name) as staged,
        ):
            return self._publish(staged, encoded.prepared, self._stage(encoded, staged))

    def write_later(self, encoded: Encoded) -> Callable[[], SuccessResponse] | None:
        """Return a call that writes the files as `write` does, if their place is a bucket; None if it is on disk.

        The call has the bytes of the files, and not the pixels. It only waits, so several may run side by side.

        Raises:
            AccessDenied, OutputDirNotWritable: the files cannot be written.
        """
        files = encoded.prepared.files
        if not isinstance(files.folder, ObjectPath):
            return None
        folder = open_bucket_folder(files.folder, self._allowed)
        staged = StagedObjects(folder, files.shared_name)
        metadata = self._stage(encoded, staged)
        prepared = replace(encoded.prepared, scaled=torch.empty(0))

        def written() -> SuccessResponse:
            with PUBLISHING, staged:
                return self._publish(staged, prepared, metadata)

        return written

    def _stage(self, encoded: Encoded, staged: StagedFiles | StagedObjects) -> Metadata:
        """Make the files except the metadata, and return those."""
        prepared, files, comparison = encoded.prepared, encoded.prepared.files, encoded.comparison
        with timed(prepared.timings, "save"):
            scaled_image = png_bytes(prepared.scaled)
            facts = latent_facts(encoded, self._runtime, scaled_image)
            latent = latent_bytes(
                encoded.image.latent,
                prepared.request.latent_format,
                frames=prepared.vae.cells.frames,
                header=facts.model_dump(),
            )
            preview = preview_png(self._runtime, encoded) if self._wanted.preview else None
            staged.add(files.latent.name, latent)
            staged.add(files.scaled_image.name, scaled_image)
            staged.add_or_remove(files.preview.name, preview)
            staged.add_or_remove(files.roundtrip.name, comparison.png if comparison is not None else None)
        return metadata_of(encoded, facts, latent, preview, self._clock())

    def _publish(self, staged: StagedFiles | StagedObjects, prepared: Prepared, metadata: Metadata) -> SuccessResponse:
        """Publish staged files, and return the response that has their metadata, or those that must stay."""
        request, files = prepared.request, prepared.files
        stored = self._published(staged, files, metadata, partial(self._stored_meanwhile, staged.folder, prepared))
        if stored is not None:
            return success_response(request, files, stored.metadata, stored.whole)
        return success_response(request, files, metadata, self._wanted.files(files))

    def _published(
        self,
        staged: StagedFiles | StagedObjects,
        files: OutputFiles,
        metadata: Metadata,
        instead: Callable[[Mapping[str, bytes]], StoredFiles | None],
        *,
        adding: bool = False,
    ) -> StoredFiles | None:
        """Add the metadata as the last file, and publish all of them unless `instead` has files that must stay.

        It gets the contents of the metadata files that are there, of all formats, when nobody else publishes.
        """
        described = metadata.model_dump_json(indent=2).encode() + b"\n"
        staged.add(files.metadata.name, described)

        def decided() -> StoredFiles | None:
            there = staged.folder.contents(files.metadata_of_all_formats)
            stored = instead(there)
            if stored is None:
                _respect_other_formats(staged, files, metadata, there)
            return stored

        with self._own.publishing(files.metadata, checksum(described)):
            return staged.publish(decided, adding=adding)

    def _stored_meanwhile(self, folder: Folder, prepared: Prepared, there: Mapping[str, bytes]) -> StoredFiles | None:
        """Return the files that this request's names have and that must stay; None if there are none.

        `there` are the contents of their metadata files.

        Files that were there before the preparation are replaced, as those of this process are. Files that another process
        published since may be those of a response that was sent: for example, this process was stopped, and its partition has
        gone to another worker.

        Raises:
            InvalidRequest: they are those of another request id.
            OutputDirNotWritable: they must stay, but are of another input.
        """
        request, files = prepared.request, prepared.files
        refuse_files_of_another(files, owners_of(there), request.request_id, source_id_of(request), prepared.image_sha256)
        stored = stored_in(folder, files, there.get(files.metadata.name))
        if stored is None or not stored.complete:
            return None
        if stored.are_of_record(prepared.origin):
            return stored
        replaceable = stored.metadata_sha256 == prepared.replaceable
        if self._wanted.answered_by(stored, prepared.fingerprint) and not (replaceable and prepared.origin is None):
            return stored
        if replaceable or self._own.has(files.metadata, stored.metadata_sha256):
            return None
        raise _others_were_written(request, files)

    def add_images(self, drawn: Drawn) -> SuccessResponse:
        """Write the images that were made of a stored latent, and the metadata with their checksums. The latent stays.

        Raises:
            AccessDenied, OutputDirNotWritable: the files cannot be written, or the latent was replaced meanwhile.
        """
        request, files = drawn.undrawn.request, drawn.undrawn.stored.files
        decoded = drawn.comparison.png if drawn.comparison is not None else None
        images = {files.preview: drawn.preview, files.roundtrip: decoded}
        with (
            _writers_in(files),
            open_place(files.folder, self._allowed) as folder,
            staged_in(folder, files.shared_name) as staged,
        ):
            there = metadata_in(folder, files.metadata.name)
            stored = self._still_stored(folder, drawn.undrawn, there)  # another process may have added the other image
            for path, data in images.items():
                if data is not None:
                    staged.add(path.name, data)
            metadata = drawn.described(stored.metadata)
            meanwhile = partial(self._added_meanwhile, folder, drawn.undrawn, stored)
            newer = self._published(staged, files, metadata, meanwhile, adding=True)
            if newer is not None:
                return success_response(request, files, newer.metadata, newer.whole)
        return success_response(request, files, metadata, stored.whole | {path for path, data in images.items() if data})

    def _still_stored(self, folder: Folder, undrawn: Undrawn, metadata: bytes | None) -> StoredFiles:
        """Return the stored files as they are now. `metadata` are the bytes of their file; None if there is none.

        Raises:
            OutputDirNotWritable: they are no longer those of the latent of which the images were made.
        """
        files = undrawn.stored.files
        stored = stored_in(folder, files, metadata)
        if stored is None or not stored.complete or stored.metadata.latent_sha256 != undrawn.stored.metadata.latent_sha256:
            raise _others_were_written(undrawn.request, files)
        return stored

    def _added_meanwhile(
        self, folder: Folder, undrawn: Undrawn, described: StoredFiles, there: Mapping[str, bytes]
    ) -> StoredFiles | None:
        """Return the files to which another process added the same images; None if they are still the `described` ones.

        Raises:
            OutputDirNotWritable: they are others.
        """
        stored = self._still_stored(folder, undrawn, there.get(described.files.metadata.name))
        if stored.metadata_sha256 == described.metadata_sha256:
            return None
        if self._wanted.files(stored.files) <= stored.whole:
            return stored
        raise _others_were_written(undrawn.request, stored.files)


def _respect_other_formats(staged: Staging, files: OutputFiles, metadata: Metadata, there: Mapping[str, bytes]) -> None:
    """Keep the metadata of the request's latents in other formats true, although these share the images that are published.

    Metadata that describe other images are removed first. If they describe the same ones, those that they name stay. `there`
    are the contents of the metadata files.
    """
    published = metadata.sha256_by_file
    for name, data in there.items():
        other = parsed(data)
        if other is None or name == files.metadata.name:
            continue
        images = {kind: sha256 for kind, sha256 in other.sha256_by_file.items() if kind != "latent"}
        if any(published.get(kind, sha256) != sha256 for kind, sha256 in images.items()):
            staged.remove_first(name)
        else:
            for kind in images:
                staged.keep(getattr(files, kind).name)


def _writers_in(files: OutputFiles) -> Writers:
    return PUBLISHING if isinstance(files.folder, ObjectPath) else WRITING


def _others_were_written(request: EncodeRequest, files: OutputFiles) -> OutputDirNotWritable:
    return OutputDirNotWritable(
        f"Cannot write to output folder: {files.folder} (another process has written other files of the request "
        f"{request.request_id!r} meanwhile, {files.metadata.name} among them; send the request again to replace them)"
    )
