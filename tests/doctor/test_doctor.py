"""Tests of doctor mode: each fault is found with its next step, no check stops another, and nothing is changed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from config import Settings, load_settings, origins_of, usable_settings
from errors import SetupError, VaeModelInvalid
from latent_encoder.doctor import machine
from latent_encoder.doctor.check import Check, Examine, Installation, State, guarded, tick
from latent_encoder.doctor.comfyui import check_nodes, check_tree
from latent_encoder.doctor.folders import check_allowed_folders, check_output_dir
from latent_encoder.doctor.machine import check_memory
from latent_encoder.doctor.models import check_models
from latent_encoder.doctor.network import check_http_port, check_kafka
from latent_encoder.doctor.python import check_python
from latent_encoder.doctor.report import line, worst
from latent_encoder.doctor.settings import check_env_file, check_faults, check_set
from latent_encoder.doctor.torch_and_device import check_device, check_torch
from latent_encoder.installer.checksums import record_checksums
from latent_encoder.installer.download_vae import QWEN_IMAGE_VAE
from latent_encoder.releases import TESTED, is_tested
from latent_encoder.telemetry.health import Health
from latent_encoder.telemetry.http_server import http_server
from latent_encoder.terminal import encodable
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.cli.test_cli import powerless
from tests.helpers import PROJECT, TINY_VAE, VAE, RunMain
from tests.kafka_tools import Bench
from tests.trees import FACTS, needs_pixel_space

TICK, WARNING, CROSS = State


def examined(
    examine: Examine, settings: Settings, given: tuple[str, ...] = (), encoder: LatentEncoder | SetupError | None = None
) -> list[Check]:
    """Return the checks of one function with these settings, of which those in `given` count as set."""
    origins = {field: "environment" if field in given else "default" for field in Settings.model_fields}
    installation = Installation(settings, origins)
    if encoder is not None:
        installation.__dict__["encoder"] = encoder
    checks = list(examine(installation))
    assert all(check.advice for check in checks if check.state is not TICK), "what to do about it is missing"
    assert not any(check.advice for check in checks if check.state is TICK)
    return checks


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


def named(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder without `.env`, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path


@pytest.mark.core
def test_good_installation_is_status_0(tmp_path: Path, run_main: RunMain) -> None:
    """A good installation gives status 0 and one JSON document, leaves no file, and its missing broker is a warning."""
    done = run_main("--mode", "doctor", "--json", "--vae_model_name", VAE, env={"HTTP_PORT": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["worst"] == "warning", "the trial VAE is one, and so is a release of which not all nodes can be tried"
    names = {check["name"] for check in report["checks"]}
    assert names >= {"python", "torch", "torchvision", "device", "memory", "comfyui", "nodes", "vae file", "default vae"}
    assert names >= {"setting", "defaults", ".env", "output folder", "output disk", "kafka broker", "http port"}
    assert {frozenset(check) for check in report["checks"]} == {frozenset({"group", "name", "state", "found", "advice"})}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.core
def test_bad_installation_is_status_1_and_every_fault_is_told(tmp_path: Path, run_main: RunMain) -> None:
    """Every fault is reported as text in the terminal's width and encoding, without a traceback, and the status is 1."""
    (tmp_path / "read_only").mkdir(mode=0o555)
    (tmp_path / ".env").write_text("MEGAPIXEL=2\nDEVICE=cpu\nOTHERS=1\n")
    environment = {
        "COMFYUI_PATH": "/nowhere",
        "MEGAPIXELS": "17",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "KAFKA_SASL_PASSWORD": "geheim",
        "OUTPUT_DIR": "read_only",
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "70",
    }
    done = run_main("--mode", "doctor", env=environment, prefix=powerless())
    assert done.returncode == 1
    assert done.stdout.isascii()
    for shown in (
        "  x setting: MEGAPIXELS: Input should be less than or equal to 16 (got",
        "  + setting: DEVICE=cpu (.env)",
        "  + setting: KAFKA_SASL_PASSWORD=********** (environment)",
        "  ! .env: MEGAPIXEL is no setting",
        "    Did you mean MEGAPIXELS?",
        "  x comfyui: No ComfyUI in /nowhere: nodes.py, folder_paths.py, comfy\n",
        "  x kafka broker: 127.0.0.1:1 cannot be reached",
    ):
        assert f"\n{shown}" in done.stdout
    unwrapped = " ".join(done.stdout.split())
    assert f"x output folder: {tmp_path}/read_only cannot be written to (Permission denied)" in unwrapped
    assert "Run ./setup_comfyui.sh, or set COMFYUI_PATH" in unwrapped
    assert "(Connect to ipv4#127.0.0.1:1 failed: Connection refused" in unwrapped.replace("127.0.0.1:1/bootstrap: ", "")
    assert "geheim" not in done.stdout + done.stderr
    assert "OTHERS" not in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_other_modes_still_refuse_such_settings(run_main: RunMain) -> None:
    """Settings with which the doctor goes on are wrong usage in other modes."""
    done = run_main("--mode", "health", env={"MEGAPIXELS": "17", "DEVICE": "tpu"})
    assert done.returncode == 2
    assert "MEGAPIXELS: Input should be" in done.stderr
    assert "DEVICE: Input should be" in done.stderr


