"""Tests on other ComfyUI trees than the pinned one: an older release, a newer node, and trees that cannot work."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latent_encoder.installer.placing import copy as copy_entry
from latent_encoder.installer.placing import place_runtime
from tests.helpers import COMFYUI, IMAGES, PROJECT, TINY_VAE, RunMain, load_latent, stock
from tests.newer_tree import INPUT_FOLDER_ENFORCED, require_resolution_steps

RELEASE_0_3_52 = PROJECT / "tests" / ".comfyui-0.3.52"
EXTRAS = "comfy_extras/nodes_post_processing.py"

# Loads small files only. With `FOR_GOOD`, it loads nothing more after it was given a file larger than the limit.
CHOOSY = """
class LoadImageOfSmallFiles(LoadImage):
    broken = False

    def load_image(self, image):
        if os.path.getsize(folder_paths.get_annotated_filepath(image)) > 200000:
            LoadImageOfSmallFiles.broken = FOR_GOOD
            raise ValueError("no such decoder")
        if self.broken:
            raise ValueError("out of order")
        return super().load_image(image)


NODE_CLASS_MAPPINGS["LoadImage"] = LoadImageOfSmallFiles
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the pinned release that a test may change."""
    copy = tmp_path / "tree"
    copy.mkdir()
    place_runtime(COMFYUI, copy, copy_entry)
    return copy


def encode_cases(comfyui: Path, model_dir: Path, cases: list[list[object]], folder: Path) -> list[dict[str, Any]]:
    """Return the responses of our service, run in another process on that tree."""
    (folder / "ours.json").write_text(json.dumps(cases))
    arguments = (PROJECT / "tests" / "encode_cases.py", comfyui, model_dir, folder / "ours.json", folder)
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_older_release_gives_its_own_numbers(model_dir: Path, tmp_path: Path) -> None:
    """On 0.3.52, whose scaling node has the older style, the latents are those of that release's stock nodes."""
    cases = [
        [str(IMAGES / "astronaut.png"), "random_wan.safetensors", "lanczos", 0.02],
        [str(IMAGES / "photo.jpg"), "random_kl.safetensors", "bicubic", 0.02],
        [str(IMAGES / "exif_orientation_6.jpg"), "taesd", "area", 0.04],
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    stock("encode", model_dir, tmp_path / "cases.json", tmp_path / "out.safetensors", comfyui=RELEASE_0_3_52)
    expected = load_file(tmp_path / "out.safetensors")

    too_new = [[str(IMAGES / "photo.jpg"), vae, "lanczos", 0.02] for vae in ("pixel_space", TINY_VAE)]
    *responses, missing, invalid = encode_cases(RELEASE_0_3_52, model_dir, [*cases, *too_new], tmp_path)
    assert missing["error_code"] == "VAE_MODEL_NOT_FOUND"
    assert invalid["error_code"] == "VAE_MODEL_INVALID"
    assert "or the file of a model that ComfyUI 0.3.52 does not know" in invalid["error_message"]
    assert len(responses) == len(cases)
    for number, (response, encoder) in enumerate(zip(responses, ("single-frame", "stock", "stock"), strict=True)):
        assert response["status"] == "success", response
        assert response["metadata"]["comfyui_version"] == "0.3.52"
        stock_latent = expected[f"{number}.latent"]
        stock_latent = stock_latent.squeeze(2) if stock_latent.ndim == 5 else stock_latent
        assert response["metadata"]["encoder"] == encoder
        torch.testing.assert_close(load_latent(response["latent_file_path"]), stock_latent, atol=2e-5, rtol=0)


def test_input_of_a_newer_node_takes_its_default(tree: Path, tmp_path: Path, run_main: RunMain) -> None:
    """A new input takes its default; the output of node packages and of their processes does not reach standard output."""
    require_resolution_steps(tree)
    (tree / "custom_nodes" / "my-nodes").mkdir()
    (tree / "custom_nodes" / "my-nodes" / "__init__.py").write_text(
        "import os\nprint('### loading my nodes')\nos.system('echo from a child')\nNODE_CLASS_MAPPINGS = {}\n"
    )
    done = run_main(
        *("--image_path", IMAGES / "photo.jpg", "--vae_model_name", TINY_VAE, "--megapixels", "0.02"),
        env={"COMFYUI_PATH": str(tree), "CUSTOM_NODES": "my-nodes"},
    )
    assert done.returncode == 0, done.stderr
    response = json.loads(done.stdout)
    assert response["status"] == "success"
    assert "### loading my nodes" in done.stderr
    assert "from a child" in done.stderr
    assert Path(response["latent_file_path"]).parent == tmp_path / "output"


def without_default(tree: Path) -> None:
    require_resolution_steps(tree, default="")


def without_node(tree: Path) -> None:
    (tree / EXTRAS).unlink()


def with_missing_packages(tree: Path) -> None:
    with (tree / "nodes.py").open("a") as nodes, (tree / EXTRAS).open("a") as extras:
        nodes.write("\nimport no_such_package\n")
        extras.write("\nimport no_other_package\n")
    with (tree / "requirements.txt").open("a") as file:
        file.write("\nno-such-package>=1.5\n")


def with_broken_node(tree: Path) -> None:
    (tree / EXTRAS).write_text('import comfy.no_such_module  # "ImageScaleToTotalPixels"\n')


def with_broken_core(tree: Path) -> None:
    (tree / "nodes.py").write_text("def broken(:\n")


def with_broken_yaml(tree: Path) -> None:
    (tree / "extra_model_paths.yaml").write_text("a: [unclosed\n")


def without_input_folder(tree: Path) -> None:
    """Refuse paths outside the input folder, as ComfyUI does since 0.28.0, and let nobody set that folder."""
    with (tree / "folder_paths.py").open("a") as file:
        file.write(f"{INPUT_FOLDER_ENFORCED}\n\ndef set_input_directory(path):\n    pass\n")


def with_other_pixels(tree: Path) -> None:
    with (tree / "nodes.py").open("a") as file:
        file.write("\nload = LoadImage.load_image\nLoadImage.load_image = lambda self, image: (1 - load(self, image)[0],)\n")


def with_failing_scaling(tree: Path) -> None:
    with (tree / "comfy" / "utils.py").open("a") as file:
        file.write("\ndef lanczos(samples, width, height):\n    raise RuntimeError('no lanczos here')\n")


def with_vaes_that_fail(tree: Path) -> None:
    with (tree / "comfy" / "pixel_space_convert.py").open("a") as file:
        file.write("\nPixelspaceConversionVAE.encode = lambda self, pixels: pixels.no_such_method()\n")


SPOILED: dict[str, Callable[[Path], None]] = {
    "node ImageScaleToTotalPixels requires resolution_steps, which has no default (tested releases: ": without_default,
    "has no node ImageScaleToTotalPixels: no module in comfy_extras/ has it (tested releases: ": without_node,
    "has no node ImageScaleToTotalPixels: nodes_post_processing.py cannot be loaded: No module named": with_broken_node,
    f"Install them with: {sys.executable} -m pip install no-other-package 'no-such-package>=1.5'": with_missing_packages,
    "cannot be loaded: invalid syntax": with_broken_core,
    "extra_model_paths.yaml": with_broken_yaml,
    "its node LoadImage fails on a test image: Invalid file path: ": without_input_folder,
    "its node LoadImage fails on a test image: gives pixels of a JPEG that are off by": with_other_pixels,
    "its node ImageScaleToTotalPixels fails on a test image: no lanczos here. Run ./setup_comfyui.sh --pinned": (
        with_failing_scaling
    ),
    "its node VAEEncode fails on a test image: 'Tensor' object has no attribute 'no_such_method'": with_vaes_that_fail,
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """Run the command line on each spoiled tree, two at a time, because loading ComfyUI takes seconds."""

    def run(words: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("spoiled")
        place_runtime(COMFYUI, folder, copy_entry)
        SPOILED[words](folder)
        arguments = ("-i", str(IMAGES / "photo.jpg"), "--comfyui_path", str(folder), "--log-level", "ERROR")
        vae = ("--vae_model_name", TINY_VAE)
        command = [sys.executable, str(PROJECT / "main.py"), *arguments, *vae]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SPOILED, pool.map(run, SPOILED), strict=True))


@pytest.mark.parametrize("words", SPOILED)
def test_tree_that_cannot_work_ends_set_up(words: str, endings: dict[str, subprocess.CompletedProcess[str]]) -> None:
    """A tree that cannot work gives exit status 3 and one line with the reason, without standard output or a traceback."""
    done = endings[words]
    assert (done.returncode, done.stdout) == (3, "")
    assert words in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("for_good", "code"), [(False, "IMAGE_INVALID"), (True, "ENCODING_FAILED")])
