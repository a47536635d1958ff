"""What the tests share: one encoder on the real ComfyUI runtime, real VAEs of every family, and real image files."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from config import Settings
from models import EncodeRequest
from service import LatentEncoder

PROJECT = Path(__file__).resolve().parent.parent
COMFYUI = PROJECT / "comfyui"
IMAGES = PROJECT / "tests" / "fixtures" / "test_images"
TINY_VAE = "tiny_qwen_vae.safetensors"

# No deadlines on a shared machine, and a first run that fills Hypothesis' tables is slow; CI tries the same inputs each time.
hypothesis_settings.register_profile(
    "project", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis_settings.load_profile("project")

RunMain = Callable[..., "subprocess.CompletedProcess[str]"]
Encode = Callable[..., Any]


def stock(*arguments: str | Path, comfyui: Path = COMFYUI) -> None:
    """Run plain ComfyUI, without our code, in a process of its own."""
    command = [sys.executable, PROJECT / "tests" / "stock_comfyui.py", comfyui, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random VAEs of the real architectures: SD-style KL, a TAESD pair, full-size Wan 2.1."""
    folder = tmp_path_factory.mktemp("models")
    stock("make-vaes", folder, "kl", "taesd", "wan")
    return folder


def clean_environment() -> dict[str, str]:
    """The environment without any of the service's settings, whatever the person who runs the tests has set."""
    variables = {name.upper() for name in Settings.model_fields}
    return {name: value for name, value in os.environ.items() if name not in variables}


@pytest.fixture(scope="session")
def settings(model_dir: Path) -> Settings:
    """The defaults, with what suits the tests."""
    for name in os.environ.keys() - clean_environment().keys():
        del os.environ[name]
    return Settings(_env_file=None, model_dir=model_dir, vae_model_name=TINY_VAE, megapixels=0.02, device="cpu")


@pytest.fixture(scope="session")
def encoder(settings: Settings) -> LatentEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what ComfyUI and its dependencies warn of while they are imported is not ours
        return LatentEncoder.set_up(settings)


@pytest.fixture
def encode(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """Encode one image into `tmp_path`; what is not given has the defaults of `settings`. Raises as the service does."""

    def encode(image: str | Path, **fields: Any) -> Any:
        return encoder.encode(request_for(settings, tmp_path, image, fields))

    return encode


@pytest.fixture
def answer(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Encode:
    """As `encode`, but every outcome is a response."""

    def answer(image: str | Path, **fields: Any) -> Any:
        return encoder.answer(request_for(settings, tmp_path, image, fields))

    return answer


def request_for(settings: Settings, folder: Path, image: str | Path, fields: Mapping[str, Any]) -> EncodeRequest:
    given = {"image_path": str(IMAGES / image), "output_dir": str(folder), "request_id": "test", **fields}
    return EncodeRequest.from_fields(given, settings.request_defaults)


def load_latent(path: str | Path) -> torch.Tensor:
    latent = torch.load(path, weights_only=True)
    assert isinstance(latent, torch.Tensor)
    return latent


@pytest.fixture
def run_main(tmp_path: Path) -> RunMain:
    """Run the command line as a process, in an empty folder, with an environment that has no settings of its own."""

    def run_main(*arguments: str | Path, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()) -> Any:
        command = [*prefix, sys.executable, PROJECT / "main.py", *arguments]
        environment = {**clean_environment(), **(env or {})}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return run_main
