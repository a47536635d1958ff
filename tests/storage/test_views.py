"""Looking at files in buckets: inspect mode, contact sheets, and the comparison."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from latent_encoder import inspection
from latent_encoder.contact_sheet import of_latents
from latent_encoder.inspection import copies
from latent_encoder.storage.access import AllowedUrls
from latent_encoder.storage.listing import listed
from latent_encoder.storage.locations import ObjectPath
from models import EncodeRequest, SuccessResponse
from service import LatentEncoder
from tests.broker.ports import free_ports
from tests.contact_sheet.pages import sheet_of
from tests.helpers import COMFYUI, IMAGES, VAE, RunMain
from tests.storage.conftest import Bucket
from tests.storage.web_server import WebServer

SIGNATURE = "X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature=0123456789abcdef"
SETTINGS = {"COMFYUI_PATH": str(COMFYUI), "DEVICE": "cpu", "STORAGE_MAX_RETRIES": "0"}
USUAL = ("--megapixels", "0.02", "--vae_model_name", VAE)

View = Callable[..., tuple[int, str, str]]


@pytest.fixture
def view(
    settings: Settings,
    encoder: LatentEncoder,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> View:
    """Return a function that inspects in this process, which has ComfyUI; it writes a sheet if `sheet` names one."""
    monkeypatch.chdir(tmp_path)
    assert encoder is not None

    def view(*paths: str | Path, html: bool = False, as_json: bool = False, sheet: str | None = None, **changes: Any) -> Any:
        changed = settings.model_copy(update={"storage_max_retries": 0, "storage_timeout_s": 5.0, **changes})
        capsys.readouterr()
        names = [str(path) for path in paths]
        if sheet is not None:
            status = of_latents.run(changed, names, Path(sheet), as_json=as_json, echo=print)
        else:
            status = inspection.run(changed, names, html=html, as_json=as_json, echo=print)
        return status, *capsys.readouterr()

    return view


@pytest.fixture
def stored(
    bucket: Bucket, worker: Callable[..., LatentEncoder], ask: Callable[..., EncodeRequest]
) -> Callable[..., SuccessResponse]:
    """Return a function that encodes a photo into the bucket."""

    def stored(folder: str = "out", latent_format: str = "pt", **settings: bool) -> SuccessResponse:
        request = ask(str(IMAGES / "photo.jpg"), f"{bucket.url}/{folder}", latent_format=latent_format)
        found = worker(**settings).encode(request)
        bucket.proxy.calls.clear()
        return found

    return stored


def fetched(bucket: Bucket) -> list[str]:
    """Return the kinds of the objects that were read, in order."""
    return [call.path.rpartition("/")[2].partition("_")[0] for call in bucket.proxy.calls if call.method == "GET"]


def pixels_of(page: Path) -> list[str]:
    return [part.partition('"')[0] for part in page.read_text().split("data:image/png;base64,")[1:]]


@pytest.mark.parametrize("latent_format", ["pt", "safetensors", "comfy"])
@pytest.mark.parametrize("fields", [{}, {"preview": True, "roundtrip": True}])
def test_the_output_is_that_of_local_files(
    bucket: Bucket,
    stored: Callable[..., SuccessResponse],
    view: View,
    tmp_path: Path,
    latent_format: str,
    fields: dict[str, bool],
) -> None:
    """Text, JSON and page are those of the same files on disk, and each object is read once."""
    url = stored(latent_format=latent_format, **fields).latent_file_path
    shutil.copytree(bucket.folder / "out", tmp_path / "here")
    local = tmp_path / "here" / url.rpartition("/")[2]
    out = str(tmp_path / "pages")
    status, text, _ = view(url, output_dir=out)
    assert (status, text.replace(f"{bucket.url}/out", str(local.parent))) == view(local, output_dir=out)[:2]
    assert len(fetched(bucket)) == len(set(fetched(bucket))) + 1, "the JSON has the latent's name"
    _, of_bucket, _ = view(url, as_json=True, html=True, output_dir=out)
    shown = pixels_of(tmp_path / "pages" / f"{local.name}.html")
    _, of_disk, _ = view(local, as_json=True, html=True, output_dir=out)
    assert json.loads(of_bucket) | {"file": ""} == json.loads(of_disk) | {"file": ""}
    assert shown == pixels_of(tmp_path / "pages" / f"{local.name}.html")
    assert len(shown) == (3 if fields else 2)
    assert bucket.proxy.count("PUT") == bucket.proxy.count("DELETE") == 0


def test_nothing_is_written_into_the_bucket(
    bucket: Bucket, stored: Callable[..., SuccessResponse], view: View, tmp_path: Path
) -> None:
    """Without --output_dir no preview is written, and a page goes to the working folder."""
    url = stored().latent_file_path
    names = bucket.names()
    status, text, _ = view(url, html=True, as_json=True)
    assert (status, json.loads(text)["preview"]) == (0, None)
    assert [path.name for path in tmp_path.iterdir()] == [json.loads(text)["page"]] == [f"{url.rpartition('/')[2]}.html"]
    assert bucket.names() == names
    assert view(url, f"{bucket.url}/other/{url.rpartition('/')[2]}", html=True)[0] == 2


def test_previews_and_pages_may_go_to_a_bucket(bucket: Bucket, stored: Callable[..., SuccessResponse], view: View) -> None:
    """--output_dir may be a URL; the files are those that a folder gets."""
    url = stored().latent_file_path
    status, text, _ = view(url, html=True, as_json=True, output_dir=f"{bucket.url}/look")
    assert status == 0
    assert json.loads(text)["preview"] == f"{bucket.url}/look/preview_photo_test.png"
    assert bucket.names("look") == ["latent_photo_test.pt.html", "preview_photo_test.png"]


def test_damaged_and_missing_objects(bucket: Bucket, stored: Callable[..., SuccessResponse], view: View) -> None:
    """A changed object differs, a removed one is missing, and one that cannot be read has the reason."""
    url = stored(preview=True, roundtrip=True).latent_file_path
    (bucket.folder / "out" / "preview_photo_test.png").unlink()
    (bucket.folder / "out" / "scaled_image_photo_test.png").write_bytes((IMAGES / "grey.png").read_bytes())
    bucket.proxy.fault("status", "GET", "roundtrip", times=10)
    status, text, err = view(url, as_json=True)
    assert status == 1
    assert json.loads(text)["hashes"] == {
        "latent": "ok",
        "scaled_image": "differs",
        "preview": "missing",
        "roundtrip": "missing",
    }
    assert "preview_photo_test.png is missing." in err
    assert "roundtrip_photo_test.png cannot be read (the storage cannot be reached: 503" in err


@pytest.mark.parametrize(
    ("key", "status", "reason"),
    [
        ("out/gone.pt", None, "No such file or directory"),
        ("out/latent_photo_test.pt", 403, "the storage refuses to read it: 403 Forbidden"),
        ("out/latent_photo_test.pt", 503, "the storage cannot be reached: 503 Service Unavailable"),
        ("out/", None, "--html sheet.html writes a contact sheet"),
        ("in/photo.jpg", None, "its name ends in none of .pt, .safetensors, .latent"),
    ],
)
def test_latents_that_cannot_be_read(
    bucket: Bucket, stored: Callable[..., SuccessResponse], view: View, key: str, status: int | None, reason: str
) -> None:
    """Each is an error with its reason, and the next latent is shown all the same."""
    good = stored().latent_file_path
    if status is not None:
        bucket.proxy.fault("status", "GET", "latent_photo_test.pt$", status=status)
    end, text, err = view(f"{bucket.url}/{key}", good, as_json=True)
    first, second = map(json.loads, text.splitlines())
    assert (end, first["ok"], second["ok"]) == (1, False, True)
    assert reason in first["error"]
    assert first["error"] in err
    assert first["file"] == f"{bucket.url}/{key}"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"https://example.org/latent_x.pt?{SIGNATURE}", "must be of object storage, not of a web server"),
        (f"https://user:pass-word@example.org/latent_x.pt?{SIGNATURE}", "must not have a user or a password"),
        ("s3:///latent_x.pt", "must have the name of a bucket"),
        ("s3://bucket/../latent_x.pt", "no '..'"),
        ("ftp://example.org/latent_x.pt", "must be a path, or a URL that begins with"),
        ("file://elsewhere/latent_x.pt", "must be file:/// and an absolute path"),
    ],
)
def test_urls_of_no_latent(view: View, url: str, reason: str) -> None:
    """They are refused without a call, in inspect mode and in a sheet, and no query is shown."""
    for sheet in (None, "sheet.html"):
        end, text, err = view(url, as_json=True, sheet=sheet)
        page = Path("sheet.html").read_text() if sheet else reason
        assert end == 1
        assert reason in (page.replace("&#39;", "'") if sheet else err)
        assert not any("X-Amz" in shown or "pass-word" in shown for shown in (text, err, page))


def test_file_urls_are_paths(view: View, stored: Callable[..., SuccessResponse], bucket: Bucket) -> None:
    """file:///path is the file on this machine."""
    stored()
    status, text, _ = view(f"file://{bucket.folder}/out/latent_photo_test.pt", as_json=True)
    assert (status, json.loads(text)["file"]) == (0, f"{bucket.folder}/out/latent_photo_test.pt")


