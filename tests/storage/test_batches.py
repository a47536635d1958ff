"""Folders in buckets on the command line: listed, resumed by one listing, and interrupted."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from latent_encoder.access import AllowedFolders
from latent_encoder.standalone.engines import InProcess
from latent_encoder.standalone.inputs import ImageSelection, Inputs, UnusableInputs, inputs_of
from latent_encoder.standalone.ordering import Batch, Outcome
from latent_encoder.storage.packed import NameDigests, PackedNames
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import COMFYUI, IMAGES, PATIENCE_S, PROJECT, VAE, RunMain, clean_environment
from tests.kafka_tools import wait_until
from tests.storage.conftest import Bucket
from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.web_server import WebServer

USUAL = ("--megapixels", "0.02", "--vae_model_name", VAE)
SETTINGS = {"COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu", "STORAGE_MAX_RETRIES": "0", "OMP_NUM_THREADS": "1"}
CHANGED = {"megapixels", "prepare_threads"}
CHANGED_IMAGE = {"GET": 13, "HEAD": 4, "PUT": 4, "DELETE": 2}
OTHER = (IMAGES / "progressive.jpeg").read_bytes()
PHOTO = (IMAGES / "photo.jpg").read_bytes()

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(bucket: Bucket, run_main: RunMain) -> Run:
    """Return a function that runs the command line with the bucket's environment."""

    def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        return run_main(*arguments, *USUAL, env={**bucket.environment, **SETTINGS, **env})

    return run


def put(bucket: Bucket, *keys: str, data: bytes = PHOTO) -> None:
    for key in keys:
        place = bucket.folder / key
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)


