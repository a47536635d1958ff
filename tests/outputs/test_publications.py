"""Several writers of one request: the files that a response names stay the ones that it describes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import pytest

from config import Settings
from errors import InvalidRequest, OutputDirNotWritable
from latent_encoder.access import ANYWHERE
from latent_encoder.outputs.encoded import Encoded
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
from latent_encoder.outputs.names import OutputFiles
from latent_encoder.outputs.stored_responses import Found
from latent_encoder.stages import Stages
from latent_encoder.standalone.engines import ImageJob
from latent_encoder.telemetry.health import Health
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, VAE, request_for

RECORD, ANOTHER = "AAAAAAAAAAAAAAAAAAAAAA/0/7", "AAAAAAAAAAAAAAAAAAAAAA/0/8"

Worker = Callable[[], LatentEncoder]


@pytest.fixture
def worker(encoder: LatentEncoder, settings: Settings) -> Worker:
    """Return a function that makes another worker with the same settings; what it published is unknown to the others."""
    return lambda: LatentEncoder(settings, encoder.runtime)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image that a test may change."""
    return Path(shutil.copy(IMAGES / "photo.jpg", tmp_path / "image.png"))


@pytest.fixture
def request_of_image(settings: Settings, tmp_path: Path, image: Path) -> EncodeRequest:
    return request_for(settings, tmp_path / "output", image, {})


def change(image: Path) -> None:
    shutil.copy(IMAGES / "grey.png", image)


def encoded(worker: LatentEncoder, request: EncodeRequest, origin: str | None = None) -> Encoded:
    return worker.encode_prepared(worker.prepare(request, origin))


def whole(response: SuccessResponse) -> bool:
    """Return whether the files of a response are the ones that it describes."""
    files = OutputFiles.of(Path(response.latent_file_path))
    stored = Found(files, ANYWHERE).stored
    latent = hashlib.sha256(files.latent.read_bytes()).hexdigest()
    return (
        stored is not None
        and stored.complete
        and (stored.metadata, latent)
        == (
            response.metadata,
            response.metadata.latent_sha256,
        )
    )


@pytest.mark.parametrize("late_snapshot", [False, True], ids=["before the other", "after the other"])
def test_files_of_the_same_record_are_not_replaced(
    late_snapshot: bool, worker: Worker, request_of_image: EncodeRequest, image: Path
) -> None:
    """A worker that was stopped takes the response of the one that took its record over, whenever it had begun."""
    stopped, other = worker(), worker()
    late = encoded(stopped, request_of_image, RECORD)
    change(image)
    response = other.write(encoded(other, request_of_image, RECORD))
    if late_snapshot:
        late = replace(late, prepared=stopped.prepare(request_of_image, RECORD))
    assert stopped.write(late) == response
    assert whole(response)


def test_files_of_a_later_record_are_not_replaced(worker: Worker, request_of_image: EncodeRequest, image: Path) -> None:
    """A stopped worker cannot put an older input in the place of a newer one; after another look it may."""
    stopped, other = worker(), worker()
    late = encoded(stopped, request_of_image, RECORD)
    change(image)
    response = other.write(encoded(other, request_of_image, ANOTHER))
    with pytest.raises(OutputDirNotWritable, match="another process has written other files of the request 'test'"):
        stopped.write(late)
    assert whole(response)
    assert whole(stopped.write(encoded(stopped, request_of_image, "AAAAAAAAAAAAAAAAAAAAAA/0/9")))


def test_equal_work_of_another_is_taken(worker: Worker, request_of_image: EncodeRequest) -> None:
    """Two that encode the same input get one response, also without Kafka."""
    first, second = worker(), worker()
    both = [(first, encoded(first, request_of_image)), (second, encoded(second, request_of_image))]
    responses = [each.write(result) for each, result in both]
    assert responses[0] == responses[1]
    assert whole(responses[0])


def test_damaged_files_of_another_are_replaced(worker: Worker, request_of_image: EncodeRequest) -> None:
    """Files that are no longer those of a response are no reason to keep them."""
    late, other = worker(), worker()
    result = encoded(late, request_of_image, RECORD)
    damaged = Path(other.write(encoded(other, request_of_image, RECORD)).latent_file_path)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert whole(late.write(result))


def test_own_files_are_replaced(encoder: LatentEncoder, request_of_image: EncodeRequest, image: Path) -> None:
    """Two requests with one id that are in flight together are written in their order, as if one came after the other."""
    first = encoded(encoder, request_of_image, RECORD)
    change(image)
    second = encoded(encoder, request_of_image, ANOTHER)
    assert encoder.write(first).metadata.image_sha256 != encoder.write(second).metadata.image_sha256