def test_full_disk_is_a_cross(tmp_path: Path) -> None:
    """A disk of 16 kilobytes, on which the files of one request do not fit, is a cross."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "from config import *; from latent_encoder.doctor.check import *\n"
        "from latent_encoder.doctor.folders import check_output_dir; "
        f"settings = load_settings({{'output_dir': '{disk}'}}); "
        "print([(check.name, check.state.value) for check in check_output_dir(Installation(settings, origins_of({})))])"
    )
    mount = f"mount -t tmpfs -o size=16k tmpfs '{disk}' && \"$@\""
    prefix = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system lets nobody mount a small disk in a namespace of their own")
    command = [*prefix, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stdout == "[('output folder', 'tick'), ('output disk', 'cross')]\n", done.stderr


def node_package_that_exits(_: Installation) -> Iterator[Check]:
    yield tick("first", "fine")
    raise SystemExit("a node package ended the process")


def test_check_that_fails_itself_is_a_cross(settings: Settings) -> None:
    """A function that fails, even by exiting, becomes a cross, and its earlier checks are kept."""
    place = f"{__name__}.{node_package_that_exits.__name__}"
    first, second = examined(lambda installation: guarded("nodes", place, installation), settings)
    assert (first.name, first.state) == ("first", TICK)
    assert (second.name, second.state) == ("nodes", CROSS)
    assert "SystemExit: a node package ended the process" in second.found


@pytest.mark.core
def test_torch_that_cannot_be_imported_stops_no_other_check(tmp_path: Path, run_main: RunMain) -> None:
    """A torch that cannot be imported, as an interrupted pip leaves it, stops no other check."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run_main("--mode", "doctor", "--json", env={"PYTHONPATH": str(tmp_path), "HTTP_PORT": "0"})
    assert (done.returncode, done.stderr) == (1, "")
    checks = json.loads(done.stdout)["checks"]
    states = {check["name"]: check["state"] for check in checks}
    assert (states["torch"], states["python"], states["defaults"], states["http port"]) == ("cross", "tick", "tick", "tick")
    assert any("OSError: libcudart.so.13: cannot open shared object file" in check["found"] for check in checks)


def test_python_and_torch_of_this_machine_are_fine(settings: Settings) -> None:
    """Python and torch of the tests are ticks, and this Python is among the tested ones."""
    for check in (*examined(check_python, settings), *examined(check_torch, settings)):
        assert check.state is TICK
    assert "tested" not in named(examined(check_python, settings), "python").found
    assert named(examined(check_torch, settings), "torch").found == torch.__version__


@pytest.mark.core
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_a_cross_and_comfyui_loads_all_the_same(settings: Settings, encoder: LatentEncoder) -> None:
    """A missing device is reported once, by its own check, and ComfyUI loads on another device."""
    wrong = changed(settings, device="cuda", comfyui_path=encoder.runtime.path)
    device, threads = examined(check_device, wrong)
    assert (device.state, threads.state) == (CROSS, TICK)
    assert device.found.startswith("DEVICE=cuda, but torch")
    nodes, decoder = examined(check_nodes, wrong)[:2]
    assert (nodes.state, decoder.state) == (TICK, TICK)