def responses(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def images_of(done: subprocess.CompletedProcess[str], bucket: Bucket) -> list[str]:
    """Return the keys of the images with a response, in order."""
    return [response["image_path"].removeprefix(f"{bucket.url}/") for response in responses(done)]


def summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    (event,) = (json.loads(line) for line in done.stderr.splitlines() if '"run ended"' in line)
    return dict(event)


def calls_of(proxy: FaultyProxy) -> Counter[str]:
    """Return the count of each kind of call since the last look, and forget the calls."""
    kinds = Counter("LIST" if "list-type" in call.path else call.method for call in proxy.calls)
    proxy.calls.clear()
    return kinds


@dataclass
class Here:
    """Runs in this process, over the ComfyUI that the tests share."""

    settings: Settings
    bucket: Bucket

    def inputs(self, *paths: str | Path, out: str | Path | None = None, recursive: bool = True, **more: Any) -> Inputs:
        """Return the inputs of a run, made as the command line makes them."""
        images = AllowedFolders.of_inputs(self.settings)
        fields = {"output_dir": str(out or f"{self.bucket.url}/out"), "megapixels": more.pop("megapixels", None)}
        selection = ImageSelection(tuple(map(str, paths)), recursive, **more).with_folders_marked(images)
        outputs = AllowedFolders.of_outputs(self.settings)
        return inputs_of(selection, fields, self.settings.request_defaults, outputs, images)

    def run(self, inputs: Inputs) -> list[Outcome]:
        """Return the outcome of each input."""
        batch = Batch(inputs.items, lambda report: InProcess(self.settings, report, reuse=True), lambda: None)
        return list(batch.outcomes())

    def stored(self, *paths: str | Path, **more: Any) -> list[bool]:
        """Run over these places, and return for each image if it got a stored response."""
        outcomes = self.run(self.inputs(*paths, **more))
        assert {outcome.response.status for outcome in outcomes} == {"success"}
        return [outcome.stored for outcome in outcomes]


@pytest.fixture
def here(bucket: Bucket, settings: Settings, worker: Callable[..., LatentEncoder], monkeypatch: pytest.MonkeyPatch) -> Here:
    changed = {"megapixels": 0.02, "prepare_threads": 1}
    monkeypatch.setattr(LatentEncoder, "set_up", lambda settings: worker(**settings.model_dump(include=CHANGED)))
    return Here(settings.model_copy(update=changed), bucket)


def keys(inputs: Inputs, root: str | Path) -> list[str]:
    """Return the images of a run below a bucket or a folder, in order."""
    found = [str(item.image_path).removeprefix(f"{root}/") for item in inputs.items]
    assert len(found) == inputs.total
    return found


def ids(inputs: Inputs) -> list[str]:
    """Return the request ids of a run whose inputs are all valid."""
    return [item.request_id for item in inputs.items if isinstance(item, EncodeRequest)]


def test_a_folder_of_a_bucket_is_one_of_a_disk(here: Here, bucket: Bucket) -> None:
    """A folder in a bucket gives the images, the counts and the ids that the same folder on disk gives."""
    put(
        bucket,
        "in/b.png",
        "in/a.jpg",
        "in/c d%41 ?#ä.JPEG",
        "in/sub/a.jpg",
        "in/.hidden/x.png",
        "in/.y.png",
        "in/preview_1.png",
    )
    put(bucket, "in/notes.txt", "in/video.mp4", "in2/other.png", "in-2/other.png")
    put(bucket, "in/console", "in/empty.png", data=b"")  # the marker of a folder comes without its slash
    in_bucket = here.inputs(f"{bucket.url}/in/")
    (bucket.folder / "in" / "console").unlink()
    on_disk = here.inputs(bucket.folder / "in")
    assert keys(in_bucket, bucket.url) == keys(on_disk, bucket.folder)
    assert "in/c d%41 ?#ä.JPEG" in keys(in_bucket, bucket.url)
    assert ids(in_bucket) == ids(on_disk)
    assert in_bucket.left_out == on_disk.left_out == {"hidden": 2, "other_ending": 2}


def test_without_recursive_folders_below_stay_out(here: Here, bucket: Bucket) -> None:
    """Without --recursive, only the objects in the folder itself are taken, and each folder below is counted once."""
    put(bucket, "in/a.jpg", "in/sub/b.jpg", "in/sub/c.jpg", "in/sub/deep/d.jpg", "in/z/e.jpg")
    inputs = here.inputs(f"{bucket.url}/in", recursive=False)
    assert keys(inputs, bucket.url) == ["in/a.jpg"]
    assert inputs.left_out == {"subfolder": 2}


def test_a_folder_below_with_many_objects_is_jumped_over(here: Here, bucket: Bucket) -> None:
    """A folder below that is left out costs a page of its listing, however many objects it has."""
    put(bucket, *(f"in/sub/{number:05}.txt" for number in range(2500)), data=b"")
    put(bucket, "in/a.jpg", "in/z.jpg")
    assert keys(here.inputs(f"{bucket.url}/in/", recursive=False), bucket.url) == ["in/a.jpg", "in/z.jpg"]
    assert calls_of(bucket.proxy)["LIST"] == 3  # two of the images, one of the output folder


def test_own_outputs_in_the_folder_are_left_out(here: Here, bucket: Bucket) -> None:
    """Outputs may lie in the folder of the images: a second run takes none of them, one without its latent included."""
    put(bucket, "in/a.jpg", "in/scaled_image_mine.png")
    assert here.stored(f"{bucket.url}/in/", out=f"{bucket.url}/in") == [False, False]
    names = bucket.names("in")
    own = next(name for name in names if name.startswith("scaled_image_a_"))
    put(bucket, "in/copies/scaled_image_x.png", data=(bucket.folder / "in" / own).read_bytes())
    again = here.inputs(f"{bucket.url}/in/", out=f"{bucket.url}/in")
    assert keys(again, bucket.url) == ["in/a.jpg", "in/scaled_image_mine.png"]
    assert again.left_out == {"own_output": 7}
    assert [outcome.stored for outcome in here.run(again)] == [True, True]


def test_resuming_takes_one_listing(here: Here, bucket: Bucket) -> None:
    """New images cost no look-ups before the encode: the listing of the output folder tells that they have no files."""
    put(bucket, *(f"in/{number}.jpg" for number in range(4)))
    inputs = here.inputs(f"{bucket.url}/in/")
    assert calls_of(bucket.proxy) == {"LIST": 2}
    here.run(inputs)
    # GET: the image; under the claim, the metadata in three formats. PUT: the claim, and three files. A first claim is proved,
    # and claims that were left over are listed.
    assert calls_of(bucket.proxy) == {"GET": 4 * 4, "PUT": 4 * 4 + 1, "DELETE": 4, "LIST": 1}
    assert here.stored(f"{bucket.url}/in/") == [True] * 4
    assert calls_of(bucket.proxy) == {"LIST": 2, "GET": 4 * 4, "HEAD": 4 * 2}
    put(bucket, "in/1.jpg", data=OTHER)
    assert here.stored(f"{bucket.url}/in/") == [True, False, True, True]
    of_others = Counter({"GET": 3 * 4, "HEAD": 3 * 2, "LIST": 3})
    assert calls_of(bucket.proxy) - of_others == CHANGED_IMAGE
    put(bucket, "in/5.jpg")
    assert here.stored(f"{bucket.url}/in/") == [True, True, True, True, False]


def test_files_that_are_there_under_another_id_are_found(here: Here, bucket: Bucket) -> None:
    """An image keeps its files if it is named itself, by a folder above it, or by its folder."""
    put(bucket, "photos/in/a.jpg", "photos/in/b.jpg")
    assert here.stored(f"{bucket.url}/photos/") == [False, False]
    names = bucket.names()
    for place in ("/photos/in/", "/photos/in", "/", ""):
        assert here.stored(f"{bucket.url}{place}") == [True, True]
    assert here.stored(f"{bucket.url}/photos/in/a.jpg", f"{bucket.url}/photos/in/b.jpg") == [True, True]
    assert here.stored(f"{bucket.url}/photos/in/a.jpg") == [True]
    assert bucket.names() == names


def test_names_and_folders_below(here: Here, bucket: Bucket) -> None:
    """--name keeps the folders below the given one, resumes, and finds the files of nobody before anything is encoded."""
    put(bucket, "in/a.jpg", "in/sub/a.jpg")
    assert here.stored(f"{bucket.url}/in/", name="{stem}") == [False, False]
    assert bucket.names("out/sub") == ["latent_a.pt", "latent_a.pt.json", "scaled_image_a.png"]
    assert here.stored(f"{bucket.url}/in/", name="{stem}") == [True, True]
    put(bucket, "in/b.jpg", "out/latent_b.pt")
    with pytest.raises(UnusableInputs, match=r"latent_b\.pt is there"):
        here.inputs(f"{bucket.url}/in/", name="{stem}")
    put(bucket, "in/b.png")
    (bucket.folder / "out" / "latent_b.pt").unlink()
    with pytest.raises(UnusableInputs, match=r"in/b\.jpg and s3://.*/in/b\.png would both get"):
        here.inputs(f"{bucket.url}/in/", name="{stem}")


def test_several_places_are_one_run(here: Here, bucket: Bucket, tmp_path: Path) -> None:
    """Folders in buckets and on disk are one run: nothing is taken twice; images at the same place get ids of their own."""
    (tmp_path / "photos").mkdir()
    shutil.copy(IMAGES / "astronaut.png", tmp_path / "photos" / "a.jpg")
    put(bucket, "in/a.jpg", "in/sub/b.jpg")
    put(bucket, "other/a.jpg", data=OTHER)
    places = (f"{bucket.url}/other/", tmp_path / "photos", f"{bucket.url}/in/", f"{bucket.url}/in/a.jpg")
    inputs = here.inputs(*places)
    assert [item.image_path for item in inputs.items] == [
        f"{bucket.url}/other/a.jpg",
        str(tmp_path / "photos" / "a.jpg"),
        f"{bucket.url}/in/a.jpg",
        f"{bucket.url}/in/sub/b.jpg",
    ]
    assert inputs.left_out == {"seen_before": 1}
    first, again = here.run(inputs), here.run(here.inputs(*places))
    assert [outcome.stored for outcome in again] == [True] * 4
    assert [outcome.response for outcome in again] == [outcome.response for outcome in first]
    assert len(bucket.names()) == 12


def test_from_disk_to_bucket_and_back(here: Here, bucket: Bucket, tmp_path: Path) -> None:
    """A folder on disk goes into a bucket and resumes, also from another place; a bucket goes onto the disk and resumes."""
    (tmp_path / "photos").mkdir()
    shutil.copy(IMAGES / "photo.jpg", tmp_path / "photos" / "a.jpg")
    assert here.stored(tmp_path / "photos") == [False]
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert here.stored(tmp_path / "moved") == [True]
    put(bucket, "in/a.jpg", "in/sub/b.jpg")
    assert here.stored(f"{bucket.url}/in/", out=tmp_path / "out") == [False, False]
    assert here.stored(f"{bucket.url}/in/", out=tmp_path / "out") == [True, True]
    assert here.stored(f"{bucket.url}/in/") == [True, False]  # the first is the same image as that of the disk


def test_an_object_and_a_folder_of_one_name(here: Here, bucket: Bucket) -> None:
    """Without a slash, the object of that name is the image; with one, or without such an object, the folder is meant."""
    put(bucket, "photos")
    image = here.inputs(f"{bucket.url}/photos")
    assert (image.single, keys(image, bucket.url)) == (True, ["photos"])
    (bucket.folder / "photos").unlink()
    put(bucket, "photos/a.jpg")
    assert keys(here.inputs(f"{bucket.url}/photos"), bucket.url) == ["photos/a.jpg"]


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("{bucket}/nothing", "There is nothing in {bucket}/nothing/"),
        ("{bucket}/text/", "No JPEG or PNG in the folder {bucket}/text/ (left out: 1 with another ending)"),
        ("{bucket}/*.jpg", "patterns are not resolved in buckets"),
        ("{bucket}/in/**", "patterns are not resolved in buckets"),
        ("{bucket}/in/nothing.png", "Image file not found: {bucket}/in/nothing.png"),
        ("s3://no-such-bucket-here/in/", "the bucket does not exist"),
        ("s3://no-such-bucket-here/in/a.png", "the bucket does not exist"),
        ("https://example.org/photos/", "is a folder of a web server, which cannot be listed"),
        ("{bucket}/in//", "must have no empty name"),
        ("{bucket}/in/../", "must have no empty name"),
    ],
)
def test_a_place_without_images_is_one_line(bucket: Bucket, run: Run, place: str, reason: str) -> None:
    """A place that stands for no image ends the run with one line and status 2 before ComfyUI is loaded."""
    put(bucket, "text/a.txt", "in/a.jpg")
    done = run(place.format(bucket=bucket.url), "-o", f"{bucket.url}/out")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert reason.format(bucket=bucket.url) in line


