"""Mistakes about a whole run: one line and status 2 before ComfyUI is loaded. Only a single image gets a response too."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import powerless
from tests.cli.test_manners import MAIN, terminal
from tests.helpers import IMAGES, TINY_VAE, RunMain

PHOTO = IMAGES / "photo.jpg"
TINY = ("--vae_model_name", TINY_VAE, "--megapixels", "0.02")
IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}


def mistake(run_main: RunMain, *arguments: str | Path, **options: object) -> str:
    """Run a run of several images that has to be refused, and return its line on standard error."""
    done = run_main(*arguments, **options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    return str(done.stderr.removeprefix("Error: ").rstrip("\n"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("1.jpg", "2.jpg"):
        shutil.copy(PHOTO, folder / name)
    return folder


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["--vae_model_name", "tiny_qwen_vea.safetensors"], {}, "Did you mean tiny_qwen_vae.safetensors?"),
        ([], {"VAE_MODEL_NAME": "none.safetensors"}, "VAE model not found: none.safetensors. Looked in: "),
        (["--vae_model_name", "taesd"], {}, "VAE model not found: taesd. Looked in: "),
        (["--vae_model_name", "../x"], {}, "Invalid request: vae_model_name: "),
        (["--upscale_method", "cubic"], {}, "Invalid request: upscale_method: "),
        ([], {"UPSCALE_METHOD": "cubic"}, "A setting cannot be used. UPSCALE_METHOD: "),
        (["--latent_format", "npy"], {}, "Invalid request: latent_format: "),
        ([], {"LATENT_FORMAT": "npy"}, "A setting cannot be used. LATENT_FORMAT: "),
        (["--fit", "pad"], {}, "Invalid request: fit: "),
        ([], {"FIT": "pad"}, "A setting cannot be used. FIT: "),
        (["--alpha", "red"], {}, "Invalid request: alpha: "),
        ([], {"ALPHA": "red"}, "A setting cannot be used. ALPHA: "),
        (["--megapixels", "0"], {}, "Invalid request: megapixels: "),
        (["--megapixels", "many"], {}, "'many' is not a valid float."),
        (["--megapixels", "2"], {"MAX_OUTPUT_MEGAPIXELS": "1"}, "must be at most MAX_OUTPUT_MEGAPIXELS=1.0 (got 2.0)"),
        ([], {"MEGAPIXELS": "many"}, "A setting cannot be used. MEGAPIXELS: "),
        ([], {"MEGAPIXELS": "17"}, "A setting cannot be used. MEGAPIXELS: "),
    ],
)
def test_wrong_value_ends_the_run(
    arguments: list[str], env: dict[str, str], words: str, photos: Path, run_main: RunMain
) -> None:
    """A wrong value, as an option or as a setting, is one line that names it."""
    assert words in mistake(run_main, photos, *arguments, env=env)


def test_wrong_setting_in_a_file_ends_the_run(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """A wrong value in `.env` is one line too."""
    (tmp_path / ".env").write_text("VAE_MODEL_NAME=none.safetensors\n")
    assert mistake(run_main, photos).startswith("VAE model not found: none.safetensors.")
    (tmp_path / ".env").write_text("FIT=pad\n")
    assert mistake(run_main, photos).startswith("A setting cannot be used. FIT: ")


def test_mistake_comes_before_comfyui(photos: Path, run_main: RunMain) -> None:
    """Neither torch nor a module of ComfyUI is imported before the line."""
    done = run_main(photos, photos / "gone.jpg", *TINY, env=IMPORTS)
    assert done.returncode == 2
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "latent_encoder.standalone.early_checks" in imported
    assert not {"torch", "nodes", "comfy", "numpy"} & set(imported)


def test_all_missing_paths_are_named(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """Every path that does not exist is named, broken links too, and no image is encoded."""
    (tmp_path / "link.png").symlink_to("nowhere.png")
    line = mistake(run_main, photos / "1.jpg", "gone.png", photos, "link.png", photos / "1.jpg" / "x.png", *TINY)
    assert line == f"Image file not found: gone.png, link.png, {photos}/1.jpg/x.png"
    assert not (tmp_path / "output").exists()
    assert "(File name too long)" in mistake(run_main, photos, "x" * 300, *TINY)


def test_lines_of_a_list_keep_their_errors(run_main: RunMain, tmp_path: Path) -> None:
    """A line of a list with a missing image, a wrong VAE or a wrong folder gets an error response; the status is 1."""
    (tmp_path / "file").touch()
    lines = [
        {"image_path": "gone.png"},
        {"image_path": str(PHOTO), "vae_model_name": "none.safetensors"},
        {"image_path": str(PHOTO), "output_dir": "file/x"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_main("--input-list", "list.jsonl", *TINY)
    assert done.returncode == 1
    codes = [json.loads(line)["error_code"] for line in done.stdout.splitlines()]
    assert codes == ["IMAGE_NOT_FOUND", "VAE_MODEL_NOT_FOUND", "OUTPUT_DIR_NOT_WRITABLE"]


def test_default_is_checked_if_a_line_takes_it(run_main: RunMain, tmp_path: Path) -> None:
    """A setting that every line of a list replaces is not checked; one that a line takes is, and so is an option."""
    request = {"image_path": str(PHOTO), "vae_model_name": TINY_VAE, "megapixels": 0.02}
    (tmp_path / "list.jsonl").write_text(json.dumps(request) + "\n")
    wrong = {"VAE_MODEL_NAME": "none.safetensors"}
    assert run_main("--input-list", "list.jsonl", env=wrong).returncode == 0
    assert mistake(run_main, "--input-list", "list.jsonl", "--vae_model_name", "none.safetensors").startswith("VAE model")
    (tmp_path / "list.jsonl").write_text(json.dumps({"image_path": str(PHOTO)}) + "\n")
    assert mistake(run_main, "--input-list", "list.jsonl", env=wrong).startswith("VAE model not found: none")


def test_list_in_a_pipe_is_read_once(run_main: RunMain) -> None:
    """The list of a process substitution reaches the run whole."""
    lines = json.dumps({"image_path": "gone.png"}) + "\n"
    prefix = ["bash", "-c", f'exec "$@" --input-list <(printf %s {shlex.quote(lines)})', "bash"]
    done = run_main(*TINY, prefix=prefix)
    assert (done.returncode, json.loads(done.stdout)["error_code"]) == (1, "IMAGE_NOT_FOUND")


def test_package_of_nodes_that_is_missing(photos: Path, run_main: RunMain) -> None:
    """A package of CUSTOM_NODES that does not exist is one line and status 3, before torch is imported."""
    done = run_main(photos, env={"CUSTOM_NODES": "none"} | IMPORTS)
    assert done.returncode == 3
    assert "Error: No custom node package 'none' in " in done.stderr
    assert "| torch" not in done.stderr


def test_names_that_only_comfyui_knows_are_not_refused(run_main: RunMain, tmp_path: Path, model_dir: Path) -> None:
    """A VAE in a folder below, a pair of TAESD, and a VAE of extra model paths pass the early check."""
    (tmp_path / "models" / "vae" / "sub").mkdir(parents=True)
    shutil.copy(MAIN.parent / "tiny_vae" / TINY_VAE, tmp_path / "models" / "vae" / "sub" / "odd.bin.safetensors")
    arguments = (PHOTO, "--megapixels", "0.02", "--vae_model_name")
    assert run_main(*arguments, "sub/odd.bin.safetensors", env={"MODEL_DIR": "models"}).returncode == 0
    assert run_main(*arguments, "taesd", env={"MODEL_DIR": str(model_dir)}).returncode == 0
    tree = tmp_path / "tree"
    tree.mkdir()
    for entry in (MAIN.parent / "comfyui").iterdir():
        (tree / entry.name).symlink_to(entry)
    (tmp_path / "extra").mkdir()
    shutil.copy(MAIN.parent / "tiny_vae" / TINY_VAE, tmp_path / "extra" / "mine.safetensors")
    (tree / "extra_model_paths.yaml").write_text(f"mine:\n  vae: {tmp_path}/extra\n")
    assert run_main(*arguments, "mine.safetensors", env={"COMFYUI_PATH": str(tree)}).returncode == 0


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file", "Not a directory"), ("file/x", "Not a directory"), ("x" * 300, "File name too long"),
     ("new/" + "x" * 300, "File name too long"), ("read_only", "Permission denied"), ("read_only/new", "Permission denied"),
     ("loop", "Too many levels of symbolic links"), ("/proc/none", "No such file or directory")],
)  # fmt: skip
def test_output_folder_that_cannot_be_written(
    folder: str, reason: str, photos: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """An output folder that cannot be made or written, as an option or as a setting, is one line with the reason."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "read_only").mkdir(mode=0o555)
    expected = f"Cannot write to output folder: {tmp_path / folder} ({reason})"
    by_option = len(folder) % 2 == 0
    given = {} if by_option else {"OUTPUT_DIR": folder}
    assert mistake(run_main, photos, *TINY, *(("-o", folder) * by_option), env=given, prefix=powerless()) == expected
    assert not (tmp_path / "new").exists()


