"""`--mode compare`: both encoders on one image, as processes, in JSON and as a table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest

from config import Settings
from latent_encoder.comparison.report import Comparison, as_json, as_text
from latent_encoder.comparison.sides import Facts, Result, Side
from models import EncodeRequest
from tests.helpers import IMAGES, PATIENCE_S, PROJECT, TINY_VAE, RunMain, clean_environment, interrupt
from tests.terminals import PLAIN

OLDER_TREE = PROJECT / "tests" / ".comfyui-0.3.52"
PHOTO = IMAGES / "photo.jpg"
COMPARE = ("--mode", "compare", "--vae-model-name", TINY_VAE, "--megapixels", "0.03")

FACTS: dict[str, Any] = {
    "comfyui_version": "0.3.75",
    "encoder": "stock",
    "encoder_reason": "ENCODER=stock",
    "vae_dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "scaled_size": (64, 80),
    "seconds": [3.0, 1.0, 2.0],
    "peak_bytes": 2_000_000_000,
    "gpu_peak_bytes": None,
    "tiled": False,
}


def result(name: str, latent: np.ndarray | None, error: str | None = None, **changes: Any) -> Result:
    """Return a side's result with these facts; without facts if it has an error."""
    facts = None if error else Facts(**{**FACTS, **changes})
    return Result(Side(name, Settings(_env_file=None)), facts, latent, error)


def comparison(*results: Result) -> Comparison:
    return Comparison(EncodeRequest(image_path="a\x1b[31m.png"), results)


def test_interrupt_that_another_thread_takes() -> None:
    """Ctrl-C during an encode ends the comparison with status 130, whichever thread the system hands the signal to."""
    command = [sys.executable, str(PROJECT / "main.py"), *COMPARE[:-1], "16", "--log-format", "json", str(PHOTO)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=clean_environment()) as process:
        assert process.stderr is not None
        while "WanVAE" not in (line := process.stderr.readline()):  # ComfyUI's message, from the process that encodes
            assert line, "it ended before"
        interrupt(process, main_thread=False)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "Error: Interrupted."


def test_json_in_a_pipe(run_main: RunMain) -> None:
    """Each image is one JSON line; both sides have times and memory of a real encode, and nearly the same latent."""
    done = run_main(*COMPARE, PHOTO, IMAGES / "grey.png")
    assert done.returncode == 0, done.stderr
    photo, grey = map(json.loads, done.stdout.splitlines())
    assert (photo["image_path"], grey["image_path"]) == (str(PHOTO), str(IMAGES / "grey.png"))
    stock, ours = photo["sides"]
    assert (stock["encoder"], ours["encoder"]) == ("stock", "single-frame")
    assert stock["max_abs_difference"] == 0
    assert 0 < ours["max_abs_difference"] < 2e-5 < photo["latent_deviation"]
    for side in (stock, ours):
        assert min(side["seconds"]) > 0
        assert side["peak_bytes"] > 200e6  # torch alone takes more


def test_table_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal there is a table, and a tree whose encoder cannot take the VAE is a failed row with its reason below."""
    terminal = pexpect.spawn(
        sys.executable,
        [str(PROJECT / "main.py"), *COMPARE, "--comfyui", str(OLDER_TREE), str(PHOTO)],
        cwd=str(tmp_path),
        env=PLAIN,
        dimensions=(24, 160),
        timeout=PATIENCE_S,
        encoding="utf-8",
    )
    screen = terminal.read()
    terminal.close()
    assert terminal.exitstatus == 1
    assert re.search(r"^ComfyUI [\d.]+ +\S+ s +[\d.]+ GB +- +stock", screen, re.MULTILINE)
    assert re.search(r"^Latent Encoder +\S+ s +[\d.]+ GB +\S+e-\d\d +single-frame", screen, re.MULTILINE)
    assert re.search(rf"^ComfyUI in {re.escape(str(OLDER_TREE))} .*failed", screen, re.MULTILINE)
    assert f"Error: ComfyUI in {OLDER_TREE}: VAE model {TINY_VAE} cannot be used" in screen


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "Compare mode needs an image"),
        (["gone.png"], 2, "Image file not found: gone.png"),
        ([str(IMAGES / "truncated.jpg")], 1, "truncated.jpg"),
        (["--vae-model-name", "tiny_qwen_vea.safetensors", str(PHOTO)], 2, "Did you mean tiny_qwen_vae.safetensors?"),
        (["--output-dir", "x", str(PHOTO)], 2, "--output-dir is for --mode"),
    ],
)
def test_wrong_input(arguments: list[str], status: int, text: str, run_main: RunMain, tmp_path: Path) -> None:
    """Errors name the fault without a traceback, and no file is left."""
    done = run_main(*COMPARE, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (status, False)
    assert text in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_differences_and_ratios() -> None:
    """Differences are from the first side; time and memory are the service's in parts of the first side's."""
    zeros = np.zeros((1, 4, 2, 2), np.float32)
    ours = zeros.copy()
    ours[0, 0, 0, 0] = 0.5
    found = comparison(result("ComfyUI", zeros), result("Latent Encoder", ours, seconds=[0.5], peak_bytes=500_000_000))
    sides = json.loads(as_json(found))["sides"]
    assert [(side["max_abs_difference"], side["mean_abs_difference"]) for side in sides] == [(0, 0), (0.5, 0.5 / 16)]
    assert [side["median_s"] for side in sides] == [2, 0.5]
    assert "takes 0.25 of the time of ComfyUI's, and its process 0.25 of the memory" in as_text(found, 100)


def test_other_shape_and_failures() -> None:
    """A latent of another shape has no difference; if ComfyUI's own encode fails, nothing is compared with it."""
    small, large = np.zeros((1, 4, 2, 2), np.float32), np.zeros((1, 4, 2, 3), np.float32)
    assert "another shape" in as_text(comparison(result("ComfyUI", small), result("Latent Encoder", large)), 100)
    failed = comparison(result("ComfyUI", None, "out of memory"), result("Latent Encoder", large))
    assert "failed" in as_text(failed, 100)
    assert "of the time" not in as_text(failed, 100)
    assert json.loads(as_json(failed))["sides"][0]["error"] == "out of memory"


@pytest.mark.parametrize("columns", [42, 100])
def test_narrow_terminal(columns: int) -> None:
    """No line of the figures is wider than the terminal, and a file's name cannot control it."""
    zeros = np.zeros((1, 4, 2, 2), np.float32)
    text = as_text(comparison(result("ComfyUI", zeros), result("Latent Encoder", zeros)), columns)
    assert "\x1b" not in text
    assert all(len(line) <= columns for line in text.split("\n\n")[1].splitlines())
