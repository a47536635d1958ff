"""The contact sheet in a real browser, Chromium: search, order, pages, narrow windows, and its policy.

Skipped where Chromium is not installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from latent_encoder.contact_sheet.entries import Entry, Failure, shown
from latent_encoder.contact_sheet.page import FAILURE_ROWS, ROWS
from models import Roundtrip
from tests.contact_sheet.pages import Made
from tests.helpers import PATIENCE_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="No Chromium is installed: the contact sheet is not tried in a browser."
)

Browse = Callable[..., str]

REPORT = """
<script>
const report = document.createElement("pre");
report.id = "report";
const visible = (id) => [...document.querySelectorAll(`#${id} tbody tr`)].filter((row) => row.checkVisibility())
  .map((row) => row.querySelector("bdi").textContent);
const say = (text) => { report.textContent += JSON.stringify(text) + "\\n"; };
const type = (text) => { const field = document.querySelector("input"); field.value = text;
  field.dispatchEvent(new Event("input", { bubbles: true })); };
const choose = (order) => { const field = document.querySelector("select"); field.value = order;
  field.dispatchEvent(new Event("input", { bubbles: true })); };
addEventListener("load", () => { STEPS; document.body.append(report); });
</script>
"""


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return a function that loads a page in Chromium and returns its document, or writes a screenshot."""
    assert CHROMIUM is not None

    def browse(page: Path, *options: str) -> str:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
        command += ["--virtual-time-budget=3000", *(options or ("--dump-dom",)), page.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=True)
        return done.stdout.decode()

    return browse


def steps(page: Path, script: str) -> Path:
    """Return a copy of a page without its policy, which runs a script and shows its reports."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text("utf-8"))
    copy = page.with_name("copy.html")
    copy.write_text(text.replace("</body>", REPORT.replace("STEPS", script) + "</body>"), "utf-8")
    return copy


def reports(document: str) -> list[str]:
    found = re.search(r'<pre id="report">(.*?)</pre>', document, re.DOTALL)
    assert found is not None, "the script of the test did not end"
    return found[1].splitlines()


def made(folder: Path, images: int, failures: int = 0) -> Made:
    """Return a page of images, the later the better, and failures."""
    return Made(
        folder,
        [
            Entry(
                f"{number:03}.jpg",
                f"latent_{number:03}.pt",
                "",
                (),
                Roundtrip(psnr_db=number, ssim=1 - number / 1000, image_sha256=""),
            )
            for number in range(images)
        ],
        [Failure(f"bad {number}.jpg", "IMAGE_INVALID", "empty") for number in range(failures)],
    )


def colours(image: Image.Image) -> tuple[int, int]:
    """Return the lightness of the darkest and the lightest pixel."""
    low, high = image.convert("L").getextrema()
    return int(low), int(high)  # type: ignore[arg-type]


def webp(colour: str) -> bytes:
    data = BytesIO()
    Image.new("RGB", (128, 128), colour).save(data, "WEBP")
    return data.getvalue()


def test_pages(tmp_path: Path, browse: Browse) -> None:
    """The first page has the worst; the buttons turn pages of latents and of failures, each on their own."""
    page = made(tmp_path, ROWS + 10, FAILURE_ROWS + 1).write()
    script = """
    const places = () => [...document.querySelectorAll(".place")].map((place) => place.textContent);
    say([visible("latents").length, visible("latents")[0], visible("failures").length, places()]);
    document.querySelector("#latents .next").click();
    say([visible("latents").length, visible("latents")[0], visible("failures").length]);
    document.querySelector("#failures .next").click();
    say([visible("failures"), document.querySelector("#failures .next").disabled]);
    document.querySelector("#latents .previous").click();
    say(visible("latents")[0]);
    """
    assert reports(browse(steps(page, script))) == [
        f'[{ROWS},"000.jpg",{FAILURE_ROWS},["1 to 10 of 11","1 to 50 of 60","1 to 50 of 60"]]',
        f'[10,"050.jpg",{FAILURE_ROWS}]',
        '[["bad 10.jpg"],true]',
        '"000.jpg"',
    ]


def test_search_and_order(tmp_path: Path, browse: Browse) -> None:
    """Words find names and codes on all pages; the order may be by SSIM, by name, or that of the run."""
    page = made(tmp_path, ROWS + 10, 2).write()
    script = """
    type("058"); say(visible("latents")); say(document.querySelector(".found").textContent);
    type("image_invalid BAD"); say([visible("latents"), visible("failures")]);
    type("nothing like it"); say([visible("latents"), visible("failures")]);
    type(""); choose("ssim"); say(visible("latents")[0]);
    choose("run"); say(visible("latents")[0]);
    """
    assert reports(browse(steps(page, script))) == [
        '["058.jpg"]',
        '"1 found"',
        '[[],["bad 0.jpg","bad 1.jpg"]]',
        "[[],[]]",
        '"059.jpg"',
        '"000.jpg"',
    ]


def test_the_policy_runs_our_script_and_no_other(tmp_path: Path, browse: Browse) -> None:
    """The page's own script shows the search; a script that got into the page would not run."""
    page = made(tmp_path, 2).write()
    page.write_text(page.read_text().replace("</main>", "</main><script>document.title = 'owned'</script>"))
    document = browse(page)
    assert "<title>Contact sheet</title>" in document
    assert re.search(r'<form class="find" role="search">', document)


