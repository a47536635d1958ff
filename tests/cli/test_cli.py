"""The command line as a process: its output, its exit status, its words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import pytest
import torch

from config import VERSION
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, VAE, RunMain, clean_environment, interrupt, load_latent

TINY = ("--vae_model_name", VAE, "--megapixels", "0.02")


@pytest.mark.core
def test_success_is_one_json_document_on_stdout(tmp_path: Path, run_main: RunMain) -> None:
    """The specification's example gives one JSON response on standard output, and JSON lines on standard error."""
    image = shutil.copy(IMAGES / "astronaut_masked.png", tmp_path / "1.png")
    done = run_main("--mode", "standalone", "--image_path", image, *TINY, "--output_dir", "./output")
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["status"] == "success"
    assert UUID(response["request_id"]).version == 5
    for name in ("latent_file_path", "scaled_image_path"):
        assert Path(response[name]).parent == tmp_path / "output"
    assert list(load_latent(response["latent_file_path"]).shape) == response["latent_shape"]
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert events[-1]["event"] == "request encoded"
    assert events[-1]["request_id"] == response["request_id"]


@pytest.mark.core
def test_error_response_is_one_json_document(run_main: RunMain) -> None:
    """A missing image is status 2 with the specification's message; options may have hyphens for underscores."""
    done = run_main("--image-path", "/no/image.jpg", "--request-id", "mine", "--log-format", "text", *TINY)
    assert done.returncode == 2
    response = json.loads(done.stdout)
    assert response.pop("timestamp").endswith("Z")
    assert response == {
        "status": "error",
        "request_id": "mine",
        "error_code": "IMAGE_NOT_FOUND",
        "error_message": "Image file not found: /no/image.jpg",
    }
    assert done.stderr == "Error: Image file not found: /no/image.jpg\n"


@pytest.mark.core
def test_damaged_image_is_an_error_response_and_status_1(run_main: RunMain) -> None:
    """A fault in the content of an image is status 1, and no line on standard error is added to the log."""
    done = run_main("--image-path", IMAGES / "truncated.jpg", *TINY)
    assert (done.returncode, json.loads(done.stdout)["error_code"]) == (1, "IMAGE_INVALID")
    assert "Error:" not in done.stderr


@pytest.mark.core
def test_precision_that_is_asked_for_is_used(run_main: RunMain) -> None:
    """The VAE runs in bfloat16, as the metadata reports; the file is float32 nevertheless."""
    done = run_main("--image_path", IMAGES / "photo.jpg", *TINY, "--device", "cpu", env={"VAE_PRECISION": "bf16"})
    metadata = json.loads(done.stdout)["metadata"]
    assert (metadata["vae_dtype"], metadata["latent_dtype"], metadata["device"]) == ("bfloat16", "float32", "cpu")
    latent = load_latent(json.loads(done.stdout)["latent_file_path"])
    assert torch.equal(latent, latent.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--megapixels", "17"], "megapixels"),
        (["--megapixels", "nan"], "megapixels"),
        (["--megapixels", "-1"], "megapixels"),
        (["--upscale_method", "cubic"], "upscale_method"),
        (["--vae_model_name", "../x"], "vae_model_name"),
        (["--output_dir", ""], "output_dir"),
        (["--request_id", ""], "request_id"),
    ],
)
def test_field_out_of_range_is_invalid_request(arguments: list[str], field: str, run_main: RunMain) -> None:
    """The error response and the line on standard error name the field, and come before ComfyUI is loaded."""
    done = run_main("--image_path", IMAGES / "photo.jpg", *arguments)
    assert done.returncode == 2
    response = json.loads(done.stdout)
    assert response["error_code"] == "INVALID_REQUEST"
    assert response["error_message"].startswith(f"Invalid request: {field}: ")
    assert done.stderr == f"Error: {response['error_message']}\n"


