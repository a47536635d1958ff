"""The fingerprint: it changes with everything that changes the result."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from config import Settings
from latent_encoder.comfy_runtime import checksum_of_package
from latent_encoder.outputs import metadata
from latent_encoder.outputs.metadata import fingerprint
from models import EncodeRequest
from service import LatentEncoder
from tests.helpers import VAE, request_for

IMAGE = "0" * 64


@pytest.fixture
def fingerprint_with(encoder: LatentEncoder, settings: Settings, tmp_path: Path) -> Callable[..., str]:
    """Return a function that gives the fingerprint of one request, with other fields or parts of it."""
    request = request_for(settings, tmp_path, "photo.jpg", {})
    vae = encoder.vaes.get(VAE)

    def fingerprint_with(
        place: str = "latent_x.pt", image: str = IMAGE, runtime: Any = (), vae_parts: Any = (), **fields: Any
    ) -> str:
        other = copy.copy(encoder.runtime)
        vars(other).update({"decoder": "Pillow", **dict(runtime)})
        asked: EncodeRequest = request.model_copy(update=fields)
        return fingerprint(asked, place, image, replace(vae, **dict(vae_parts)), other)

    return fingerprint_with


@pytest.mark.parametrize(
    "change",
    [
        {"place": "latent_y.pt"},
        {"image": "1" * 64},
        {"upscale_method": "area"},
        {"megapixels": 0.5},
        {"fit": "exact"},
        {"alpha": "black"},
        {"runtime": {"version": "another"}},
        {"runtime": {"decoder": "PyAV"}},
        {"runtime": {"custom_nodes": {"package": IMAGE}}},
        {"vae_parts": {"sha256": IMAGE}},
        {"vae_parts": {"single_frame": None}},
        {"vae_parts": {"vae": SimpleNamespace(vae_dtype=torch.bfloat16, device=torch.device("cpu"))}},
        {"vae_parts": {"vae": SimpleNamespace(vae_dtype=torch.float32, device=torch.device("cuda:0"))}},
        {"vae_parts": {"single_frame": SimpleNamespace(compiled=True)}},
    ],
    ids=str,
)
def test_fingerprint_has_each_part(change: dict[str, Any], fingerprint_with: Callable[..., str]) -> None:
    """Another input, VAE, precision, kind of device, encoder, decoder, ComfyUI or custom node gives another fingerprint."""
    assert fingerprint_with() == fingerprint_with()
    assert fingerprint_with(**change) != fingerprint_with()


def test_fields_that_came_later_change_no_fingerprint(
    fingerprint_with: Callable[..., str], encoder: LatentEncoder, settings: Settings
) -> None:
    """The fingerprint of a request without the field `alpha` is that of the versions before it, so stored files stay valid."""
    vae = encoder.vaes.get(VAE)
    before = (
        *(metadata.RESULT_VERSION, IMAGE, vae.sha256, vae.dtype, vae.encoder, vae.compiled, "cpu"),
        *("lanczos", settings.megapixels, "crop"),
        *(encoder.runtime.version, "Pillow", encoder.runtime.custom_nodes, torch.__version__.partition("+")[0]),
        "latent_x.pt",
    )
    assert fingerprint_with() == hashlib.sha256(json.dumps(before).encode()).hexdigest()


def test_fingerprint_has_the_versions_that_compute(
    fingerprint_with: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our encoder's version and torch's count; torch's build and the number of a GPU do not."""

    def on(device: str) -> str:
        return fingerprint_with(vae_parts={"vae": SimpleNamespace(vae_dtype=torch.float32, device=torch.device(device))})

    assert on("cuda:0") == on("cuda:1")
    first = fingerprint_with()
    monkeypatch.setattr(torch, "__version__", torch.__version__.partition("+")[0] + "+build")
    assert fingerprint_with() == first
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    second = fingerprint_with()
    monkeypatch.setattr(metadata, "RESULT_VERSION", metadata.RESULT_VERSION + 1)
    assert len({first, second, fingerprint_with()}) == 3


def test_checksum_of_a_node_package_is_that_of_its_code(tmp_path: Path) -> None:
    """A changed, renamed or new Python file counts; other files and the place do not. A package may be a single module."""
    package = tmp_path / "package"
    (package / "nodes").mkdir(parents=True)
    (package / "__init__.py").write_text("a = 1")
    (package / "nodes" / "more.py").write_text("b = 1")
    first = checksum_of_package(package)
    (package / "weights.bin").write_bytes(b"0")
    assert checksum_of_package(package.rename(tmp_path / "elsewhere")) == first
    package = tmp_path / "elsewhere"
    seen = {first}
    (package / "nodes" / "more.py").write_text("b = 2")
    seen.add(checksum_of_package(package))
    (package / "nodes" / "more.py").rename(package / "more.py")
    seen.add(checksum_of_package(package))
    (package / "third.py").touch()
    seen.add(checksum_of_package(package))
    seen.add(checksum_of_package(package / "more.py"))
    assert len(seen) == 5