def test_memory_is_what_the_container_allows(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's limit below the need of an encode is a warning; more megapixels need more."""
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMIT", limit)
    limit.write_text("1000000000\n")
    (check,) = examined(check_memory, settings)
    assert (check.state, check.found) == (WARNING, "1.0 GB available; MEGAPIXELS=0.02 takes about 1.2 GB to encode on a CPU")
    (check,) = examined(check_memory, changed(settings, megapixels=16.0))
    assert check.found.endswith("about 2.5 GB to encode on a CPU")


def test_output_folder_that_is_not_there_is_not_made(settings: Settings, tmp_path: Path) -> None:
    """An output folder that can be made is a tick, and is not made."""
    folder = tmp_path / "a" / "b"
    checks = examined(check_output_dir, changed(settings, output_dir=str(folder)))
    assert [check.state for check in checks] == [TICK, TICK]
    assert checks[0].found == f"{folder} can be made"
    assert list(tmp_path.iterdir()) == []


def test_output_folder_has_to_be_a_folder_that_is_allowed(settings: Settings, tmp_path: Path) -> None:
    """A file in place of the output folder, or a list of allowed folders without it, is a cross."""
    (tmp_path / "file").touch()
    (check,) = examined(check_output_dir, changed(settings, output_dir=str(tmp_path / "file")))
    assert (check.state, check.found) == (CROSS, f"{tmp_path}/file cannot be written to (Not a directory)")
    limited = changed(settings, output_dir=str(tmp_path), allowed_output_dirs=(tmp_path / "only",))
    (check,) = examined(check_output_dir, limited)
    assert check.state is CROSS
    assert "does not lead into a folder of ALLOWED_OUTPUT_DIRS" in check.found
    inputs, outputs = examined(check_allowed_folders, limited)
    assert (inputs.state, outputs.state, outputs.found) == (TICK, WARNING, f"missing: {tmp_path}/only")


@pytest.mark.core
def test_tree_says_where_it_is_from(settings: Settings, tmp_path: Path) -> None:
    """A tree that setup filled is shown with its source, a git checkout with its commit; changed files are a warning."""
    (tmp_path / "comfy").mkdir()
    for name in ("nodes.py", "folder_paths.py"):
        (tmp_path / name).write_text("# changed\n")
    for command in (["init", "-q"], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    tree, files = examined(check_tree, changed(settings, comfyui_path=tmp_path), encoder=SetupError("it does not load"))
    assert tree.found == f"{tmp_path}, a git checkout, commit {commit}"
    assert files.state is WARNING
    assert "missing or differ from release 0.3.75: " in files.found
    (tmp_path / ".source.json").write_text(json.dumps({"source": str(tmp_path)}))
    tree, _ = examined(check_tree, changed(settings, comfyui_path=tmp_path), encoder=SetupError("it does not load"))
    assert tree.found == f"{tmp_path}, a copy of {tmp_path}, commit {commit}"


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("0.33.0", TICK, "0.33.0 is tested"),
        ("9.9.9", WARNING, "9.9.9 is not tested"),
        (None, WARNING, "unknown is not tested"),
    ],
)
def test_fetched_release_is_known_by_its_recorded_sums(
    settings: Settings, tmp_path: Path, version: str | None, state: State, words: str
) -> None:
    """A fetched release is a tick if it is tested, else a warning; changed files are counted and named."""
    (tmp_path / "comfy").mkdir()
    for name in ("nodes.py", "folder_paths.py"):
        (tmp_path / name).write_text("# theirs\n")
    if version:
        (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    record_checksums(tmp_path)
    source = {"source": "v0.33.0", "repository": "https://example.org/ComfyUI.git", "commit": "783545f6" + "0" * 32}
    (tmp_path / ".source.json").write_text(json.dumps(source))
    broken = SetupError("it does not load")
    tree, files = examined(check_tree, changed(settings, comfyui_path=tmp_path), encoder=broken)
    release = "release v0.33.0 (commit 783545f6)"
    assert tree.found == f"{tmp_path}, {release} as setup_comfyui.sh fetched it from https://example.org/ComfyUI.git"
    assert (files.state, files.found) == (state, f"those of {release}, by the checksums recorded when it was fetched; {words}")
    (tmp_path / "nodes.py").write_text("# changed\n")
    _, files = examined(check_tree, changed(settings, comfyui_path=tmp_path), encoder=broken)
    assert (files.state, files.found) == (WARNING, f"1 are missing or have changed since {release} was fetched: nodes.py")
    assert "./setup_comfyui.sh --release v0.33.0" in files.advice


@pytest.mark.parametrize(("version", "state"), [("0.33.0", TICK), ("9.9.9", WARNING)])
def test_checkout_is_tested_by_its_own_word(settings: Settings, tmp_path: Path, version: str, state: State) -> None:
    """A tree without recorded checksums counts by the version that it states; an untested one is a warning."""
    (tmp_path / "comfy").mkdir()
    for name in ("nodes.py", "folder_paths.py"):
        (tmp_path / name).write_text("# theirs\n")
    (tmp_path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    _, files = examined(check_tree, changed(settings, comfyui_path=tmp_path), encoder=SetupError("it does not load"))
    assert files.state is state
    assert files.found.startswith(f"states version {version}; {version} is ")
    assert (TESTED in files.advice) is (state is WARNING)


@pytest.mark.core
@pytest.mark.pinned_release(reason="its sums")
def test_tree_of_the_tests_is_the_pinned_release(settings: Settings, encoder: LatentEncoder) -> None:
    """The pinned release is recognised by its checksums."""
    tree, files = examined(check_tree, settings, encoder=encoder)
    assert (tree.state, files.found) == (TICK, "those of release 0.3.75, by their SHA-256 checksums")


@pytest.mark.core
def test_tick_for_the_nodes_means_that_they_ran(settings: Settings, encoder: LatentEncoder) -> None:
    """Nodes that need a VAE are tried too if this release has a built-in VAE; else they are a warning."""
    nodes, decoder, *rest = examined(check_nodes, settings, encoder=encoder)
    ran = "LoadImage, ImageScaleToTotalPixels"
    ran = f"VAELoader, {ran}, VAEEncode" if FACTS.has_pixel_space else ran
    assert (nodes.state, decoder.state) == (TICK, TICK)
    assert nodes.found.startswith(f"ComfyUI {FACTS.version} ran {ran} on a test image, on ")
    assert decoder.found.startswith(("Pillow ", "PyAV "))
    not_tried = f"ComfyUI {FACTS.version} loads VAELoader, VAEEncode, which were not tried"
    assert [(check.state, check.found) for check in rest] == ([] if FACTS.has_pixel_space else [(WARNING, not_tried)])


@pytest.mark.core
def test_tested_release_is_a_tick(settings: Settings, encoder: LatentEncoder) -> None:
    """A tested release is a tick, an untested one a warning; the report names the tree's version."""
    tree, files = examined(check_tree, settings, encoder=encoder)
    assert (tree.state, files.state) == (TICK, TICK if is_tested(FACTS.version) else WARNING)
    assert FACTS.version in files.found or files.state is WARNING


@pytest.mark.core
def test_comfyui_that_does_not_load_is_a_cross(settings: Settings) -> None:
    """A ComfyUI that does not load is a cross with the reason, and its models are not searched."""
    broken = SetupError("ComfyUI in /x cannot be loaded: No module named 'einops'. Install what it needs.")
    (nodes,) = examined(check_nodes, settings, encoder=broken)
    assert (nodes.state, nodes.advice) == (CROSS, "Install what it needs.")
    assert nodes.found == "ComfyUI in /x cannot be loaded: No module named 'einops'"
    (folder,) = examined(check_models, settings, encoder=broken)
    assert folder.state is WARNING


@pytest.mark.core
def test_every_vae_file_is_named_with_its_family(settings: Settings, encoder: LatentEncoder, model_dir: Path) -> None:
    """Each VAE file is named with its family; a damaged one is a cross, another file with the real VAE's name a warning."""
    damaged, impostor = model_dir / "damaged.safetensors", model_dir / QWEN_IMAGE_VAE.name
    damaged.write_bytes((PROJECT / "tiny_vae" / TINY_VAE).read_bytes()[:5000])
    shutil.copy(PROJECT / "tiny_vae" / TINY_VAE, impostor)
    try:
        checks = examined(check_models, changed(settings, vae_model_name=impostor.name), encoder=encoder)
    finally:
        damaged.unlink()
        impostor.unlink()
    files = [check for check in checks if check.name == "vae file"]
    found = {Path(re.split(": | cannot be used", check.found)[0]).name: check for check in files}
    assert found["damaged.safetensors"].state is CROSS
    assert found[impostor.name].state is WARNING
    assert "not the file that is published under this name" in found[impostor.name].found
    assert found[TINY_VAE].state is TICK
    assert found[TINY_VAE].found.endswith(
        "Wan 2.1 / Qwen-Image, 1.9 MB, can be loaded, "
        "SHA-256 fe17b23e0be2d10e41096c3866df394eac0ef26030c846d18b4cc217a39ba45b, for trying the service only"
    )
    assert any("TAESD" in check.found for check in found.values())
    assert any("SD 1.x" in check.found for check in found.values())
    assert named(checks, "default vae").state is (TICK if VAE == TINY_VAE else CROSS)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "state", "advice"),
    [
        (QWEN_IMAGE_VAE.name, CROSS, "./setup_comfyui.sh --download-vae gets it."),
        ("tiny_qwen_va.safetensors", CROSS, f"Did you mean {TINY_VAE}?"),
        (TINY_VAE, *((WARNING, "./setup_comfyui.sh --download-vae") if VAE == TINY_VAE else (CROSS, "VAE_MODEL_NAME"))),
        pytest.param("pixel_space", TICK, "", marks=needs_pixel_space),
        ("taesd", TICK, ""),
    ],
)
def test_default_vae_has_to_be_there(name: str, state: State, advice: str, settings: Settings, encoder: LatentEncoder) -> None:
    """A missing default VAE is a cross with the next step or a similar name; the tiny VAE is a warning."""
    check = named(examined(check_models, changed(settings, vae_model_name=name), encoder=encoder), "default vae")
    assert check.state is state
    assert advice in check.advice