def test_name_that_is_not_text_is_answered(run_main: RunMain) -> None:
    """A file name that is not UTF-8, which JSON cannot hold, gets an error response."""
    done = run_main("--image_path", os.fsdecode(b"\xff.png"))
    assert (done.returncode, json.loads(done.stdout)["error_code"]) == (2, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        ([], {}, "Standalone mode needs --image_path FILE, or --input-list FILE."),
        (["--no-such-option"], {}, "No such option"),
        (["--megapixels", "many"], {}, "'many' is not a valid float"),
        (["--mode", "batch"], {}, "'batch' is not one of"),
        (["--mode", "health", "stray"], {}, "[PATH]... is for --mode standalone, inspect or compare, not for --mode health."),
        (["--image_path", "x.png"], {"MEGAPIXELS": "17"}, "MEGAPIXELS: Input should be less than or equal to 16"),
        (["--image_path", "x.png"], {"LOG_FORMAT": "xml"}, "LOG_FORMAT: Input should be 'json' or 'text'"),
        (["--image_path", "x.png", "--log-level", "loud"], {}, "LOG_LEVEL: Input should be 'DEBUG'"),
        (
            ["--mode", "kafka"],
            {"KAFKA_CLIENT_CONFIG": "none.properties"},
            "KAFKA_CLIENT_CONFIG: none.properties cannot be read",
        ),
        (["--mode", "dlq-replay", "--error-code", "NO_SUCH"], {}, "'NO_SUCH' is not one of 'IMAGE_NOT_FOUND'"),
        (["--mode", "dlq-replay", "--limit", "0"], {}, "Invalid value for '--limit'"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], env: dict[str, str], words: str, run_main: RunMain) -> None:
    """Wrong usage writes a short message to standard error, and nothing to standard output."""
    done = run_main(*arguments, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version_need_no_torch(run_main: RunMain) -> None:
    """Both are printed without importing torch or the Kafka client, from any folder."""
    shown = run_main("--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert shown.returncode == 0
    for option in ("--image-path", "--vae-model-name", "--upscale-method", "--megapixels", "--output-dir", "--request-id"):
        assert option in shown.stdout
    assert "| torch" not in shown.stderr
    assert "confluent_kafka" not in shown.stderr
    assert run_main("--version").stdout == f"latent-encoder, version {VERSION}\n"


def test_settings_come_from_a_file_too(tmp_path: Path, run_main: RunMain) -> None:
    """`.env` in the working folder is read; a missing ComfyUI is status 3 with advice."""
    (tmp_path / ".env").write_text("COMFYUI_PATH=/nowhere\n")
    done = run_main("--image_path", IMAGES / "photo.jpg")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("Error: No ComfyUI in /nowhere: ")
    assert "./setup_comfyui.sh" in done.stderr
    assert done.stderr.count("\n") == 1


def test_output_that_cannot_be_written_is_said(run_main: RunMain) -> None:
    """A full disk behind standard output is status 3 and one line without a traceback."""
    done = run_main("--image_path", "x.png", "--megapixels", "17", prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    assert done.returncode == 3
    assert done.stderr == "Error: Cannot write the response to standard output (No space left on device).\n"


@pytest.mark.parametrize("taken_by", ["main thread", "other thread"])
def test_interrupt_leaves_nothing(tmp_path: Path, taken_by: str) -> None:
    """Ctrl-C in the middle of an encode gives status 130 and one line, and leaves no file.

    So it does if the system hands the signal to another thread than the main one, which then goes on to wait.
    """
    arguments = ("--image_path", IMAGES / "astronaut.png", "--vae_model_name", VAE, "--megapixels", "16", "--device", "cpu")
    command = [sys.executable, str(PROJECT / "main.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        ready, deadline = tmp_path / "output", time.monotonic() + PATIENCE_S  # created when all is ready for the encode
        while not ready.is_dir() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)  # 16 megapixels take a CPU a hundred times as long
        interrupt(process, main_thread=taken_by == "main thread")
        output, errors = process.communicate()
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "Error: Interrupted."
    assert "Traceback" not in errors
    assert list((tmp_path / "output").iterdir()) == []


def test_interrupt_while_modules_are_imported_shows_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C in the first half second ends the process as a signal does, with no output."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'cloup': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    command = [sys.executable, str(PROJECT / "main.py"), "--version"]
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def powerless() -> list[str]:
    """Return the prefix with which root obeys file permissions; it is empty for other users."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def test_unreadable_file_is_image_invalid(tmp_path: Path, run_main: RunMain) -> None:
    """The error response has the system's reason."""
    image = tmp_path / "secret.png"
    shutil.copy(IMAGES / "photo.jpg", image)
    image.chmod(0)
    done = run_main("--image_path", image, *TINY, prefix=powerless())
    response = json.loads(done.stdout)
    assert (done.returncode, response["error_code"]) == (1, "IMAGE_INVALID")
    assert response["error_message"] == f"Image file cannot be read: {image} (Permission denied)"


def test_read_only_output_folder_is_not_writable(tmp_path: Path, run_main: RunMain) -> None:
    """A read-only output folder is noticed before the encode, and the response has the system's reason."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    done = run_main("--image_path", IMAGES / "photo.jpg", *TINY, "--output_dir", folder, prefix=powerless())
    response = json.loads(done.stdout)
    assert (done.returncode, response["error_code"]) == (2, "OUTPUT_DIR_NOT_WRITABLE")
    assert response["error_message"] == f"Cannot write to output folder: {folder} (Permission denied)"


def test_full_disk_is_found_before_the_encode(tmp_path: Path, run_main: RunMain) -> None:
    """A full disk is OUTPUT_DIR_NOT_WRITABLE with the needed and the free size, and leaves no file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=16k tmpfs '{disk}' && \"$@\"; status=$?; ls -A '{disk}' >&2; exit $status"
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk in a namespace of their own")
    done = run_main("--image_path", IMAGES / "photo.jpg", *TINY, "--output_dir", disk, prefix=prefix)
    response = json.loads(done.stdout)
    assert (done.returncode, response["error_code"]) == (1, "OUTPUT_DIR_NOT_WRITABLE")
    start = f"Cannot write to output folder: {disk} (the files may need 0."
    assert response["error_message"].startswith(start)
    assert response["error_message"].endswith(" MB, 0.0 MB are free)")
    assert json.loads(done.stderr.splitlines()[-1])["event"] == "request failed", "a file was left on the disk"


def test_file_that_does_not_fit_leaves_nothing(tmp_path: Path, run_main: RunMain) -> None:
    """A disk that fills up during the encode leaves no file; a limit on the size of files takes its place here."""
    prefix = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash"]  # kilobytes: more than the image, less than the latent
    done = run_main("--image_path", IMAGES / "photo.jpg", *TINY, "--output_dir", tmp_path / "out", prefix=prefix)
    response = json.loads(done.stdout)
    assert (done.returncode, response["error_code"]) == (1, "OUTPUT_DIR_NOT_WRITABLE")
    assert response["error_message"] == f"Cannot write to output folder: {tmp_path / 'out'} (File too large)"
    assert list((tmp_path / "out").iterdir()) == []
