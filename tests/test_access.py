"""Access of requests to files: only in the allowed folders, whatever they name and whoever moves files meanwhile."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from config import Settings
from errors import AccessDenied, ErrorCode, ImageInvalid, ImageNotFound, OutputDirNotWritable, RequestError
from latent_encoder import access
from latent_encoder.access import ANYWHERE, MOST_SYMLINKS, AllowedFolders, absolute, resolved
from latent_encoder.images.source import ImageLimits, read_file
from latent_encoder.outputs.files import StagedFiles
from latent_encoder.outputs.folder import open_output_folder
from models import ErrorResponse, SuccessResponse
from service import LatentEncoder
from tests.helpers import IMAGES, PATIENCE_S, TINY_VAE, RunMain, request_for
from tests.kafka_tools import Bench, read_responses

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux

PHOTO = (IMAGES / "photo.jpg").read_bytes()


@dataclass(frozen=True)
class Site:
    """Make an allowed folder and another one, with an image in each and symlinks between them."""

    base: Path

    def __post_init__(self) -> None:
        for folder in ("inside/deep", "outside/deep", "insider"):
            (self.base / folder).mkdir(parents=True)
            (self.base / folder / "photo.jpg").write_bytes(PHOTO)
        for link, target in {
            "inside/in": "inside/deep",
            "inside/in.jpg": "inside/deep/photo.jpg",
            "inside/out": "outside/deep",
            "inside/out.jpg": "outside/deep/photo.jpg",
            "inside/missing.jpg": "outside/missing.jpg",
            "inside/round": "outside/back",
            "outside/back": "inside/deep",
            "outside/up": "inside/deep",
            "link": "inside",
        }.items():
            (self.base / link).symlink_to(self.base / target)

    def allowing(self, root: str = "inside") -> AllowedFolders:
        return AllowedFolders("ALLOWED_INPUT_DIRS", (self.base / root,))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def denied(path: str | Path) -> str:
    """Return the whole message for a path outside."""
    setting = "ALLOWED_INPUT_DIRS"
    return f"Access denied: {path} does not lead into a folder of {setting}; name one that does, or add its folder there."


INSIDE = (
    "inside/deep/photo.jpg",
    "inside/deep/../deep/photo.jpg",
    "inside/nothing/../deep/photo.jpg",
    "outside/../inside/deep/photo.jpg",
    "inside/in.jpg",
    "inside/in/photo.jpg",
    "inside/round/photo.jpg",
    "outside/back/photo.jpg",
    "link/deep/photo.jpg",
)
OUTSIDE = (
    "outside/deep/photo.jpg",
    "outside/missing.jpg",
    "outside/deep/photo.jpg/x.jpg",
    "outside",
    "insider/photo.jpg",
    "inside/../outside/deep/photo.jpg",
    "inside/deep/../../outside/missing.jpg",
    "inside/out.jpg",
    "inside/missing.jpg",
    "inside/out/photo.jpg",
    "inside/out/missing.jpg",
    "inside/..",
    ".",
)


@pytest.mark.parametrize("root", ["inside", "link", "outside/../inside", "inside/deep"])
@pytest.mark.parametrize("path", INSIDE)
def test_path_that_leads_inside_is_read(path: str, root: str, site: Site) -> None:
    """A file inside can be named directly, through `..` and through symlinks, also if the allowed folder is a symlink."""
    limits = ImageLimits(site.allowing(root), 1_000_000, 1_000_000)
    assert read_file(str(site.base / path), limits) == PHOTO


def test_system_without_a_flag_for_passing_folders_will_do(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders on the way are then opened for reading."""
    monkeypatch.setattr(access, "PASS", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    assert read_file(str(site.base / "inside/in.jpg"), ImageLimits(site.allowing(), 1_000_000, 1_000_000)) == PHOTO
    with open_output_folder(site.base / "inside" / "new", site.allowing()) as folder:
        folder.create("file").close()
    assert (site.base / "inside" / "new" / "file").exists()


@pytest.mark.parametrize("root", ["inside", "link"])
@pytest.mark.parametrize("path", OUTSIDE)
def test_path_that_leads_outside_is_refused(path: str, root: str, site: Site) -> None:
    """The message has the path as it was given, and nothing about the place that it leads to."""
    given = f"{site.base}/{path}"
    with pytest.raises(AccessDenied) as caught:
        read_file(given, ImageLimits(site.allowing(root), 1_000_000, 1_000_000))
    assert str(caught.value) == denied(given)
    with pytest.raises(AccessDenied), open_output_folder(Path(given), site.allowing(root)):
        pass


def test_parent_of_a_link_outside_says_nothing_of_the_link(site: Site) -> None:
    """`..` goes back by name, so it makes no difference whether `up` is a symlink and how deep it leads."""
    for name in ("up", "deep", "missing"):
        path = f"{site.base}/outside/{name}/../../inside/deep/photo.jpg"
        assert read_file(path, ImageLimits(site.allowing(), 1_000_000, 1_000_000)) == PHOTO


def test_folder_that_is_there_later_is_allowed_then(site: Site) -> None:
    """A volume may be mounted after the start, and a symlink to a volume may be changed."""
    limits = ImageLimits(site.allowing("volume"), 1_000_000, 1_000_000)
    path = str(site.base / "volume" / "photo.jpg")
    with pytest.raises(ImageNotFound):
        read_file(path, limits)
    (site.base / "volume").symlink_to(site.base / "outside" / "deep")
    assert read_file(path, limits) == PHOTO
    with pytest.raises(AccessDenied):
        read_file(str(site.base / "inside" / "deep" / "photo.jpg"), limits)


def test_whole_system_can_be_allowed(site: Site) -> None:
    """The folder `/` allows every path, and two slashes count as one."""
    limits = ImageLimits(AllowedFolders("X", (Path("/"),)), 1_000_000, 1_000_000)
    assert read_file(f"/{site.base}/outside/deep/photo.jpg", limits) == PHOTO


NAMES = st.sampled_from(["a", "b", "c", "..", "in", "out"])
PATHS = st.lists(NAMES, min_size=1, max_size=6).map("/".join)


@hypothesis_settings(max_examples=60)
@given(st.lists(st.tuples(PATHS, PATHS | st.none()), max_size=8), st.lists(PATHS, min_size=1, max_size=5))
def test_nothing_outside_is_ever_read(things: list[tuple[str, str | None]], wanted: list[str]) -> None:
    """In a random tree of symlinks, every file that is read is inside, and every path inside without `..` is read."""
    with TemporaryDirectory() as name:
        root = Path(name).resolve() / "in"
        root.mkdir()
        limits = ImageLimits(AllowedFolders("X", (root,)), 1_000, 1_000)
        for path, target in things:
            place = Path(os.path.normpath(root / path))
            if not place.is_relative_to(name):
                continue
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                if target is None:
                    place.write_text(str(place.resolve()))
                else:
                    place.symlink_to(root / target)
            except (OSError, RuntimeError):
                continue  # something else is there already, or the links go round
        for path in wanted:
            try:
                place = Path(read_file(str(root / path), limits).decode())
            except (AccessDenied, ImageNotFound, ImageInvalid):
                if ".." not in path and (root / path).is_file():
                    assert not Path(os.path.realpath(root / path)).is_relative_to(root)
            else:
                assert place.is_relative_to(root)


@contextmanager
def swapped(folder: Path, outside: Path) -> Iterator[None]:
    """Swap a folder and a symlink to the outside, over and over; one of the two always exists."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        pytest.skip("this system cannot exchange two names at once")
    link = folder.with_name("link")
    link.symlink_to(outside)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            assert libc.renameat2(AT_FDCWD, bytes(folder), AT_FDCWD, bytes(link), RENAME_EXCHANGE) == 0

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def attempts(seconds: float, action: Callable[[], Any], refusals: tuple[type[Exception], ...]) -> list[Any]:
    """Repeat an action for some time, and until it was not refused once; return the results of the calls that were not."""
    results: list[Any] = []
    start = time.monotonic()
    while time.monotonic() < start + seconds or (not results and time.monotonic() < start + PATIENCE_S):
        try:
            results.append(action())
        except refusals:
            continue
    return results


def test_folder_that_is_swapped_while_it_is_opened_gives_nothing_from_outside(tmp_path: Path) -> None:
    """Many opens against a thread that swaps a folder on the way give the file inside, or none."""
    for name in ("inside/a/b", "outside/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text(name)
    limits = ImageLimits(AllowedFolders("X", (tmp_path / "inside",)), 1_000, 1_000)
    path = str(tmp_path / "inside" / "a" / "b" / "file")
    assert read_file(path, limits) == b"inside/a/b"
    with swapped(tmp_path / "inside" / "a", tmp_path / "outside"):
        got = attempts(2, lambda: read_file(path, limits), (AccessDenied, ImageNotFound, ImageInvalid))
    assert set(got) == {b"inside/a/b"}


def test_folder_that_is_swapped_while_it_is_written_gets_nothing_outside(tmp_path: Path) -> None:
    """Against such a thread, written folders and files appear inside, or nowhere."""
    (tmp_path / "inside" / "a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    allowed = AllowedFolders("X", (tmp_path / "inside",))
    path = tmp_path / "inside" / "a" / "b" / "c"

    def write() -> bool:
        with open_output_folder(path, allowed) as folder, StagedFiles(folder) as staged:
            staged.add("file", b"")
            staged.publish()
        return True

    with swapped(tmp_path / "inside" / "a", tmp_path / "outside"):
        assert attempts(2, write, (AccessDenied, OutputDirNotWritable))
    assert list((tmp_path / "outside").iterdir()) == []
    assert opened_below(tmp_path) == []


def opened_below(folder: Path) -> list[str]:
    """Return the files and folders below a folder that this process has open."""
    opened = []
    for descriptor in list(Path("/proc/self/fd").iterdir()):
        with suppress(FileNotFoundError):  # it was closed meanwhile, as that of this listing
            opened.append(str(descriptor.readlink()))
    return [path for path in opened if path.startswith(f"{folder}/")]


@pytest.fixture
def confined(encoder: LatentEncoder, settings: Settings, site: Site) -> LatentEncoder:
    """Return an encoder with both limits."""
    changes = {
        "allowed_input_dirs": (site.base / "inside",),
        "allowed_output_dirs": (site.base / "inside" / "deep",),
        "max_output_megapixels": 0.05,
    }
    return LatentEncoder(settings.model_copy(update=changes), encoder.runtime)


REFUSED: list[tuple[dict[str, Any], ErrorCode]] = [
    ({"megapixels": 0.06, "image_path": "outside/deep/photo.jpg"}, ErrorCode.INVALID_REQUEST),
    ({"image_path": "outside/deep/photo.jpg", "vae_model_name": "none"}, ErrorCode.ACCESS_DENIED),
    ({"output_dir": "outside", "vae_model_name": "none"}, ErrorCode.ACCESS_DENIED),
    ({"output_dir": "inside"}, ErrorCode.ACCESS_DENIED),
    ({"output_dir": "outside/new", "image_path": "inside/missing"}, ErrorCode.ACCESS_DENIED),
]


@pytest.mark.parametrize(("fields", "code"), REFUSED)
def test_what_is_not_allowed_is_said_before_all_work(
    fields: dict[str, Any], code: ErrorCode, confined: LatentEncoder, settings: Settings, site: Site
) -> None:
    """Access is checked after the fields and before the VAE, also for a second delivery; no folder is made outside."""
    given = {"image_path": "inside/in.jpg", "output_dir": "inside/deep/new"} | fields
    given |= {name: str(site.base / given[name]) for name in ("image_path", "output_dir")}
    request = request_for(settings, site.base, "", given)
    response = confined.respond(request)
    assert isinstance(response, ErrorResponse)
    assert response.error_code == code
    with pytest.raises(RequestError) as caught:
        confined.stored_response(request)
    assert caught.value.code == code
    assert not (site.base / "outside" / "new").exists()


def test_answer_that_is_stored_outside_is_not_looked_at(confined: LatentEncoder, settings: Settings, site: Site) -> None:
    """A request that is refused now gets neither the stored files nor the image of an earlier success."""
    paths = {"image_path": str(site.base / "inside/in.jpg"), "output_dir": str(site.base / "inside/deep/new")}
    request = request_for(settings, site.base, "", paths)
    served = confined.respond(request)
    assert isinstance(served, SuccessResponse)
    assert confined.stored_response(request) == served
    (site.base / "inside" / "in.jpg").unlink()
    assert confined.stored_response(request) == served
    (site.base / "inside" / "in.jpg").symlink_to(site.base / "outside" / "missing.jpg")
    with pytest.raises(AccessDenied):
        confined.stored_response(request)
    (site.base / "inside" / "in.jpg").unlink()
    (site.base / "inside" / "deep" / "new").rename(site.base / "outside" / "new")
    (site.base / "inside" / "deep" / "new").symlink_to(site.base / "outside" / "new")
    with pytest.raises(AccessDenied):
        confined.stored_response(request)


def test_folder_that_leads_outside_after_the_encode_gets_no_files(
    confined: LatentEncoder, settings: Settings, site: Site
) -> None:
    """The folder is checked again before the write."""
    inside, outside = site.base / "inside" / "deep" / "new", site.base / "outside" / "new"
    paths = {"image_path": str(site.base / "inside/in.jpg"), "output_dir": str(inside)}
    encoded = confined.encode_prepared(confined.prepare(request_for(settings, site.base, "", paths)))
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(AccessDenied):
        confined.write(encoded)
    assert list(outside.iterdir()) == []


def test_command_line_says_the_same_of_what_is_there_and_what_is_not(site: Site, run_main: RunMain) -> None:
    """Every field except the time is the same; the path is that of the request."""
    path = site.base / "outside" / "x.jpg"
    told = []
    for there in (False, True):
        if there:
            path.write_bytes(PHOTO)
        done = run_main("--image_path", path, "--request_id", "r", env={"ALLOWED_INPUT_DIRS": str(site.base / "inside")})
        response = json.loads(done.stdout)
        assert response.pop("timestamp")
        told.append((done.returncode, response))
    expected = {"status": "error", "request_id": "r", "error_code": "ACCESS_DENIED", "error_message": denied(path)}
    assert told == [(2, expected), (2, expected)]


def test_command_line_takes_folders_from_the_working_folder_on(tmp_path: Path, run_main: RunMain) -> None:
    """Several relative folders are allowed, relative to the working folder."""
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    environment = {"ALLOWED_INPUT_DIRS": f"{IMAGES}, .", "ALLOWED_OUTPUT_DIRS": "out"}
    arguments = ("--image_path", "photo.jpg", "--vae_model_name", TINY_VAE, "--megapixels", "0.02", "--output_dir", "out/a")
    done = run_main(*arguments, env=environment)
    assert json.loads(done.stdout)["status"] == "success", done.stderr


def test_kafka_mode_says_what_is_not_limited(tmp_path: Path, run_main: RunMain) -> None:
    """At its start the worker logs the settings that are not set, and the allowed folders that do not exist."""

    def warnings(**environment: str) -> list[dict[str, Any]]:
        done = run_main("--mode", "kafka", env={"COMFYUI_PATH": "/nowhere", "HTTP_PORT": "0", **environment})
        assert done.returncode == 3
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        return [{name: line[name] for name in line.keys() - {"timestamp"}} for line in lines]

    warning = {"level": "warning", "logger": "latent_encoder"}
    unlimited = "requests may touch any file that the service may: set the folders that they need"
    unset = ["ALLOWED_INPUT_DIRS", "ALLOWED_OUTPUT_DIRS"]
    assert warnings() == [warning | {"event": unlimited, "settings": unset}]
    missing = {"event": "allowed folders that do not exist", "setting": "ALLOWED_OUTPUT_DIRS", "folders": [f"{tmp_path}/no"]}
    assert warnings(ALLOWED_INPUT_DIRS=".", ALLOWED_OUTPUT_DIRS="no,.") == [warning | missing]


def test_kafka_requests_outside_are_answered_and_no_dead_letters(
    bench: Bench, settings: Settings, confined: LatentEncoder, site: Site
) -> None:
    """A path outside and too many megapixels are errors without a retry, among requests that are served."""
    inside, output = str(site.base / "inside" / "in.jpg"), str(site.base / "inside" / "deep")
    responses, dead_letters = bench.responses, bench.dead_letters
    requests = [{"image_path": inside, "output_dir": output, **fields} for fields, _ in REFUSED[:3]]
    for fields in requests:
        for name in ("image_path", "output_dir"):
            fields[name] = str(site.base / fields[name])
    with bench.worker(confined, bench.settings(settings)):
        for n, fields in enumerate(requests):
            bench.send({"request_id": f"bad-{n}", **fields})
            bench.send({"request_id": f"good-{n}", "image_path": inside, "output_dir": output})
        got = read_responses(responses, 6)
        bench.wait_for_commit({0: 6})
        assert dead_letters.all_within(0.5) == []
    assert [response["error_code"] for response in got] == [
        "INVALID_REQUEST",
        None,
        "ACCESS_DENIED",
        None,
        "ACCESS_DENIED",
        None,
    ]
    assert "megapixels: must be at most MAX_OUTPUT_MEGAPIXELS=0.05 (got 0.06)" in got[0]["error_message"]
    assert "ALLOWED_INPUT_DIRS" in got[2]["error_message"]
    assert "ALLOWED_OUTPUT_DIRS" in got[4]["error_message"]


def chain(folder: Path, length: int) -> Path:
    """Return the last of a chain of symlinks, the first of which leads to a photo."""
    link = folder / "photo.jpg"
    link.write_bytes(PHOTO)
    for n in range(length):
        (folder / f"{n}").symlink_to(link)
        link = folder / f"{n}"
    return link


def system_error(path: Path) -> int:
    """Return the errno of the system's own attempt to open the path, or 0."""
    try:
        os.close(os.open(path, os.O_RDONLY))
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_as_many_symlinks_are_followed_as_the_system_follows(tmp_path: Path) -> None:
    """Symlinks on the way count too: one to the folder, and the others behind it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    chain(folder, MOST_SYMLINKS)
    limits = ImageLimits(AllowedFolders("X", (tmp_path,)), 1_000_000, 1_000_000)
    for path, followed in {
        folder / f"{MOST_SYMLINKS - 1}": True,
        tmp_path / "link" / f"{MOST_SYMLINKS - 2}": True,
        tmp_path / "link" / f"{MOST_SYMLINKS - 1}": False,
    }.items():
        assert system_error(path) == (0 if followed else errno.ELOOP)
        with nullcontext() if followed else pytest.raises(AccessDenied):
            assert read_file(str(path), limits) == PHOTO


@pytest.mark.parametrize("length", [MOST_SYMLINKS + 1, 2000])
def test_longer_chain_of_symlinks_is_denied(length: int, site: Site) -> None:
    """The message is that of a path outside, so it reveals nothing about symlinks there."""
    for folder in ("inside", "outside"):
        link = chain(site.base / folder, length)
        with pytest.raises(AccessDenied) as caught:
            site.allowing().resolve(str(link))
        assert str(caught.value) == denied(link)


LOOPS = {
    "itself": "itself",
    "there": "back",
    "back": "there",
    "up": "itself/../../outside/deep",
    "into": "../outside/round",
    "longer": "longer/a",
    "twice": "twice/../twice",
}


@pytest.mark.parametrize("name", LOOPS)
def test_loop_of_symlinks_is_denied(name: str, site: Site) -> None:
    """It is refused for reading, below it, and for writing; without limits, the system's reason is given."""
    for loop, target in LOOPS.items():
        (site.base / "inside" / loop).symlink_to(target)
    (site.base / "outside" / "round").symlink_to(site.base / "inside" / "into")
    link = site.base / "inside" / name
    assert system_error(link) == errno.ELOOP
    for path in (link, link / "deep" / "photo.jpg"):
        with pytest.raises(AccessDenied) as caught:
            site.allowing().resolve(str(path))
        assert str(caught.value) == denied(path)
        with pytest.raises(ImageInvalid, match=r"\(Too many levels of symbolic links\)$"):
            read_file(str(path), ImageLimits(ANYWHERE, 1_000_000, 1_000_000))
        unwritable = pytest.raises(OutputDirNotWritable, match=r"\(Too many levels of symbolic links\)$")
        with unwritable, open_output_folder(path, ANYWHERE):
            pass


@pytest.mark.parametrize("target", ["allowed", "allowed/../outside", "outside/allowed"])
def test_allowed_folder_that_is_a_loop_of_symlinks_allows_nothing(target: str, site: Site) -> None:
    """Neither its unresolved rest nor its own name is allowed, and the other folders of the setting stay allowed."""
    (site.base / "allowed").symlink_to(target)
    (site.base / "outside" / "allowed").symlink_to("../allowed")
    assert system_error(site.base / "allowed") == errno.ELOOP
    allowed = AllowedFolders("ALLOWED_INPUT_DIRS", (site.base / "allowed", site.base / "inside"))
    for path in ("allowed", "allowed/photo.jpg", "outside", "outside/deep/photo.jpg", "outside/allowed", "photo.jpg"):
        with pytest.raises(AccessDenied):
            allowed.resolve(str(site.base / path))
    assert allowed.resolve(str(site.base / "inside/in.jpg")) == site.base / "inside/deep/photo.jpg"


def test_back_from_what_is_missing_tells_nothing(site: Site) -> None:
    """A symlink's target with `..` leads to the same file, whether the name before the `..` exists, is outside, or not."""
    for name in ("deep", "missing", "deep/photo.jpg"):
        steps = "../" * (name.count("/") + 2)
        link = site.base / "inside" / name.replace("/", "-")
        link = link.with_name(f"by-{link.name}")
        link.symlink_to(f"../outside/{name}/{steps}inside/deep/photo.jpg")
        assert read_file(str(link), ImageLimits(site.allowing(), 1_000_000, 1_000_000)) == PHOTO


def where_the_system_goes(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115  # as it is, not as a path is written
    finally:
        os.close(descriptor)


PLACES = st.lists(st.sampled_from(["a", "b", "c", ".."]), min_size=1, max_size=5).map("/".join)


@given(st.lists(st.tuples(PLACES, PLACES | st.none()), max_size=10), st.lists(PLACES, min_size=1, max_size=5))
def test_what_is_resolved_is_where_the_system_goes(things: list[tuple[str, str | None]], wanted: list[str]) -> None:
    """In a random tree of folders and symlinks with loops, both find the same place, or too many symlinks."""
    with TemporaryDirectory() as name:
        root = Path(name).resolve() / "1/2/3/4/5"
        root.mkdir(parents=True)
        for path, target in things:
            with suppress(OSError):  # it is there already, or its folder is not
                place = root / path
                place.mkdir(parents=True) if target is None else place.symlink_to(target)
        for path in wanted:
            place = absolute(str(root / path))
            error = system_error(place)
            if error == 0:
                assert str(resolved(str(place))) == where_the_system_goes(place)
            elif error == errno.ELOOP:
                with pytest.raises(OSError, match="Too many levels of symbolic links"):
                    resolved(str(place))
