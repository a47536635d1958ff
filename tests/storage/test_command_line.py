"""URLs on the command line: as images, in lists, and as the output folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import COMFYUI, IMAGES, VAE, RunMain
from tests.storage.conftest import Bucket
from tests.storage.web_server import WebServer, redirect

SIGNATURE = "X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=0123456789abcdef"
USUAL = ("--megapixels", "0.02", "--vae_model_name", VAE)
SETTINGS = {"COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu", "STORAGE_MAX_RETRIES": "0"}


def test_several_images_and_a_second_run(bucket: Bucket, web: WebServer, run_main: RunMain) -> None:
    """Images by s3, http, file and path give files in a bucket; a second run repeats the stored responses."""
    web.pages["/astronaut.png"] = (IMAGES / "astronaut.png").read_bytes()
    images = [bucket.add(), web.url(f"/astronaut.png?{SIGNATURE}"), f"file://{IMAGES}/astronaut.png", IMAGES / "photo.jpg"]
    arguments = ["--image_path", *images, "--output_dir", f"{bucket.url}/out", *USUAL]
    env = {**bucket.environment, **SETTINGS}
    first = run_main(*arguments, env=env)
    assert first.returncode == 0, first.stderr
    responses = [json.loads(line) for line in first.stdout.splitlines()]
    assert [response["status"] for response in responses] == ["success"] * 4
    assert responses[1]["image_path"] == web.url("/astronaut.png")
    again = run_main(*arguments[:2], web.url(f"/astronaut.png?{SIGNATURE}x"), *arguments[3:], env=env)
    assert again.returncode == 0, again.stderr
    assert [json.loads(line) for line in again.stdout.splitlines()] == responses
    for text in (first.stdout, first.stderr, again.stdout, again.stderr, *bucket.names()):
        assert "X-Amz" not in text
        assert bucket.environment["AWS_SECRET_ACCESS_KEY"] not in text


@pytest.mark.parametrize("verbose", [(), ("--verbose",), ("--debug",)])
def test_a_presigned_url_that_fails_is_told_without_its_query(
    web: WebServer, run_main: RunMain, tmp_path: Path, verbose: tuple[str, ...]
) -> None:
    """Whatever goes wrong with a presigned URL, its query is in no line of the output."""
    web.pages["/b.png"] = redirect(f"http://169.254.169.254/?{SIGNATURE}")
    lines = [{"image_path": web.url(f"{path}?{SIGNATURE}")} for path in ("/a.png", "/b.png", "/..%2fc.png")]
    lines.append({"image_path": f"https://user:pass-word@127.0.0.1:{web.port}/a.png?{SIGNATURE}"})
    lines.append({"image_path": web.url(f"/a.png?{SIGNATURE}{'x' * 5000}")})
    lines.append({"image_path": str(IMAGES / "photo.jpg"), "output_dir": web.url(f"/out?{SIGNATURE}")})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = run_main("--input-list", "list.jsonl", *USUAL, *verbose, env=SETTINGS)
    codes = [json.loads(line)["error_code"] for line in done.stdout.splitlines()]
    assert codes == ["IMAGE_NOT_FOUND", "ACCESS_DENIED", *["INVALID_REQUEST"] * 4]
    for text in (done.stdout, done.stderr):
        assert "X-Amz" not in text
        assert "pass-word" not in text


def test_an_endpoint_without_tls_is_explained(bucket: Bucket, run_main: RunMain) -> None:
    """An endpoint by http is refused without AWS_ALLOW_HTTP, and the message names that variable."""
    env = {**bucket.environment, **SETTINGS, "AWS_ALLOW_HTTP": ""}
    done = run_main("--image_path", bucket.add(), "--output_dir", f"{bucket.url}/out", *USUAL, env=env)
    assert done.returncode == 2
    assert "AWS_ALLOW_HTTP" in json.loads(done.stdout)["error_message"]


def test_help_and_local_runs_load_no_obstore(run_main: RunMain) -> None:
    """The package is loaded only if a URL of object storage comes."""
    done = run_main("--image_path", IMAGES / "photo.jpg", *USUAL, env={**SETTINGS, "PYTHONVERBOSE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "import 'obstore" not in done.stderr
