"""The pipeline: a request goes in, its files and a response come out.

A process makes one `LatentEncoder` and uses it for many requests, from any thread.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from config import Settings
from errors import ImageNotFound, OutputDirNotWritable, RequestError, SetupError, as_request_error
from latent_encoder.access import AllowedFolders, place_of
from latent_encoder.admission import admit
from latent_encoder.comfy_runtime import ComfyRuntime, load_runtime
from latent_encoder.cpus import most_prepared, prepare_threads
from latent_encoder.geometry import Size, cropped, size_of
from latent_encoder.images.judging import JUDGES
from latent_encoder.images.loading import load_image
from latent_encoder.images.pixel_budget import PixelBudget
from latent_encoder.images.scaling import scale_image
from latent_encoder.images.source import ImageFile, ImageLimits
from latent_encoder.outputs.bucket import open_bucket_folder
from latent_encoder.outputs.checksums import checksum
from latent_encoder.outputs.drawing import Drawn, Undrawn, read_tensors
from latent_encoder.outputs.encoded import Encoded, Prepared
from latent_encoder.outputs.fetched import Fetched
from latent_encoder.outputs.files import PUBLISHING, WRITING, StagedFiles, Writers, space_needed
from latent_encoder.outputs.holds import hold, renewed
from latent_encoder.outputs.latent_files import latent_bytes
from latent_encoder.outputs.leftovers import Leftovers
from latent_encoder.outputs.metadata import fingerprint, latent_facts, metadata_of, of_tiles
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.objects import StagedObjects
from latent_encoder.outputs.owners import owners_in, refuse_files_of_another
from latent_encoder.outputs.places import Folder, open_place, prepare_place, staged_in
from latent_encoder.outputs.png import png_bytes
from latent_encoder.outputs.preview import preview_png
from latent_encoder.outputs.publications import Publications
from latent_encoder.outputs.roundtrip import compare
from latent_encoder.outputs.run_requests import RunRequest, files_of, may_have_files, settled, source_id_of
from latent_encoder.outputs.stored_responses import Found, StoredFiles, stored_in, success_response
from latent_encoder.storage.locations import ObjectPath
from latent_encoder.storage.stores import require_packages_for
from latent_encoder.telemetry.logs import get_logger, log_failure
from latent_encoder.telemetry.steps import timed
from latent_encoder.torch_threads import encode_threads
from latent_encoder.trial import try_nodes
from latent_encoder.vae.cache import VaeCache
from latent_encoder.vae.encoding import encode_image
from latent_encoder.vae.freed_memory import share_one_heap
from latent_encoder.vae.gpu import pinned
from latent_encoder.vae.loaded_vae import LoadedVae
from latent_encoder.vae.model_folders import search_model_folders
from latent_encoder.vae.precision import warn_of_slow_precision
from models import EncodeRequest, ErrorResponse, Metadata, Response, SuccessResponse, Timings

log = get_logger("latent_encoder")

WARMUP_SIDE = 256
"""Pixels a side of the image that the warm-up encodes: small, because the first encode is slow at any size."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class LatentEncoder:
    """ComfyUI's runtime, the loaded VAEs, and the steps from a request to its response."""

    def __init__(self, settings: Settings, runtime: ComfyRuntime, clock: Callable[[], datetime] = utc_now) -> None:
        self._settings = settings
        self.runtime = runtime
        self._clock = clock
        self._images = ImageLimits.of(settings)
        self._loading = PixelBudget(settings.max_image_pixels)
        self._outputs = AllowedFolders.of_outputs(settings)
        self._leftovers = Leftovers(self._outputs)
        self._own = Publications()
        self.vaes = VaeCache(runtime, settings)
        self.prepare_threads = prepare_threads(settings)
        """The count of threads that may call `prepare` at the same time."""
        self.most_prepared = most_prepared(settings)
        """The count of images whose pixels may be in memory at the same time."""
        self.tried_nodes: tuple[str, ...] = ()
        """Ids of the ComfyUI nodes that ran on a test image during `set_up`."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions and device, by the names of a metric's labels."""
        return {
            "comfyui_version": self.runtime.version,
            "torch_version": torch.__version__,
            "device": self.runtime.device,
        }

    @classmethod
    def set_up(cls, settings: Settings) -> LatentEncoder:
        """Load ComfyUI as the settings say, and try its nodes on a small image.

        Raises:
            SetupError: ComfyUI is missing, lacks a node or a package, fails on the image, or cannot run on the device.
        """
        require_packages_for(settings.output_dir, *(settings.allowed_input_urls or ()), *(settings.allowed_output_urls or ()))
        JUDGES.start()  # it is ready when ComfyUI is
        share_one_heap()
        torch.set_num_threads(settings.torch_num_threads or encode_threads())
        runtime = load_runtime(settings.comfyui_path, settings.device, settings.vae_precision, settings.custom_nodes)
        warn_of_slow_precision(settings.vae_precision, runtime.device)
        search_model_folders(runtime, settings.model_dir)
        Image.MAX_IMAGE_PIXELS = settings.max_image_pixels  # LoadImage applies the same limit
        encoder = cls(settings, runtime)
        with runtime.contained():
            encoder.tried_nodes = try_nodes(runtime)
            log.debug("comfyui encodes", version=runtime.version, nodes=encoder.tried_nodes, decoder=runtime.decoder)
        return encoder

    def respond(self, request: EncodeRequest) -> Response:
        """Encode the request's image and return the response. Every failure is logged and becomes an error response."""
        try:
            return self.encode(request)
        except Exception as exc:
            error = as_request_error(exc)
            log_failure(error, request_id=request.request_id)
            return ErrorResponse.of(error, request.request_id, self._clock())

    def encode(self, request: EncodeRequest) -> SuccessResponse:
        """Load the VAE, load the image, scale it, encode it, and write the files.

        Raises:
            RequestError: a step failed; the class says which. No file is left behind.
        """
        response = self.write(self.encode_prepared(self.prepare(request)))
        timings = response.metadata.timings_ms.model_dump()
        log.info("request encoded", request_id=request.request_id, latent=response.latent_file_path, **timings)
        return response

    def warm_up(self) -> None:
        """Load the default VAE and encode a grey image, so that the first request waits for neither.

        Raises:
            SetupError: one of them fails. Every request that names no VAE would fail the same way.
        """
        try:
            vae = self.vaes.get(self._settings.vae_model_name)
            with torch.inference_mode():
                encode_image(self.runtime, vae, torch.full((1, WARMUP_SIDE, WARMUP_SIDE, 3), 0.5), self._settings.oom_policy)
        except RequestError as exc:
            raise SetupError(
                f"The warm-up failed: {exc} VAE_MODEL_NAME names the VAE. "
                "If every request names a VAE, WARMUP=false starts without one."
            ) from exc

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed processes from OUTPUT_DIR. In other folders it happens at their first use."""
        self._leftovers.remove(place_of(self._settings.output_dir))

    # The stages of `encode`. Each may run in its own thread, while the other stages work on other requests.

    def fetch(self, request: EncodeRequest, *, reuse: bool = True) -> Fetched:
        """Read ahead the image behind a URL, and the metadata of earlier files in a bucket. Nothing on disk is read.

        With `reuse`, the request may get a stored response.

        Raises:
            RequestError: the request is not allowed, or the bucket of the files cannot be read.
        """
        fetched = self._unread(request)
        fetched.read_ahead(reuse=reuse)
        return fetched

    def _unread(self, request: EncodeRequest) -> Fetched:
        """Return a request of which nothing is read yet.

        Raises:
            RequestError: the request is not allowed.
        """
        admit(request, self._settings, self.runtime, self._images.folders, self._outputs)
        found = Found(files_of(request), self._outputs, absent=not may_have_files(request))
        return Fetched(request, found, ImageFile(request.image_path, self._images))

    def prepare(self, request: EncodeRequest, origin: str | None = None, fetched: Fetched | None = None) -> Prepared:
        """Load the VAE, load the image, scale it, and check that the output folder can be written to.

        `origin` is the identity of the Kafka record that holds the request: topic id, partition and offset. `fetched` is the
        request as `fetch` returned it.

        Raises:
            RequestError: a step failed; the class says which.
        """
        fetched = fetched or self._unread(request)
        files, owners, replaceable = fetched.found.files, fetched.found.owners, fetched.found.replaceable
        timings = dict.fromkeys(Timings.model_fields, 0.0)
        with torch.inference_mode(), ExitStack() as memory:
            with timed(timings, "load_vae"):
                vae = self.vaes.get(request.vae_model_name)
            with timed(timings, "load_image"):
                source = fetched.image.checked()
                memory.enter_context(self._loading.share(source.size.pixels))
                image = load_image(self.runtime, request.image_path, source, request.alpha)
            timings["load_image"] = round(timings["load_image"] + fetched.image.ahead_s * 1000, 1)
            with timed(timings, "scale"):
                scaled = pinned(scale_image(self.runtime, image.pixels, request, vae.cells.factor), vae.vae.device)
        prepare_place(files.folder, self._outputs, self._space_needed(size_of(scaled), vae, request))
        refuse_files_of_another(files, owners, request.request_id, source_id_of(request), image.sha256)
        self._leftovers.remove(files.folder)
        return Prepared(
            request=request,
            files=files,
            vae=vae,
            origin=origin,
            replaceable=replaceable,
            fingerprint=fingerprint(request, files.latent.name, image.sha256, vae, self.runtime),
            image_sha256=image.sha256,
            image_notes=image.notes,
            colour_error=image.colour_error,
            original=size_of(image.pixels),  # the pixels are not kept: those of a large photo would fill memory meanwhile
            scaled=scaled,
            timings=timings,
        )

    def encode_prepared(self, prepared: Prepared) -> Encoded:
        """Encode the scaled image. If ROUNDTRIP is set, decode the latent and compare it with the image too.

        Raises:
            EncodingFailed: the VAE gave no usable latent or image, or memory ran out.
        """
        vae, scaled, comparison = prepared.vae, prepared.scaled, None
        with torch.inference_mode():
            with timed(prepared.timings, "encode"):
                image = encode_image(self.runtime, vae, scaled, self._settings.oom_policy)
            if self._settings.roundtrip:
                with timed(prepared.timings, "roundtrip"):
                    comparison = compare(self.runtime, vae, image.latent, cropped(scaled, image.crop))
        return Encoded(prepared, image, comparison)

    def write(self, encoded: Encoded) -> SuccessResponse:
        """Write the latent, the scaled image, the preview and the roundtrip image if they are set, and last the metadata.

        If another process wrote the files of this request meanwhile, these stay, and the response is theirs.

        Raises:
            AccessDenied, InvalidRequest, OutputDirNotWritable: the files cannot be written. None of them is left behind.
        """
        files = encoded.prepared.files
        with (
            _writers_in(files),
            open_place(files.folder, self._outputs) as folder,
            staged_in(folder, files.shared_name) as staged,
        ):
            return self._publish(folder, staged, encoded.prepared, self._stage(encoded, staged))

    def write_later(self, encoded: Encoded) -> Callable[[], SuccessResponse] | None:
        """Return a call that writes the files as `write` does, if their place is a bucket; None if it is on disk.

        The call has the bytes of the files, and not the pixels. It only waits, so several may run side by side.

        Raises:
            AccessDenied, OutputDirNotWritable: the files cannot be written.
        """
        files = encoded.prepared.files
        if not isinstance(files.folder, ObjectPath):
            return None
        folder = open_bucket_folder(files.folder, self._outputs)
        staged = StagedObjects(folder, files.shared_name)
        metadata = self._stage(encoded, staged)
        prepared = replace(encoded.prepared, scaled=torch.empty(0))

        def written() -> SuccessResponse:
            with PUBLISHING, staged:
                return self._publish(folder, staged, prepared, metadata)

        return written

    def _stage(self, encoded: Encoded, staged: StagedFiles | StagedObjects) -> Metadata:
        """Make the files, and return their metadata. These are the last file."""
        prepared, files, comparison = encoded.prepared, encoded.prepared.files, encoded.comparison
        with timed(prepared.timings, "save"):
            scaled_image = png_bytes(prepared.scaled)
            facts = latent_facts(encoded, self.runtime, scaled_image)
            latent = latent_bytes(
                encoded.image.latent,
                prepared.request.latent_format,
                frames=prepared.vae.cells.frames,
                header=facts.model_dump(),
            )
            preview = preview_png(self.runtime, encoded) if self._settings.preview else None
            staged.add(files.latent.name, latent)
            staged.add(files.scaled_image.name, scaled_image)
            staged.add_or_remove(files.preview.name, preview)
            staged.add_or_remove(files.roundtrip.name, comparison.png if comparison is not None else None)
        metadata = metadata_of(encoded, facts, latent, preview, self._clock())
        staged.add(files.metadata.name, _described(metadata))
        return metadata

    def _publish(
        self, folder: Folder, staged: StagedFiles | StagedObjects, prepared: Prepared, metadata: Metadata
    ) -> SuccessResponse:
        """Publish staged files, and return the response that has their metadata, or those that must stay."""
        request, files = prepared.request, prepared.files
        with self._own.publishing(files.metadata, checksum(_described(metadata))):
            stored = staged.publish(partial(self._stored_meanwhile, folder, prepared))
        if stored is not None:
            return success_response(request, files, stored.metadata, stored.whole)
        return success_response(request, files, metadata, self._wanted(files))

    def _stored_meanwhile(self, folder: Folder, prepared: Prepared) -> StoredFiles | None:
        """Return the files that this request's names have and that must stay; None if there are none. Nobody publishes now.

        Files that were there before the preparation are replaced, as those of this process are. Files that another process
        published since may be those of a response that was sent: for example, this process was stopped, and its partition has
        gone to another worker.

        Raises:
            InvalidRequest: they are those of another request id.
            OutputDirNotWritable: they must stay, but are of another input.
        """
        request, files = prepared.request, prepared.files
        owners = owners_in(folder, files)
        refuse_files_of_another(files, owners, request.request_id, source_id_of(request), prepared.image_sha256)
        stored = stored_in(folder, files)
        if stored is None or not stored.complete:
            return None
        if stored.are_of_record(prepared.origin):
            return stored
        replaceable = stored.metadata_sha256 == prepared.replaceable
        if self._answers(stored, prepared.fingerprint) and not (replaceable and prepared.origin is None):
            return stored
        if replaceable or self._own.has(files.metadata, stored.metadata_sha256):
            return None
        raise _others_were_written(request, files)

    def settled(self, request: EncodeRequest) -> EncodeRequest:
        """Return the request with the id of its files: a request of a run may find them under another one.

        Raises:
            RequestError: the request is not allowed, or the image cannot be read.
        """
        if not isinstance(request, RunRequest):
            return request
        admit(request, self._settings, self.runtime, self._images.folders, self._outputs)
        image = ImageFile(request.image_path, self._images)
        return settled(request, self._outputs, partial(_checksum_if_there, image))

    def stored_response(
        self, request: EncodeRequest, origin: str | None = None, fetched: Fetched | None = None
    ) -> SuccessResponse | None:
        """Return the response that this request got before, if its files are still there, whole and of this input.

        Checksums decide if the files are whole. They are of this input if they were written for the same record, the one with
        this `origin`: then image and VAE are not read, because they may have changed since. Otherwise the fingerprint in the
        metadata decides, and all files asked for now must be there. An image that is gone counts as unchanged, because the
        sender may remove it after the first response. A preview or roundtrip image of the earlier run is named if it is whole,
        even if it is not asked for now. `fetched` is the request as `fetch` returned it.

        Raises:
            RequestError: the request is not allowed, or the image or the VAE cannot be read.
        """
        fetched = fetched or self._unread(request)
        files, stored = fetched.found.files, fetched.found.stored
        if stored is None or not stored.are_of(request):
            return None
        if stored.are_of_record(origin):
            return success_response(request, files, stored.metadata, stored.whole)
        # The image is not read if files are missing: reading and the VAE take time.
        if not self._wanted(files) <= stored.whole:
            return None
        if not self._is_of(stored, *self._fingerprints_now(fetched, stored)):
            return None
        return success_response(request, files, stored.metadata, stored.whole)

    def renewed(self, files: OutputFiles, metadata: Metadata) -> bool:
        """Return whether stored files are still those of the metadata, and let them stay for all of OUTPUT_TTL_DAYS again.

        Raises:
            OutputDirNotWritable: another process has been writing or removing these files for long.
        """
        return self._settings.output_ttl_days is None or renewed(files, metadata, self._outputs)

    def hold(self, response: SuccessResponse) -> BinaryIO | None:
        """Keep the files of a response from OUTPUT_TTL_DAYS, until the returned file is closed."""
        return None if self._settings.output_ttl_days is None else hold(response, self._outputs)

    def undrawn(self, request: EncodeRequest, fetched: Fetched | None = None) -> Undrawn | None:
        """Return the stored latent of a request that lacks only images, which are asked for now; None if it lacks more.

        `fetched` is the request as `fetch` returned it.

        Raises:
            RequestError: the VAE or the image cannot be read, or the output folder cannot be written to.
        """
        fetched = fetched or self._unread(request)
        files, stored = fetched.found.files, fetched.found.stored
        if stored is None or not stored.complete or not stored.are_of(request) or self._wanted(files) <= stored.whole:
            return None
        if not self._is_of(stored, *self._fingerprints_now(fetched, stored)):
            return None
        vae = self.vaes.get(request.vae_model_name)
        with open_place(files.folder, self._outputs) as folder:
            tensors = read_tensors(folder, stored)
        if tensors is None:
            return None
        prepare_place(files.folder, self._outputs, self._space_needed(size_of(tensors[1]), vae, request))
        self._leftovers.remove(files.folder)
        lacking = self._wanted(files) - stored.whole
        return Undrawn(request, stored, vae, *tensors, files.preview in lacking, files.roundtrip in lacking)

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
            open_place(files.folder, self._outputs) as folder,
            staged_in(folder, files.shared_name) as staged,
        ):
            stored = self._still_stored(folder, drawn.undrawn)  # another process may have added the other image
            for path, data in images.items():
                if data is not None:
                    staged.add(path.name, data)
            metadata = drawn.described(stored.metadata)
            staged.add(files.metadata.name, described := _described(metadata))
            with self._own.publishing(files.metadata, checksum(described)):
                newer = staged.publish(partial(self._added_meanwhile, folder, drawn.undrawn, stored), adding=True)
            if newer is not None:
                return success_response(request, files, newer.metadata, newer.whole)
        return success_response(request, files, metadata, stored.whole | {path for path, data in images.items() if data})

    def _still_stored(self, folder: Folder, undrawn: Undrawn) -> StoredFiles:
        """Return the stored files as they are now.

        Raises:
            OutputDirNotWritable: they are no longer those of the latent of which the images were made.
        """
        files = undrawn.stored.files
        stored = stored_in(folder, files)
        if stored is None or not stored.complete or stored.metadata.latent_sha256 != undrawn.stored.metadata.latent_sha256:
            raise _others_were_written(undrawn.request, files)
        return stored

    def _added_meanwhile(self, folder: Folder, undrawn: Undrawn, described: StoredFiles) -> StoredFiles | None:
        """Return the files to which another process added the same images; None if they are still the `described` ones.

        Raises:
            OutputDirNotWritable: they are others.
        """
        stored = self._still_stored(folder, undrawn)
        if stored.metadata_sha256 == described.metadata_sha256:
            return None
        if self._wanted(stored.files) <= stored.whole:
            return stored
        raise _others_were_written(undrawn.request, stored.files)

    def _fingerprints_now(self, fetched: Fetched, stored: StoredFiles) -> tuple[str, str]:
        """Return the fingerprint of a request with the image and the VAE as they are now, and that of earlier versions."""
        request = fetched.request
        image_sha256 = _checksum_if_there(fetched.image) or stored.metadata.image_sha256
        vae, latent = self.vaes.get(request.vae_model_name), stored.files.latent
        now, earlier = (fingerprint(request, place, image_sha256, vae, self.runtime) for place in (latent.name, str(latent)))
        return now, earlier

    def _answers(self, stored: StoredFiles, expected: str) -> bool:
        """Return whether stored files have the expected fingerprint, and are all that are asked for now."""
        return self._is_of(stored, expected) and self._wanted(stored.files) <= stored.whole

    def _is_of(self, stored: StoredFiles, *expected: str) -> bool:
        """Return whether stored files have one of the expected fingerprints.

        A latent that was encoded in tiles is one only if OOM_POLICY still allows tiles.
        """
        tiles = map(of_tiles, expected) if self._settings.oom_policy == "tile" else ()
        return stored.metadata.fingerprint in (*expected, *tiles)

    def _wanted(self, files: OutputFiles) -> frozenset[Path]:
        """Return the files that a request gets under these settings, except the metadata."""
        optional = {files.preview: self._settings.preview, files.roundtrip: self._settings.roundtrip}
        return frozenset({files.latent, files.scaled_image, *(path for path, wanted in optional.items() if wanted)})

    def _space_needed(self, scaled: Size, vae: LoadedVae, request: EncodeRequest) -> int:
        images = 1 + 2 * self._settings.preview + self._settings.roundtrip  # a preview is twice as wide as the others
        return space_needed(scaled, vae.cells.factor, vae.cells.channels, images, request.image_path)


def ready_encoder(settings: Settings) -> LatentEncoder:
    """Return the encoder for Kafka mode: set up, and warm if WARMUP is set.

    Raises:
        SetupError: `LatentEncoder.set_up` or `LatentEncoder.warm_up` failed.
    """
    encoder = LatentEncoder.set_up(settings)
    encoder.remove_leftovers()
    if settings.warmup:
        encoder.warm_up()
    return encoder


def _described(metadata: Metadata) -> bytes:
    """Return the bytes of a metadata file."""
    return metadata.model_dump_json(indent=2).encode() + b"\n"


def _writers_in(files: OutputFiles) -> Writers:
    return PUBLISHING if isinstance(files.folder, ObjectPath) else WRITING


def _checksum_if_there(image: ImageFile) -> str | None:
    """Return the checksum of an image; None if it is gone.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        return image.checksum()
    except ImageNotFound:
        return None


def _others_were_written(request: EncodeRequest, files: OutputFiles) -> OutputDirNotWritable:
    return OutputDirNotWritable(
        f"Cannot write to output folder: {files.folder} (another process has written other files of the request "
        f"{request.request_id!r} meanwhile, {files.metadata.name} among them; send the request again to replace them)"
    )