def test_a_hostile_name_is_shown_and_not_run(tmp_path: Path, browse: Browse) -> None:
    """A name with a script in it changes nothing, even without the policy."""
    name = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    page = Made(tmp_path, [Entry(shown(name), "", "", (), None)], [Failure(shown(name), "IMAGE_INVALID", shown(name))]).write()
    document = browse(steps(page, 'say(document.title); say(visible("latents")[0] === visible("failures")[0])'))
    assert reports(document) == ['"Contact sheet"', "true"]


@pytest.mark.parametrize("width", [1200, 700, 360])
def test_nothing_overlaps_or_overflows(tmp_path: Path, browse: Browse, width: int) -> None:
    """In windows of any width, images and figures lie beside or below each other, and nothing is wider than the window."""
    sheet = made(tmp_path, 3, 1)
    sheet.entries.append(Entry("x" * 200, "y" * 200, "", ("It is " + "z" * 100,), sheet.entries[0].roundtrip))
    page = sheet.write(webp("red"), webp("green"), webp("blue"))
    script = """
    const boxes = [...document.querySelectorAll("#latents tbody tr")].flatMap((row) =>
      [[...row.querySelectorAll("img, .number")].map((part) => part.getBoundingClientRect())]);
    const overlap = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    say(boxes.some((parts) => parts.some((a, i) => parts.slice(i + 1).some((b) => overlap(a, b)))));
    say(document.documentElement.scrollWidth <= innerWidth);
    say(boxes[0].length);
    """
    copy = steps(page, script)
    frame = tmp_path / "frame.html"  # headless windows have at least 500 pixels
    frame.write_text(f'<iframe src="copy.html" style="border:0;width:{width}px;height:900px"></iframe>')
    inside = copy.read_text("utf-8").replace("document.body.append(report)", "parent.postMessage(report.textContent, '*')")
    copy.write_text(inside, "utf-8")
    receive = "<script>onmessage = (e) => { const p = document.createElement('pre'); p.id = 'report'; p.textContent = e.data; "
    frame.write_text(f"{receive}document.body.append(p); }}</script>{frame.read_text()}")
    assert reports(browse(frame, "--dump-dom", "--window-size=1300,1000")) == ["false", "true", "5"]


def test_dark_and_light(tmp_path: Path, browse: Browse) -> None:
    """The page follows the colour scheme of the system: its ground is dark or light, and its text the opposite."""
    page = made(tmp_path, 3, 1).write()
    for options, ground in (
        (("--blink-settings=preferredColorScheme=1",), 255),
        (("--blink-settings=preferredColorScheme=0",), 0),
    ):
        target = tmp_path / f"{ground}.png"
        browse(page, f"--screenshot={target}", "--window-size=900,700", *options)
        with Image.open(target) as image:
            low, high = colours(image)
            corner = int(image.convert("L").getpixel((2, 2)))  # type: ignore[arg-type]
        assert abs(corner - ground) < 40
        assert (low < 60, high > 200) == (True, True)


def test_without_scripts_the_tables_read(tmp_path: Path, browse: Browse) -> None:
    """Without JavaScript all rows are shown, worst first, and no control that would do nothing."""
    page = made(tmp_path, ROWS + 10, 1).write()
    text = page.read_text("utf-8")
    page.write_text(re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL), "utf-8")
    script = """
    const shown = (name) => document.querySelector(name).checkVisibility();
    say([visible("latents").length, shown(".find"), shown(".controls")]);
    """
    assert reports(browse(steps(page, script))) == [f"[{ROWS + 10},false,false]"]