def test_a_signed_url_in_the_metadata_is_not_shown(bucket: Bucket, stored: Callable[..., SuccessResponse], view: View) -> None:
    """Metadata of another program may name a presigned image: neither text, JSON, page nor sheet has its query."""
    url = stored().latent_file_path
    path = bucket.folder / "out" / "latent_photo_test.pt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_path": f"https://example.org/photo.jpg?{SIGNATURE}"}))
    shown = [*view(url, html=True)[1:], *view(url, as_json=True)[1:], *view(url, sheet="sheet.html")[1:]]
    shown += [page.read_text() for page in Path().glob("*.html")]
    assert len(shown) == 8
    assert not any("X-Amz" in text for text in shown)
    assert sum("https://example.org/photo.jpg" in text for text in shown) == 4


def test_a_sheet_of_a_folder(bucket: Bucket, stored: Callable[..., SuccessResponse], view: View) -> None:
    """A folder stands for its latents and those below it, hidden folders left out; all pictures are shown."""
    stored(roundtrip=True)
    stored("out/deeper", latent_format="safetensors")
    stored("out/.hidden")
    stored("outside")
    (bucket.folder / "out" / "broken.pt").write_bytes(b"no latent")
    status, text, _ = view(f"{bucket.url}/out", sheet="sheet.html", as_json=True)
    assert (status, json.loads(text)) == (1, {"page": "sheet.html", "latents": 3, "faulty": 1})
    page = sheet_of(Path("sheet.html"))
    assert sorted(alt.split(":")[0] for alt, _ in page.images) == ["Image"] * 2 + ["Latent"] * 2 + ["Round trip"]
    assert [row[0] for row in page.rows["failures"]] == [f"{bucket.url}/out/broken.pt"]
    assert bucket.proxy.count("GET", r"list-type=2") == 1


