"""Many images in one run: their order, their failures, continuing a run, and ending one early."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pexpect
import psutil
import pytest
import torch
from PIL import Image

from config import Settings
from latent_encoder.standalone import run as standalone
from latent_encoder.standalone.inputs import ImageSelection
from latent_encoder.standalone.run import RunOptions
from latent_encoder.telemetry.logs import LogStyle
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, TINY_VAE, RunMain, clean_environment, load_latent
from tests.kafka_tools import wait_until

GOOD = ("astronaut.png", "grey.png", "photo.jpg")
TINY = ("--vae_model_name", TINY_VAE, "--megapixels", "0.02")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make a folder with three images and, among them by name, a truncated one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in GOOD:
        shutil.copy(IMAGES / name, folder)
    shutil.copy(IMAGES / "truncated.jpg", folder / "broken.jpg")
    return folder


@pytest.fixture
def run(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str], encoder: object
) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """Encode images in this process, which has loaded ComfyUI; return the exit status, the responses and standard error."""
    assert encoder is not None
    fields = {"output_dir": str(tmp_path / "output"), "vae_model_name": TINY_VAE, "megapixels": 0.02}

    def run(selection: ImageSelection, options: RunOptions = RunOptions(), **more: Any) -> Any:  # noqa: B008  # frozen
        capfd.readouterr()
        status = standalone.run(settings, selection, {**fields, **more}, options, LogStyle("INFO", "text", tracebacks=True))
        output, errors = capfd.readouterr()
        return status, [json.loads(line) for line in output.splitlines()], errors

    return run


def names(responses: list[dict[str, Any]]) -> list[str]:
    """Return the image's name of each success, and the error code of each failure."""
    return [response.get("error_code") or Path(response["latent_file_path"]).name.split("_")[1] for response in responses]


def modified(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_one_failure_does_not_stop_the_rest(photos: Path, run: Any) -> None:
    """Responses come in the order of the input, one a line; the status is 1, and the summary has the counts."""
    status, responses, errors = run(ImageSelection((str(photos),)))
    assert (status, names(responses)) == (1, ["astronaut", "IMAGE_INVALID", "grey", "photo"])
    assert all(load_latent(response["latent_file_path"]).shape[1] == 16 for response in responses if "metadata" in response)
    assert errors.splitlines()[-1].startswith("3 encoded, 0 done before, 1 failed (IMAGE_INVALID: 1), in 0:0")


def test_each_line_names_its_image(photos: Path, run: Any, tmp_path: Path) -> None:
    """Each line begins with the path of the image as it was given, errors too; a line that names none has null there."""
    _, responses, _ = run(ImageSelection((str(photos),)))
    assert [next(iter(response.items())) for response in responses] == [
        ("image_path", str(photos / name)) for name in ("astronaut.png", "broken.jpg", "grey.png", "photo.jpg")
    ]
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"image_path": "gone.png"}\n{"image_path": "nul\\u0000"}\n{"request_id": "1"}\nnonsense\n')
    _, responses, _ = run(ImageSelection(input_list=str(requests)))
    assert [response["image_path"] for response in responses] == ["gone.png", "nul\0", None, None]


def test_run_goes_on_where_it_was(photos: Path, run: Any, tmp_path: Path) -> None:
    """Images with complete, matching files are not encoded again; damaged latents and changed images are."""
    (photos / "broken.jpg").unlink()
    status, first, _ = run(ImageSelection((str(photos),)))
    assert (status, len(first)) == (0, 3)
    before = modified(tmp_path / "output")
    Path(first[0]["latent_file_path"]).write_bytes(b"damaged")
    shutil.copy(IMAGES / "rgba.png", photos / "grey.png")
    status, second, errors = run(ImageSelection((str(photos),)))
    assert errors.splitlines()[-1].startswith("2 encoded, 1 done before, 0 failed, in ")
    assert second[2] == first[2]
    assert second[0]["metadata"]["latent_sha256"] == first[0]["metadata"]["latent_sha256"]
    assert second[1]["metadata"]["latent_sha256"] != first[1]["metadata"]["latent_sha256"]
    after = modified(tmp_path / "output")
    assert {name.split("_")[-2] for name in after if after[name] == before[name]} == {"photo"}
    _, _, errors = run(ImageSelection((str(photos),)), RunOptions(force=True))
    assert errors.splitlines()[-1].startswith("3 encoded, 0 done before, 0 failed, in ")
    assert not set(modified(tmp_path / "output").values()) & set(after.values())