@pytest.mark.parametrize("place", ["in/", "in/a.jpg"])
def test_wrong_credentials_are_one_line(bucket: Bucket, run: Run, place: str) -> None:
    """Credentials that are wrong end the run with status 2 and one line, without the secret."""
    put(bucket, "in/a.jpg")
    done = run(f"{bucket.url}/{place}", AWS_SECRET_ACCESS_KEY="wrong-secret-of-mine")  # noqa: S106  # not one
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "the storage refuses" in line or "the credentials of the service do not open" in line
    assert "wrong-secret" not in line


def test_an_output_bucket_that_refuses_is_one_line(bucket: Bucket, run: Run) -> None:
    """An output bucket that is missing, or takes no writes, ends the run before ComfyUI is loaded, with one line."""
    put(bucket, "in/a.jpg")
    missing = run(f"{bucket.url}/in/", "-o", "s3://no-such-bucket-here/out")
    bucket.proxy.fault("status", "PUT", "/out/", times=9, status=403)
    refusing = run(f"{bucket.url}/in/", "-o", f"{bucket.url}/out")
    for done, reason in ((missing, "the bucket does not exist"), (refusing, "the storage refuses")):
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: Cannot write to output folder: ")
        assert reason in line
    assert bucket.names() == []


def test_a_name_that_is_no_valid_path_is_told(here: Here, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object whose name has an empty part, which some tools make, is named in the error."""
    put(bucket, "in/a.jpg", "in/odd__b.jpg")
    passed_on = FaultyProxy._passed_on

    def changed(self: FaultyProxy, *arguments: Any) -> tuple[int, dict[str, str], bytes]:
        status, headers, data = passed_on(self, *arguments)
        return status, headers, data.replace(b"odd__b", b"odd//b")

    monkeypatch.setattr(FaultyProxy, "_passed_on", changed)
    with pytest.raises(UnusableInputs, match=r"in/odd//b\.jpg has an empty name"):
        here.inputs(f"{bucket.url}/in/")


def test_a_page_that_fails_is_asked_for_again(here: Here, bucket: Bucket) -> None:
    """A listing goes on after a dropped connection and a throttled page, without a gap."""
    put(bucket, *(f"in/{number:04}.txt" for number in range(2100)), data=b"x")
    put(bucket, "in/0500.jpg", "in/1500.jpg", "in/2090.jpg")
    first = bucket.proxy.fault("drop", "GET", "list-type=2.*in%2F$")
    second = bucket.proxy.fault("status", "GET", "start-after=in%2F0")
    assert keys(here.inputs(f"{bucket.url}/in/"), bucket.url) == ["in/0500.jpg", "in/1500.jpg", "in/2090.jpg"]
    assert first.met.is_set()
    assert second.met.is_set()


def test_an_output_folder_that_cannot_be_listed(here: Here, bucket: Bucket) -> None:
    """Without the right to list the output folder, each file is looked up, and the run resumes all the same."""
    put(bucket, "in/a.jpg", "in/b.jpg")
    assert here.stored(f"{bucket.url}/in/") == [False, False]
    refused = bucket.proxy.fault("status", "GET", "start-after=out", times=100, status=403)
    calls_of(bucket.proxy)
    assert here.stored(f"{bucket.url}/in/", megapixels=0.01) == [False, False]
    assert calls_of(bucket.proxy) == {"GET": 2 * 10, "PUT": 2 * 4, "DELETE": 2, "LIST": 3}
    assert here.stored(f"{bucket.url}/in/") == [True, True]
    assert refused.met.is_set()


def test_a_large_output_folder_is_not_listed_for_few_images(here: Here, bucket: Bucket) -> None:
    """The listing of the output folder takes at most about one call for each image."""
    put(bucket, "in/a.jpg", "in/b.jpg")
    put(bucket, *(f"out/latent_{number}.pt.json" for number in range(3500)), data=b"")
    assert here.stored(f"{bucket.url}/in/") == [False, False]
    assert here.stored(f"{bucket.url}/in/") == [True, True]
    assert calls_of(bucket.proxy)["LIST"] == 2 * (1 + 3) + 1  # the last one is of left-over claims


def test_a_list_in_a_bucket(here: Here, bucket: Bucket) -> None:
    """A list of requests is read by its URL; an image that is in it twice gets one response twice."""
    put(bucket, "in/a.jpg", "in/b.jpg")
    lines = [{"image_path": f"{bucket.url}/in/{name}.jpg"} for name in ("a", "b", "a")]
    put(bucket, "list.jsonl", data="\n".join(map(json.dumps, lines)).encode())
    outcomes = here.run(here.inputs(input_list=f"{bucket.url}/list.jsonl"))
    assert [outcome.response.status for outcome in outcomes] == ["success"] * 3
    assert len(bucket.names()) == 6
    with pytest.raises(UnusableInputs, match=r"Cannot read the list.*other\.jsonl"):
        here.inputs(input_list=f"{bucket.url}/other.jsonl")


def test_another_worker_that_writes_the_same_files_meanwhile(here: Here, bucket: Bucket) -> None:
    """Files that another run writes after the listing stay, and the responses are theirs."""
    put(bucket, *(f"in/{number}.jpg" for number in range(3)))
    inputs = here.inputs(f"{bucket.url}/in/")
    other = here.run(here.inputs(f"{bucket.url}/in/"))
    files = {name: (bucket.folder / "out" / name).read_bytes() for name in bucket.names()}
    outcomes = here.run(inputs)
    assert [outcome.response for outcome in outcomes] == [outcome.response for outcome in other]
    assert {name: (bucket.folder / "out" / name).read_bytes() for name in bucket.names()} == files


def test_the_printed_command_goes_on(bucket: Bucket, tmp_path: Path) -> None:
    """After Ctrl-C, the command that is printed encodes the images that are left, and no other, with several workers too."""
    put(bucket, *(f"in/{number:02}.jpg" for number in range(40)))
    command = [sys.executable, str(PROJECT / "main.py"), "-i", f"{bucket.url}/in/", "--recursive", "-o", f"{bucket.url}/out"]
    environment = {**clean_environment(), **bucket.environment, **SETTINGS}
    bucket.proxy.latency_s = 0.05
    process = subprocess.Popen(
        [*command, *USUAL, "--workers", "2"],
        env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: any(name.endswith(".json") for name in bucket.names()), "the first image")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    begun = len(out.splitlines())
    left = re.search(r"Interrupted; (\d+) of 40 images are left\. This command goes on from here:\n(.*)", err)
    assert left, err
    assert int(left[1]) == 40 - begun
    again = subprocess.run(
        ["bash", "-c", left[2]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert again.returncode == 0, again.stderr
    assert (summary(again)["stored"], summary(again)["encoded"]) == (begun, 40 - begun)
    assert len(bucket.names()) == 120


def test_the_printed_command_has_no_signature(bucket: Bucket, web: WebServer, tmp_path: Path) -> None:
    """A presigned URL is printed without its query after Ctrl-C, and the words tell to give it again."""
    web.pages["/a.jpg"] = PHOTO
    put(bucket, "in/b.jpg", "in/c.jpg", "in/d.jpg", "in/e.jpg")
    held = bucket.proxy.fault("hold", "GET", "/in/c", times=9)
    url = web.url("/a.jpg?X-Amz-Signature=0123456789abcdef")
    command = [sys.executable, str(PROJECT / "main.py"), f"--image_path={url}", f"-i{url}&b=c", "-i", url]
    process = subprocess.Popen(
        [*command, *(f"{bucket.url}/in/{name}.jpg" for name in "bcde"), "-o", str(tmp_path), *USUAL],
        env={**clean_environment(), **bucket.environment, **SETTINGS}, cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert held.met.wait(PATIENCE_S)
    held.release.set()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert "give its URLs with their queries, which may be secret, again:" in err
    assert f"--image_path={web.url('/a.jpg')} -i{web.url('/a.jpg')} -i {web.url('/a.jpg')} " in err
    assert "X-Amz" not in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--input-list", "{url}"),
        ("-i", "{image}", "-o", "{url}"),
        ("-i", "{image}", "--html", "{url}"),
        ("-i", "{image}", "--vae_model_name", "{url}"),
        ("-i", "{image}", "--name", "{url}"),
        ("{url}", "--recursive"),
        ("-i", "~nobody-here/{url}"),
    ],
)
def test_a_presigned_url_in_the_wrong_place_is_told_without_its_query(
    web: WebServer, run_main: RunMain, arguments: tuple[str, ...]
) -> None:
    """Whichever option gets a presigned URL, no line of the output has its query."""
    url = web.url("/nothing?X-Amz-Signature=0123456789abcdef")
    words = [word.format(url=url, image=IMAGES / "photo.jpg") for word in arguments]
    done = run_main(*words, *USUAL[:2], *(() if "--vae_model_name" in arguments else USUAL[2:]), env=SETTINGS)
    assert done.returncode in (1, 2)
    assert "X-Amz" not in done.stdout + done.stderr


def test_packed_names_come_back() -> None:
    names = [f"folder/ä {number}.png" for number in range(2500)]
    packed = PackedNames(names)
    assert len(packed) == 2500
    assert list(packed) == list(packed) == names


def test_a_hundred_thousand_names_take_little_memory() -> None:
    """The names of 100,000 images, and the digests of as many files, take less than 10 MB at any time."""
    tracemalloc.start()
    try:
        images = PackedNames(f"photos/2026/photo-{number:07}.jpg" for number in range(100_000))
        digests = NameDigests()
        for number in range(100_000):
            digests.add(f"s3://bucket/latents/latent_photo-{number:07}_{number}.pt.json")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(images) == 100_000
    assert peak < 10_000_000


def test_digests_know_every_name() -> None:
    digests = NameDigests()
    for number in range(25_000):
        digests.add(f"{number}")
    assert all(f"{number}" in digests for number in range(25_000))
    assert not any(f"{number}" in digests for number in range(25_000, 50_000))