@pytest.mark.parametrize("path", ["gone", "out/gone.pt", ""])
def test_a_folder_without_latents(bucket: Bucket, view: View, path: str) -> None:
    """It is an error, as an empty folder on disk; a latent that is named and missing is in the sheet."""
    status, _, err = view(f"{bucket.url}/{path}", sheet="sheet.html")
    assert status == 1
    assert ("No latents" in err) == (not Path("sheet.html").exists()) == (path != "out/gone.pt")


def test_a_folder_that_cannot_be_listed(bucket: Bucket, view: View) -> None:
    """A missing bucket and a refused listing are in the sheet with their reasons."""
    bucket.proxy.fault("status", "GET", "list-type=2.*refused", status=403)
    status, _, _ = view(f"{bucket.url}/refused/", "s3://no-such-bucket-here/out/", sheet="sheet.html")
    assert status == 1
    reasons = [row[-1] for row in sheet_of(Path("sheet.html")).rows["failures"]]
    assert reasons == ["the storage refuses to read it: 403 Forbidden", "the bucket does not exist"]


def test_a_listing_has_several_pages(bucket: Bucket) -> None:
    """A thousand names come with a call, and a page that fails is asked for again from there."""
    folder = bucket.folder / "many"
    folder.mkdir()
    for number in range(1100):
        (folder / f"{number:04}.pt").touch()
    (folder / "deeper").mkdir()
    (folder / "deeper" / "a.pt").touch()
    bucket.proxy.fault("status", "GET", "start-after|marker")
    place, limits = ObjectPath(f"{bucket.url}/many"), AllowedUrls("image_path", retries=1)
    assert [found.key for found in listed(place, limits, recursive=False)] == [
        f"many/{number:04}.pt" for number in range(1100)
    ]
    assert sum(1 for _ in listed(place, limits, recursive=True)) == 1101
    assert bucket.proxy.count("GET", "list-type=2") <= 7


