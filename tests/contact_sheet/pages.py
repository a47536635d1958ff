"""A contact sheet as the tests read it, and the programs that make and show one."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

from PIL import Image

from latent_encoder.contact_sheet.entries import Entry, Failure
from latent_encoder.contact_sheet.page import page_parts
from latent_encoder.contact_sheet.thumbnails import ThumbnailStore

WEBP = "data:image/webp;base64,"
VOID = {"br", "hr", "img", "input", "link", "meta"}


class Sheet(HTMLParser):
    """The elements of a page, its table rows, and everything that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {"failures": [], "latents": []}
        self.images: list[tuple[str, Image.Image]] = []
        self.text = ""
        self._section = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], "elements stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = str(attributes["id"])
        elif tag == "tr" and "thead" not in self._open:
            self.rows[self._section].append([])
        elif tag in ("th", "td") and "tbody" in self._open:
            self.rows[self._section][-1].append("")
        elif tag == "img":
            data = base64.b64decode(str(attributes["src"]).removeprefix(WEBP))
            self.images.append((str(attributes["alt"]), Image.open(BytesIO(data))))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and {"th", "td"} & set(self._open) and "tbody" in self._open:
            self.rows[self._section][-1][-1] += data

    @property
    def fetched(self) -> list[str]:
        """The addresses in the page, except for those of embedded data and of places in it."""
        found = [str(value) for _, attributes in self.tags for name, value in attributes.items() if name in ("src", "href")]
        return [address for address in found if not address.startswith((WEBP, "#"))]


def sheet_of(path: Path) -> Sheet:
    return Sheet(path.read_text("utf-8"))


@dataclass
class Made:
    """A page made of entries and failures, without latents."""

    folder: Path
    entries: list[Entry] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def write(self, *thumbnails: bytes) -> Path:
        """Write the page; each entry has these thumbnails: image, latent, round trip."""
        place = self.folder / "sheet.html"
        with ThumbnailStore(self.folder) as store:
            for entry in self.entries:
                entry.thumbnails.update(zip(("scaled_image", "latent", "roundtrip"), map(store.add, thumbnails), strict=False))
            with place.open("wb") as file:
                file.writelines(page_parts(self.entries, self.failures, store, title="Contact sheet", unfinished=None))
        return place