def test_fault_of_the_tree_is_not_the_images(for_good: bool, code: str, tree: Path, model_dir: Path, tmp_path: Path) -> None:
    """An intact image that the tree cannot decode is refused as invalid, unless the tree cannot decode any image any more."""
    with (tree / "nodes.py").open("a") as file:
        file.write(CHOOSY.replace("FOR_GOOD", str(for_good)))
    cases: list[list[object]] = [
        [str(IMAGES / name), TINY_VAE, "lanczos", 0.02] for name in ("photo.jpg", "astronaut.png", "photo.jpg")
    ]
    before, large, after = encode_cases(tree, model_dir, cases, tmp_path)
    assert before["status"] == "success"
    assert large["error_code"] == code
    assert ("its node LoadImage fails on a test image: out of order" in large["error_message"]) == for_good
    assert (
        f"cannot load the image file; save it again as a usual JPEG or PNG: {IMAGES}" in large["error_message"]
    ) != for_good
    assert after.get("error_code") == ("ENCODING_FAILED" if for_good else None)


@pytest.mark.core
def test_extra_model_paths_are_searched_last(tree: Path, model_dir: Path, tmp_path: Path) -> None:
    """A VAE in a folder that ComfyUI's own configuration names is found, after all other folders were searched."""
    elsewhere, mine = tmp_path / "elsewhere", tmp_path / "models"
    (elsewhere / "vaes").mkdir(parents=True)
    shutil.copy(model_dir / "vae" / "random_kl.safetensors", elsewhere / "vaes" / "mine.safetensors")
    (tree / "extra_model_paths.yaml").write_text(f"mine:\n    base_path: {elsewhere}\n    vae: vaes\n")
    cases: list[list[object]] = [
        [str(IMAGES / "photo.jpg"), f"{name}.safetensors", "lanczos", 0.02] for name in ("mine", "no")
    ]
    found, missing = encode_cases(tree, mine, cases, tmp_path)
    assert found["status"] == "success"
    order = (mine, mine / "vae", tree / "models/vae", elsewhere / "vaes", PROJECT / "comfyui" / "models/vae")
    assert f"Looked in: {', '.join(map(str, order))}. " in missing["error_message"]