def test_latents_are_fetched_ahead_within_bounds(
    bucket: Bucket, stored: Callable[..., SuccessResponse], view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one latent is shown, the next ones are fetched; no more than those are on the disk, and none is left."""
    stored()
    for number in range(20):
        for name in ("latent_photo_test.pt", "scaled_image_photo_test.png", "latent_photo_test.pt.json"):
            copy = bucket.folder / "out" / name.replace("photo", f"photo{number}")
            shutil.copy(bucket.folder / "out" / name, copy)
    places, most, lock = set[str](), 0, threading.Lock()
    made = tempfile.TemporaryDirectory

    def make(**options: Any) -> Any:
        nonlocal most
        folder = made(**options)
        with lock:
            places.add(folder.name)
            most = max(most, sum(Path(name).exists() for name in places))
        return folder

    monkeypatch.setattr(tempfile, "TemporaryDirectory", make)
    bucket.proxy.latency_s = 0.02
    assert view(f"{bucket.url}/out", sheet="sheet.html")[0] == 0
    assert len(places) == 21
    assert 2 <= most <= copies.AHEAD + 1
    assert not any(Path(name).exists() for name in places)


def test_a_run_shows_its_pictures(bucket: Bucket, web: WebServer, run_main: RunMain, tmp_path: Path) -> None:
    """The sheet of a run into a bucket has all pictures in the order of the run, and no query of an image's URL."""
    web.pages["/astronaut.png"] = (IMAGES / "astronaut.png").read_bytes()
    images = [IMAGES / "photo.jpg", web.url(f"/astronaut.png?{SIGNATURE}"), IMAGES / "truncated.jpg", bucket.add("grey.png")]
    options = ("--output_dir", f"{bucket.url}/out", "--roundtrip", "--html", "sheet.html", "--json")
    done = run_main("--image_path", *images, *options, *USUAL, env={**bucket.environment, **SETTINGS})
    assert done.returncode == 1, done.stderr
    page = sheet_of(tmp_path / "sheet.html")
    assert len(page.images) == 9
    assert len(page.rows["latents"]) == 3
    assert [row[1] for row in page.rows["failures"]] == ["IMAGE_INVALID"]
    assert "X-Amz" not in (tmp_path / "sheet.html").read_text()


def test_a_sheet_stays_on_this_machine(bucket: Bucket, run_main: RunMain) -> None:
    """A sheet that would be an object is refused before anything is encoded or read."""
    for arguments in ((IMAGES / "photo.jpg",), ("inspect", f"{bucket.url}/out/")):
        done = run_main(*arguments, "--html", f"{bucket.url}/sheet.html", env={**bucket.environment, **SETTINGS})
        assert done.returncode == 2
        assert "the contact sheet is a file on this machine" in done.stderr
    assert bucket.proxy.calls == []


def test_the_command_line(bucket: Bucket, stored: Callable[..., SuccessResponse], run_main: RunMain) -> None:
    """The process takes a URL as its file, needs no ALLOWED_ setting, and shows no secret."""
    env = {**bucket.environment, **SETTINGS}
    url = stored().latent_file_path
    done = run_main("inspect", url, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{url}\n")
    refused = run_main("inspect", url, env={**env, "AWS_SECRET_ACCESS_KEY": "another-secret-key"})
    assert refused.returncode == 1
    assert "the storage refuses to read it: 403 Forbidden, SignatureDoesNotMatch" in refused.stderr
    assert "another-secret-key" not in refused.stderr


def test_images_by_url_are_compared(bucket: Bucket, web: WebServer, run_main: RunMain) -> None:
    """Both kinds of URL are compared as files are; a missing image is an error; no query is shown."""
    web.pages["/photo.jpg"] = (IMAGES / "photo.jpg").read_bytes()
    urls = [bucket.add("photo.jpg"), web.url(f"/photo.jpg?{SIGNATURE}"), web.url(f"/gone.jpg?{SIGNATURE}")]
    done = run_main("compare", *urls, *USUAL, env={**bucket.environment, **SETTINGS})
    assert done.returncode == 1
    first, second = map(json.loads, done.stdout.splitlines())
    assert (first["image_path"], second["image_path"]) == (urls[0], web.url("/photo.jpg"))
    assert [side["max_abs_difference"] for side in first["sides"]] == [side["max_abs_difference"] for side in second["sides"]]
    assert f"Image file not found: {web.url('/gone.jpg')}" in done.stderr
    assert "X-Amz" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("url", "environment"),
    [
        (
            "az://container/latents/latent_x.pt",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
                "AZURE_STORAGE_ENDPOINT": "http://127.0.0.1:{port}",
                "AZURE_ALLOW_HTTP": "true",
            },
        ),
        (
            "s3://away/latents/latent_x.pt",
            {
                "AWS_ACCESS_KEY_ID": "key",
                "AWS_SECRET_ACCESS_KEY": "c2VjcmV0",
                "AWS_ENDPOINT_URL": "http://127.0.0.1:{port}",
                "AWS_ALLOW_HTTP": "true",
            },
        ),
    ],
)
def test_a_storage_that_is_away(view: View, url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: each view ends with the reason, and no key is shown."""
    (port,) = free_ports(1)
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(port=port))
    url = url.replace("away", f"away-{port}").replace("container", f"container-{port}")
    status, _, err = view(url)
    assert status == 1
    assert f"Cannot read {url} as a latent: the storage cannot be reached" in err
    status, _, _ = view(url.rpartition("/")[0], sheet="sheet.html")
    assert status == 1
    assert "the storage cannot be reached" in sheet_of(Path("sheet.html")).rows["failures"][0][-1]
    assert "c2VjcmV0" not in err + Path("sheet.html").read_text()


def test_without_obstore(run_main: RunMain, tmp_path: Path) -> None:
    """The missing package ends the view with the command that installs it."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "obstore.py").write_text("raise ImportError('gone')")
    for arguments in (("s3://bucket/latent_x.pt",), ("s3://bucket/latents/", "--html", "sheet.html")):
        done = run_main("inspect", *arguments, env={**SETTINGS, "PYTHONPATH": str(tmp_path / "packages")})
        assert (done.returncode, "--object-storage" in done.stderr, "Traceback" in done.stderr) == (3, True, False)