@pytest.mark.core
def test_default_vae_has_to_encode(settings: Settings, encoder: LatentEncoder, model_dir: Path) -> None:
    """An intact file without a VAE is a cross with ComfyUI's reason; a tick names the encoder that ran."""
    save_file({"weight": torch.zeros(3, 3)}, model_dir / "no_vae.safetensors")
    try:
        checks = examined(check_models, changed(settings, vae_model_name="no_vae.safetensors"), encoder=encoder)
    finally:
        (model_dir / "no_vae.safetensors").unlink()
    check = named(checks, "default vae")
    assert (check.state, check.advice) == (CROSS, "Set VAE_MODEL_NAME to another one.")
    assert "ComfyUI recognises no VAE in it" in check.found
    check = named(examined(check_models, changed(settings, vae_model_name="taesd"), encoder=encoder), "default vae")
    assert check.found == "taesd (VAE_MODEL_NAME) encodes a test image with the stock encoder"


@pytest.mark.core
def test_default_vae_is_judged_as_by_a_request(settings: Settings, encoder: LatentEncoder, model_dir: Path) -> None:
    """A file whose headers are right and whose values are not is a cross as the default VAE, with the words of a request."""
    weights = load_file(model_dir / "vae" / "random_kl.safetensors")
    weights["quant_conv.weight"] = weights["quant_conv.weight"].float() * 1e6
    path = model_dir / "vae" / "too_large.safetensors"
    save_file(weights, path)
    try:
        checks = examined(check_models, changed(settings, vae_model_name=path.name), encoder=encoder)
        with pytest.raises(VaeModelInvalid) as refused:
            encoder.vaes.get(path.name)
    finally:
        path.unlink()
    check = named(checks, "default vae")
    assert (check.state, check.found) == (CROSS, str(refused.value).removesuffix("."))
    assert "from a test image it makes values of about " in check.found