def test_forced_run_replaces_its_files(worker: Worker, request_of_image: EncodeRequest) -> None:
    """Files that were there before are replaced by a request without a record, even if they are of the same input."""
    first = worker().encode(request_of_image)
    second = worker().encode(request_of_image)
    assert first.metadata.timings_ms != second.metadata.timings_ms
    assert whole(second)


def test_same_record_gets_its_stored_response_without_image_and_vae(
    worker: Worker, settings: Settings, tmp_path: Path, image: Path, model_dir: Path
) -> None:
    """The record decides before image and VAE are read; for another record they decide."""
    name = "model-that-goes.safetensors"
    vae = model_dir / "vae" / name
    vae.parent.mkdir(exist_ok=True)
    shutil.copy(next(path for path in [*PROJECT.rglob(f"comfyui/models/vae/{VAE}"), *model_dir.rglob(VAE)]), vae)
    request = request_for(settings, tmp_path / "output", image, {"vae_model_name": name})
    try:
        response = worker().write(encoded(worker(), request, RECORD))
    finally:
        vae.unlink()
    change(image)
    later = worker()
    assert later.stored_response(request, RECORD) == response
    image.unlink()
    assert later.stored_response(request, RECORD) == response
    assert response.metadata.origin == RECORD
    Path(response.latent_file_path).unlink()
    assert later.stored_response(request, RECORD) is None


def test_record_with_another_image_is_encoded(worker: Worker, request_of_image: EncodeRequest, image: Path) -> None:
    """The files of one record are the response to another one only if they are of the same input."""
    first = worker()
    response = first.write(encoded(first, request_of_image, RECORD))
    assert first.stored_response(request_of_image, ANOTHER) == response
    change(image)
    assert first.stored_response(request_of_image, ANOTHER) is None
    assert first.stored_response(request_of_image) is None
    assert first.stored_response(request_of_image, RECORD) == response


def test_files_of_another_request_are_refused(worker: Worker, request_of_image: EncodeRequest) -> None:
    """A file system that ignores case gives `TEST` and `test` the same files: the second is refused."""
    encoder = worker()
    result = encoded(encoder, request_of_image)
    other = request_of_image.model_copy(update={"request_id": "TEST"})
    response = encoder.encode(other)
    files = OutputFiles.of(Path(response.latent_file_path))
    for path in (files.latent, files.scaled_image, files.metadata):  # as if the file system ignored case
        path.rename(path.with_name(path.name.replace("TEST", "test")))
    before = {path.name: path.read_bytes() for path in files.folder.iterdir()}

    assert encoder.stored_response(request_of_image) is None
    with pytest.raises(InvalidRequest, match=r"\.latent and the files beside it belong to"):  # it shares the scaled image
        encoder.prepare(request_of_image.model_copy(update={"latent_format": "comfy"}))
    for refused in (lambda: encoder.prepare(request_of_image), lambda: encoder.write(result)):
        with pytest.raises(InvalidRequest, match=r"request_id: .*\.pt and the files beside it belong to the request 'TEST'"):
            refused()
    assert {path.name: path.read_bytes() for path in files.folder.iterdir()} == before


def test_files_of_older_versions_are_replaced(worker: Worker, request_of_image: EncodeRequest) -> None:
    """Metadata without a request id, without a shape that we know, or without JSON belong to nobody."""
    encoder = worker()
    metadata = OutputFiles.of(Path(encoder.encode(request_of_image).latent_file_path)).metadata
    older = {name: value for name, value in json.loads(metadata.read_bytes()).items() if name not in ("request_id", "origin")}
    for content in (json.dumps(older), "[]", "{}", "no JSON", ""):
        metadata.write_text(content)
        assert whole(encoder.encode(request_of_image))


def test_formats_of_one_request_share_its_images(worker: Worker, settings: Settings, tmp_path: Path) -> None:
    """The images are the same, byte for byte, so each response stays true."""
    formats = ("pt", "safetensors", "comfy")
    requests = [request_for(settings, tmp_path, "photo.jpg", {"latent_format": name}) for name in formats]
    responses = [worker().encode(request) for request in requests]
    assert len({response.scaled_image_path for response in responses}) == 1
    assert all(whole(response) for response in responses)


def test_another_input_in_another_format_takes_the_metadata_away(worker: Worker, settings: Settings, tmp_path: Path) -> None:
    """Metadata that describe a replaced image are removed, before it is; their latent stays."""
    first = worker().encode(request_for(settings, tmp_path, "photo.jpg", {}))
    former = OutputFiles.of(Path(first.latent_file_path))
    fields = {"latent_format": "safetensors", "megapixels": 0.03}
    assert whole(worker().encode(request_for(settings, tmp_path, "photo.jpg", fields)))
    assert not former.metadata.exists()
    assert hashlib.sha256(former.latent.read_bytes()).hexdigest() == first.metadata.latent_sha256