def test_images_are_added_to_a_finished_run(
    photos: Path, run: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run with PREVIEW and ROUNDTRIP encodes nothing: the images are made of the stored latents."""
    (photos / "broken.jpg").unlink()
    _, first, _ = run(ImageSelection((str(photos),)))
    before = modified(tmp_path / "output")
    monkeypatch.setitem(vars(settings), "preview", True)
    monkeypatch.setitem(vars(settings), "roundtrip", True)
    status, second, errors = run(ImageSelection((str(photos),)))
    assert (status, len(second)) == (0, 3)
    assert errors.splitlines()[-1].startswith("0 encoded, 3 done before, 0 failed, in ")
    after = modified(tmp_path / "output")
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {name for name in before if not name.endswith(".json")}
    assert len(after) == len(before) + 6
    for old, new in zip(first, second, strict=True):
        assert Path(new["preview_path"]).is_file()
        assert Path(new["roundtrip_path"]).is_file()
        assert new["metadata"]["latent_sha256"] == old["metadata"]["latent_sha256"]
    _, third, _ = run(ImageSelection((str(photos),)))
    assert third == second


def test_hidden_colours_are_counted_in_the_summary(photos: Path, run: Any) -> None:
    """The summary counts images with transparency, encoded now or before, unless they lie over a colour."""
    for name in ("rgba.png", "palette_with_transparency.png"):
        shutil.copy(IMAGES / name, photos)
    with Image.open(IMAGES / "photo.jpg") as photo:
        photo.convert("RGBA").save(photos / "opaque.png")
    hint = "; 2 with transparency, whose hidden colours are encoded (see --alpha)."
    for counts in ("6 encoded, 0 done before", "0 encoded, 6 done before"):
        summary = run(ImageSelection((str(photos),)))[2].splitlines()[-1]
        assert summary.startswith(counts)
        assert summary.endswith(hint)
    status, responses, errors = run(ImageSelection((str(photos),)), alpha="black")
    assert errors.splitlines()[-1].startswith("6 encoded, 0 done before")
    assert "transparency" not in errors
    composited = [
        name
        for name, response in zip(names(responses), responses, strict=True)
        if "metadata" in response and response["metadata"]["image_notes"] == ["alpha_composited"]
    ]
    assert (status, composited) == (1, ["palette", "rgba"])


def test_hidden_colours_of_a_single_image_are_reported(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str], encoder: object
) -> None:
    """A line of text or a log event warns of them; with --quiet, with a colour, and for an opaque image there is none."""
    assert encoder is not None

    def errors_of(name: str, log_format: str = "text", *, quiet: bool = False, **fields: Any) -> str:
        fields |= {"output_dir": str(tmp_path), "vae_model_name": TINY_VAE, "megapixels": 0.02}
        selection, style = ImageSelection((str(IMAGES / name),)), LogStyle("INFO", log_format, tracebacks=True)
        assert standalone.run(settings, selection, fields, RunOptions(quiet=quiet), style) == 0
        return capfd.readouterr().err

    warning = (
        "Warning: The image has transparency, whose hidden colours are encoded, as in ComfyUI. "
        "--alpha black, white or grey lays the image over that colour."
    )
    assert errors_of("rgba.png").splitlines()[-1] == warning
    assert warning not in errors_of("rgba.png", "json")
    silent = (errors_of("rgba.png", quiet=True), errors_of("rgba.png", alpha="grey"), errors_of("photo.jpg"))
    assert [errors for errors in silent if "transparency" in errors] == []


def test_hidden_colours_are_a_log_event(run_main: RunMain) -> None:
    """In a pipe, the warning is an event with the remedy, and standard output holds the response alone."""
    done = run_main("--image_path", IMAGES / "rgba.png", *TINY, "--output_dir", "out")
    assert json.loads(done.stdout)["metadata"]["image_notes"] == ["alpha_dropped"]
    (event,) = [event for line in done.stderr.splitlines() if "transparency" in (event := json.loads(line))["event"]]
    assert (event["level"], event["remedy"]) == ("warning", "--alpha black, white or grey lays the image over that colour")


def test_fail_fast_ends_with_the_first_failure(tmp_path: Path, run: Any) -> None:
    """After the first failure no image is begun; those in flight may be finished."""
    images = [str(IMAGES / "truncated.jpg"), *(str(IMAGES / name) for name in GOOD * 1)]
    copies = [str(shutil.copy(IMAGES / "photo.jpg", tmp_path / f"{n}.jpg")) for n in range(20)]
    status, responses, errors = run(ImageSelection((*images, *copies)), RunOptions(fail_fast=True))
    assert (status, responses[0]["error_code"]) == (1, "IMAGE_INVALID")
    assert len(responses) < 10
    left = len(images) + len(copies) - len(responses)
    assert errors.splitlines()[-1] == f"--fail-fast: stopped at a failure; {left} of 24 images were not tried."


def test_list_of_requests_is_answered_like_a_topic(photos: Path, run: Any, tmp_path: Path) -> None:
    """Responses have the ids of their requests, and a field that a line leaves out is the command line's."""
    requests = [
        {"image_path": str(photos / "photo.jpg"), "request_id": "one", "correlation_id": "c1", "megapixels": 0.03},
        {"image_path": str(photos / "none.jpg"), "request_id": "two", "correlation_id": "c2"},
        {"image_path": str(photos / "photo.jpg"), "request_id": "three"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    status, responses, _ = run(ImageSelection(input_list=str(tmp_path / "list.jsonl")))
    assert (status, names(responses)) == (1, ["photo", "IMAGE_NOT_FOUND", "photo"])
    assert [response["request_id"] for response in responses] == ["one", "two", "three"]
    assert [response.get("correlation_id") for response in responses] == ["c1", "c2", None]
    assert [response["metadata"]["megapixels"] for response in responses if "metadata" in response] == [0.03, 0.02]


def test_latents_do_not_depend_on_the_way(photos: Path, run: Any, encode: Callable[..., Any]) -> None:
    """A run over a folder gives the latents of single encodes, to the last bit."""
    status, responses, _ = run(ImageSelection((str(photos / "a*.png"), str(photos / "photo.jpg"))))
    assert status == 0
    for response, image in zip(responses, ("astronaut.png", "photo.jpg"), strict=True):
        alone = load_latent(encode(image, vae_model_name=TINY_VAE, megapixels=0.02).latent_file_path)
        assert torch.equal(load_latent(response["latent_file_path"]), alone)


# The tests below need a process of their own: signals, pipes, worker processes, a terminal.


@contextmanager
def started(folder: Path, *arguments: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(PROJECT / "main.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=clean_environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def copies(folder: Path, count: int) -> Path:
    images = folder / "copies"
    images.mkdir()
    for number in range(count):
        shutil.copy(IMAGES / "photo.jpg", images / f"{number:02}.jpg")
    return images


def assert_whole(responses: list[dict[str, Any]], output: Path) -> None:
    """Assert that exactly the three files of each response exist, and that each latent can be loaded."""
    assert {response["status"] for response in responses} == {"success"}
    expected = {Path(path).name for r in responses for path in (r["latent_file_path"], r["scaled_image_path"])}
    expected |= {f"{Path(response['latent_file_path']).name}.json" for response in responses}
    assert {file.name for file in output.iterdir()} == expected
    for response in responses:
        load_latent(response["latent_file_path"])


def ask(process: subprocess.Popen[str], images: Sequence[Path]) -> None:
    """Write a request for each image to the process, and leave its standard input open: the run cannot end by itself."""
    assert process.stdin is not None
    process.stdin.writelines(json.dumps({"image_path": str(image)}) + "\n" for image in images)
    process.stdin.flush()


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for the end of a process, and return the rest of its output. `communicate` would close its standard input."""
    assert process.stdout is not None
    assert process.stderr is not None
    process.wait(PATIENCE_S)
    return process.stdout.read(), process.stderr.read()


def test_ctrl_c_finishes_the_image_in_hand(tmp_path: Path) -> None:
    """Ctrl-C is status 130 with every file complete; responses come while standard input is still open.

    Most lines come after the signal: however fast an encode is, the run cannot end before it.
    """
    images = sorted(copies(tmp_path, 40).iterdir())
    with started(tmp_path, "--input-list", "-", *TINY) as process:
        assert process.stdout is not None
        ask(process, images[:1])
        first = process.stdout.readline()
        ask(process, images[1:5])
        second = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        with suppress(BrokenPipeError):  # it may have ended already
            ask(process, images[5:])
        output, errors = ended(process)
    responses = [json.loads(line) for line in (first, second, *output.splitlines())]
    assert process.returncode == 130, errors
    *_, summary, last = errors.splitlines()
    assert last.startswith("Error: Interrupted. The requests were read from a stream: give them again. Images whose files ")
    assert json.loads(summary) | {"encoded": len(responses), "failed": 0, "interrupted": True} == json.loads(summary)
    assert len(responses) < 20
    assert_whole(responses, tmp_path / "output")


def test_workers_share_the_images_and_one_may_die(tmp_path: Path) -> None:
    """Requests of a killed worker get error responses, the rest are encoded, all in input order; then Ctrl-C ends the run.

    The worker is suspended before it gets requests, so that it holds some when it is killed. Most lines come after Ctrl-C.
    """
    images = sorted(copies(tmp_path, 60).iterdir())
    with started(tmp_path, "--input-list", "-", "--workers", "2", *TINY, start_new_session=True) as process:
        assert process.stdout is not None
        ask(process, images[:1])
        first = process.stdout.readline()
        workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
        assert len(workers) == 2
        workers[0].suspend()
        ask(process, images[1:10])
        output_folder = tmp_path / "output"
        wait_until(lambda: len(list(output_folder.glob("*.pt"))) >= 3, "images that the other worker encoded")
        workers[0].kill()
        answered = [json.loads(first)]
        while "error_code" not in answered[-1]:
            answered.append(json.loads(process.stdout.readline()))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        with suppress(BrokenPipeError):  # it may have ended already
            ask(process, images[10:])
        output, errors = ended(process)
    answered += [json.loads(line) for line in output.splitlines()]
    assert process.returncode == 130, errors
    assert not any(worker.is_running() for worker in workers)
    failed = [response for response in answered if response["status"] == "error"]
    assert 1 <= len(failed) <= 3
    assert "was killed, by the system for lack of memory as a rule; use fewer --workers" in failed[0]["error_message"]
    succeeded = [response for response in answered if response["status"] == "success"]
    numbers = [Path(response["latent_file_path"]).name.split("_")[1] for response in succeeded]
    assert numbers == sorted(numbers)
    assert len(answered) < 50
    leftovers = [file for file in (tmp_path / "output").iterdir() if file.name.startswith(".latent-encoder-")]
    for file in leftovers:  # of the worker that was killed in the middle of a file
        file.unlink()
    written = {Path(response["latent_file_path"]).name for response in succeeded}
    for file in (tmp_path / "output").glob("*.pt"):
        if file.name not in written:  # its worker was killed between writing it and reporting it
            load_latent(file)
            assert len(failed) > 0


def test_workers_that_cannot_start_end_the_run(photos: Path, tmp_path: Path) -> None:
    """A worker that cannot start is status 3 and one line, whatever the other workers do."""
    with started(tmp_path, "--image-path", photos, "--workers", "2", "--comfyui-path", "/nowhere", *TINY) as process:
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (3, "")
    assert errors.startswith("Error: No ComfyUI in /nowhere: ")
    assert errors.count("\n") == 1


def test_progress_is_seen_on_a_terminal_alone(photos: Path, tmp_path: Path) -> None:
    """A terminal shows counts, speed and the time left on one line, between whole lines of JSON with `--json`."""
    arguments = [str(PROJECT / "main.py"), "--image-path", str(photos), "--json", *TINY]
    terminal = pexpect.spawn(
        sys.executable,
        arguments,
        cwd=str(tmp_path),
        env=clean_environment(),
        dimensions=(24, 100),
        timeout=PATIENCE_S,
        encoding="utf-8",
    )
    screen = terminal.read()
    terminal.close()
    assert terminal.exitstatus == 1
    assert re.search(r"\r4/4, 1 failed \|█+\| +[\d.]+(image/s|s/image), 00:00 left", screen)
    assert "3 encoded, 0 done before, 1 failed (IMAGE_INVALID: 1), in 0:0" in screen
    lines = [line.split("\r")[-1].removeprefix("\x1b[K") for line in screen.replace("\r\n", "\n").split("\n")]
    assert [json.loads(line)["status"] for line in lines if line.startswith("{")] == ["success", "error", "success", "success"]
    assert "Traceback" not in screen