def test_folders_that_are_not_allowed(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """An output folder or a named image outside of the allowed folders ends the run."""
    limits = {"ALLOWED_OUTPUT_DIRS": str(tmp_path / "out"), "ALLOWED_INPUT_DIRS": str(photos)}
    line = mistake(run_main, photos, *TINY, "-o", "elsewhere", env=limits)
    assert line.startswith("Access denied: elsewhere does not lead into a folder of ALLOWED_OUTPUT_DIRS")
    line = mistake(run_main, photos, PHOTO, *TINY, "-o", "out", env=limits)
    assert line.startswith(f"Access denied: {PHOTO} does not lead into a folder of ALLOWED_INPUT_DIRS")


def test_folder_that_is_missing_is_left_to_the_run(photos: Path, run_main: RunMain, tmp_path: Path) -> None:
    """An output folder that does not exist, also behind a link, is made by the run, and the check leaves no file."""
    (tmp_path / "link").symlink_to("a/b")
    assert run_main(photos, *TINY, "-o", "link").returncode == 0
    assert len(list((tmp_path / "a" / "b").iterdir())) == 6


def test_single_image_in_a_pipe_has_its_response_too(run_main: RunMain, tmp_path: Path) -> None:
    """A program gets the error response of one image on standard output, a person one line on standard error."""
    (tmp_path / "file").touch()
    for arguments, code in (
        (("gone.png", *TINY), "IMAGE_NOT_FOUND"),
        ((PHOTO, "--vae_model_name", "none.pt"), "VAE_MODEL_NOT_FOUND"),
        ((PHOTO, *TINY, "-o", "file"), "OUTPUT_DIR_NOT_WRITABLE"),
        ((PHOTO, "--fit", "pad"), "INVALID_REQUEST"),
    ):
        done = run_main(*arguments, "--request-id", "7")
        response = json.loads(done.stdout)
        assert (done.returncode, response["error_code"], response["request_id"]) == (2, code, "7")
        assert done.stderr == f"Error: {response['error_message']}\n"


def test_terminal_shows_the_line_alone(tmp_path: Path) -> None:
    """On a terminal, the line is all."""
    with terminal([sys.executable, MAIN, "gone.png", *TINY], tmp_path, {}) as child:
        assert child.read() == "Error: Image file not found: gone.png\r\n"


def test_kafka_mode_and_the_doctor_keep_their_faults(run_main: RunMain) -> None:
    """A wrong setting is wrong usage in Kafka mode, and a cross of the doctor."""
    done = run_main("kafka", env={"FIT": "pad"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "Error: A setting cannot be used. FIT: " in done.stderr
    done = run_main("doctor", "--json", env={"FIT": "pad", "HTTP_PORT": "0"})
    crosses = [check["found"] for check in json.loads(done.stdout)["checks"] if check["state"] == "cross"]
    assert any(found.startswith("FIT: ") for found in crosses)


# Commands


def test_first_word_names_the_mode(run_main: RunMain) -> None:
    """Each mode is a command too, before or after options, also if MODE names another one."""
    assert run_main("inspect").stderr.splitlines()[-1].startswith("Error: Inspect mode needs latent files")
    assert run_main("--quiet", "health", "--http-port", "0").stderr.endswith(
        "HTTP_PORT=0: a worker without an HTTP port cannot be asked.\n"
    )
    assert run_main("inspect", "gone.pt", env={"MODE": "kafka"}).returncode == 1
    assert "Standalone mode needs --image_path" in run_main("standalone").stderr
    done = run_main("dlq_replay", "--limit", "0")
    assert "Invalid value for '--limit'" in done.stderr
    done = run_main("standalone", "-i", "gone.png", *TINY)
    assert (done.returncode, done.stderr) == (2, "Error: Image file not found: gone.png\n")


def test_file_with_the_name_of_a_command(run_main: RunMain, tmp_path: Path) -> None:
    """A file of such a name is an image as ./doctor, behind another path, or with --mode."""
    shutil.copy(PHOTO, tmp_path / "doctor")
    assert run_main("./doctor", *TINY).returncode == 0
    assert run_main("--mode", "standalone", "doctor", *TINY).returncode == 0
    assert run_main(PHOTO, "doctor", *TINY).returncode == 0
    assert "PATH" in run_main("doctor", "doctor").stderr


@pytest.mark.parametrize(
    ("word", "meant"), [("docter", "doctor"), ("kafak", "kafka"), ("Inspect", "inspect"), ("replay", "dlq-replay"),
                        ("help", "--help")]
)  # fmt: skip
def test_misspelt_command(word: str, meant: str, run_main: RunMain, tmp_path: Path) -> None:
    """A word that is almost a command is one line with the command, unless there is such a file."""
    assert mistake(run_main, word, "--json") == f"No such file or command: {word}. Did you mean {meant}?"
    shutil.copy(IMAGES / "truncated.jpg", tmp_path / word)
    assert run_main(word, *TINY).returncode == 1


def test_short_options(run_main: RunMain, tmp_path: Path) -> None:
    """`-i` takes several values as --image_path does, and `-o` is --output_dir."""
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(PHOTO, tmp_path / name)
    done = run_main("-i", "a.jpg", "b.jpg", *TINY, "-o", "out")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    assert len(os.listdir(tmp_path / "out")) == 6  # noqa: PTH208  # names are enough