def test_a_preview_that_other_metadata_describe_stays(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> None:
    """A run without previews removes one only if no other format of the latent has it."""
    with_previews = LatentEncoder(settings.model_copy(update={"preview": True}), encoder.runtime)
    without = LatentEncoder(settings, encoder.runtime)
    first = with_previews.encode(request_for(settings, tmp_path, "photo.jpg", {}))
    second = without.encode(request_for(settings, tmp_path, "photo.jpg", {"latent_format": "comfy"}))
    stored = Found(OutputFiles.of(Path(first.latent_file_path)), ANYWHERE).stored
    assert stored is not None
    assert stored.metadata == first.metadata
    assert {path.name for path in stored.whole} == {
        Path(str(path)).name for path in (first.latent_file_path, first.scaled_image_path, first.preview_path)
    }
    assert second.preview_path is None
    assert whole(second)


def test_stages_hand_the_record_on(worker: Worker, request_of_image: EncodeRequest, image: Path) -> None:
    """The files of a record are written with its identity, and are its response when it comes again."""
    results: SimpleQueue[SuccessResponse | BaseException] = SimpleQueue()
    stages = Stages[ImageJob](worker(), lambda _, result: results.put(result), Health(60))

    def deliver() -> tuple[SuccessResponse | BaseException, bool]:
        job = DeliveredJob(0, request_of_image, threading.Event())
        stages.submit(job)
        return results.get(timeout=PATIENCE_S), job.redelivered

    first, redelivered = deliver()
    assert isinstance(first, SuccessResponse)
    assert (first.metadata.origin, redelivered) == (RECORD, False)
    change(image)
    assert deliver() == (first, True)
    stages.close()


@dataclass(eq=False)
class DeliveredJob(ImageJob):
    """A job of a Kafka record."""

    origin: str = RECORD  # type: ignore[assignment]


ROUNDS = 40
"""One round in six mixed the files before a lock was held."""


def write_rounds(folder: Path, writer: int, barrier: object) -> None:
    """Publish a set of files in every round, together with another process."""
    for number in range(ROUNDS):
        barrier.wait(60)  # type: ignore[attr-defined]
        data = f"{writer} {number} ".encode() * 1000
        described = {"sha256": hashlib.sha256(data).hexdigest()}
        with open_output_folder(folder, ANYWHERE) as opened, StagedFiles(opened) as staged:
            for name in ("latent.pt", "scaled.png"):
                staged.add(name, data)
            staged.add("latent.pt.json", json.dumps(described).encode())
            barrier.wait(60)  # type: ignore[attr-defined]
            staged.publish()
        barrier.wait(60)  # type: ignore[attr-defined]
        if writer == 0:
            stated = json.loads((folder / "latent.pt.json").read_bytes())["sha256"]
            for name in ("latent.pt", "scaled.png"):
                assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == stated, f"round {number}"


def test_two_processes_never_mix_their_files(tmp_path: Path) -> None:
    """In each round both publish at the same moment, and afterwards all files are those of one of them."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    writers = [context.Process(target=write_rounds, args=(tmp_path, writer, barrier)) for writer in range(2)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(240)
    assert [process.exitcode for process in writers] == [0, 0]


def test_reader_sees_one_set_or_none(worker: Worker, request_of_image: EncodeRequest) -> None:
    """While two sets of files replace each other, stored files are those of one response."""
    sets = []
    for megapixels in (0.01, 0.02):
        response = worker().encode(request_of_image.model_copy(update={"megapixels": megapixels}))
        files = OutputFiles.of(Path(response.latent_file_path))
        sets.append({path.name: path.read_bytes() for path in (files.latent, files.scaled_image, files.metadata)})
    done = threading.Event()
    seen: Counter[tuple[bool, bool]] = Counter()

    def read() -> None:
        while not done.is_set():
            stored = Found(files, ANYWHERE).stored
            seen[stored is not None, stored is not None and stored.complete] += 1

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(150):
        with open_output_folder(files.folder, ANYWHERE) as folder, StagedFiles(folder) as staged:
            for name, data in sets[number % 2].items():
                staged.add(name, data + b" " * number if name == files.metadata.name else data)  # no two are equal
            staged.publish()
    done.set()
    reader.join()
    assert seen.keys() <= {(False, False), (True, True)}
    stored = Found(files, ANYWHERE).stored
    assert stored is not None
    assert stored.complete