@pytest.mark.core
def test_file_that_no_request_can_use_is_no_tick(settings: Settings, encoder: LatentEncoder, model_dir: Path) -> None:
    """Half of a TAESD pair and a VAE for audio are warnings; a VAE without tensors of its encoder is a cross."""
    audio, half = model_dir / "vae" / "audio.safetensors", model_dir / "vae_approx" / "taef1_encoder.safetensors"
    lacking = model_dir / "vae" / "lacking.safetensors"
    save_file({"vocoder.backbone.channel_layers.0.0.bias": torch.zeros(128)}, audio)
    save_file({"14.weight": torch.zeros(16, 64, 3, 3)}, half)
    weights = load_file(model_dir / "vae" / "random_kl.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if not name.startswith("encoder.mid")}, lacking)
    try:
        checks = examined(check_models, settings, encoder=encoder)
    finally:
        for path in (audio, half, lacking):
            path.unlink()
    found = {Path(check.found.partition(": ")[0]).name: check for check in checks if check.name == "vae file"}
    assert found[audio.name].state is WARNING
    assert "a VAE for audio" in found[audio.name].found
    assert (found[half.name].state, found[half.name].advice) == (WARNING, "It needs both halves: get taef1_decoder too.")
    assert found[lacking.name].state is CROSS
    assert "lacks tensors that encoding needs: encoder.mid" in found[lacking.name].found


@pytest.mark.core
def test_model_folder_that_is_not_there_is_a_warning(settings: Settings, encoder: LatentEncoder, tmp_path: Path) -> None:
    """A MODEL_DIR that does not exist is a warning, and the searched folders are listed."""
    checks = examined(check_models, changed(settings, model_dir=tmp_path / "none"), encoder=encoder)
    folders = [check for check in checks if check.name == "model folder"]
    assert [check.state for check in folders][:2] == [WARNING, TICK]
    assert len(folders) > 2


def test_model_folder_that_is_a_loop_of_symlinks_is_a_warning(tmp_path: Path, run_main: RunMain) -> None:
    """A MODEL_DIR that is a loop of symlinks is a warning on every Python, and no check fails."""
    (tmp_path / "loop").symlink_to("loop")
    done = run_main("--mode", "doctor", "--json", env={"MODEL_DIR": "loop", "VAE_MODEL_NAME": TINY_VAE, "HTTP_PORT": "0"})
    states = [(check["name"], check["state"]) for check in json.loads(done.stdout)["checks"]]
    assert ("model folder", "warning") in states
    assert "cross" not in dict(states).values(), done.stdout


@pytest.mark.core
def test_broker_and_topics_are_looked_for(bench: Bench, settings: Settings) -> None:
    """A topic is shown with its partitions; a missing one is a cross unless it will be created."""
    there = bench.settings(settings)
    broker, *topics = examined(check_kafka, there, given=("kafka_bootstrap_servers",))
    assert (broker.state, [check.state for check in topics]) == (TICK, [TICK] * 3)
    assert topics[0].found == f"{bench.request_topic} has 1 partitions"
    missing = changed(there, kafka_dlq_topic="no-such-topic")
    assert worst(examined(check_kafka, missing, given=("kafka_bootstrap_servers",))) is CROSS
    assert worst(examined(check_kafka, missing)) is WARNING
    assert worst(examined(check_kafka, changed(missing, kafka_create_topics=True))) is TICK


def test_kafka_settings_that_cannot_be_used_are_a_cross(settings: Settings, tmp_path: Path) -> None:
    """A missing file of Kafka properties is a cross."""
    (check,) = examined(check_kafka, changed(settings, kafka_client_config=tmp_path / "none.properties"))
    assert check.state is CROSS
    assert "none.properties cannot be read" in check.found


def test_http_port_is_free_taken_or_a_workers(settings: Settings) -> None:
    """A taken port is a cross if Kafka is configured, else a warning; a worker's port is a tick."""
    ours = changed(settings, http_host="127.0.0.1", http_port=free_ports(1)[0])
    (free,) = examined(check_http_port, ours)
    assert (free.state, free.found) == (TICK, f"HTTP_PORT={ours.http_port} of HTTP_HOST=127.0.0.1 is free")
    with http_server(ours, Health(60.0)):
        (worker,) = examined(check_http_port, ours)
    assert (worker.state, worker.found.split(": ")[1]) == (TICK, "alive, not ready")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        theirs = changed(ours, http_port=other.getsockname()[1])
        for given, state in (((), WARNING), (("kafka_bootstrap_servers",), CROSS)):
            (taken,) = examined(check_http_port, theirs, given)
            assert taken.state is state
    (off,) = examined(check_http_port, changed(settings, http_port=0))
    assert off.state is TICK


def test_settings_tell_where_they_are_from(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting is shown with its source; an empty one counts as not set, and a secret shows as stars."""
    (in_empty_folder / ".env").write_text("MEGAPIXELS=2\nDEVICE=cpu\nKAFKA_SASL_PASSWORD=geheim\nMODEL_DIR=\n")
    monkeypatch.setenv("DEVICE", "auto")
    monkeypatch.setenv("HTTP_PORT", "")
    given = {"vae_model_name": "x.safetensors", "output_dir": None}
    found = [check.found for check in check_set(Installation(load_settings(given), origins_of(given)))]
    assert found[:-1] == [
        "KAFKA_SASL_PASSWORD=********** (.env)",
        "VAE_MODEL_NAME=x.safetensors (command line)",
        "MEGAPIXELS=2.0 (.env)",
        "DEVICE=auto (environment)",
    ]
    assert "HTTP_PORT=8080" in found[-1].split()
    assert "MODEL_DIR" not in found[-1]


def test_variable_that_looks_misspelt_is_a_warning(in_empty_folder: Path, settings: Settings) -> None:
    """A variable that resembles a setting is a warning; other variables, or no file, are fine."""
    assert [check.state for check in examined(check_env_file, settings)] == [TICK]
    (in_empty_folder / ".env").write_text("MEGAPIXEL=2\nVAE_MODEL=x\nCOMPOSE_PROJECT_NAME=mine\nDEVICE=cpu\n")
    *warnings, file = examined(check_env_file, settings)
    assert [(check.found, check.advice) for check in warnings] == [("MEGAPIXEL is no setting", "Did you mean MEGAPIXELS?")]
    assert file.found.endswith(".env sets 1 settings")


def test_env_file_that_cannot_be_read_is_a_fault(in_empty_folder: Path) -> None:
    """A `.env` that cannot be read is a cross, and the other checks go on without it."""
    (in_empty_folder / ".env").write_bytes(b"MEGAPIXELS=2\nOUTPUT_DIR=\xff\n")
    settings, faults = usable_settings({})
    installation = Installation(settings, origins_of({}), faults)
    (check,) = check_faults(installation)
    assert check.state is CROSS
    assert check.found == ".env: cannot be read (not UTF-8 in line 2)"
    assert settings.megapixels == 1.0
    (file,) = check_env_file(installation)
    assert file.found.endswith(".env sets 0 settings")


def test_lines_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines wrap with a hanging indent and a coloured mark; paths are not broken, and missing characters are in ASCII."""
    monkeypatch.setenv("COLUMNS", "30")
    path = "/a/very-long-path/" + "x" * 30
    text = line(Check("vae file", CROSS, f"{path} is damaged in its header", "Get it again … or remove it from there."))
    assert text.startswith("  \x1b[31m\x1b[1m✗\x1b[0m vae file:\n")
    assert click.unstyle(text).splitlines()[1:] == [
        f"    {path}",
        "    is damaged in its header",
        "    Get it again … or remove",
        "    it from there.",
    ]
    assert encodable("✓ ✗ … ä", "utf-8") == "✓ ✗ … ä"
    assert encodable("✓ ✗ … ä", "ascii") == "+ x ... \\xe4"
