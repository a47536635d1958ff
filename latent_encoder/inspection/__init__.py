"""`--mode inspect`: shows the contents of latent files, and writes a preview of each and, on request, a page.

With `as_json`, each file is one line with an object. `file` (the name as given), `ok` and `error` are always there. If `error`
is not null, the file cannot be read as a latent, and the object has nothing else. Otherwise it has:

- `format`, `shape`, `dtype`, `finite`
- `channels`: for each its `mean`, `deviation`, `minimum` and `maximum`, over the finite values, and `finite`
- `latent_space` and `latent_space_guessed`
- `hashes`: `ok`, `differs` or `missing` for each of `latent`, `scaled_image`, `preview`, `roundtrip` that the metadata names
- `metadata`, or null with the reason in `metadata_note`
- the paths `preview` and `page`, or null
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from config import Settings
from errors import LatentUnreadable, RequestError
from latent_encoder.access import AllowedFolders, place_of
from latent_encoder.exits import EXIT_ERROR_RESPONSE, EXIT_WRONG_USAGE
from latent_encoder.inspection.copies import Copies, Reading, place_of_latents
from latent_encoder.inspection.findings import Inspection, inspect_latent
from latent_encoder.inspection.images import Painter
from latent_encoder.inspection.text import as_json as json_line
from latent_encoder.inspection.text import as_text, drawn, unreadable_as_json
from latent_encoder.masking import masked
from latent_encoder.outputs.names import SUFFIXES
from latent_encoder.outputs.places import open_place, staged_in
from latent_encoder.storage.locations import ObjectPath, is_url
from latent_encoder.storage.locations import shown as without_query
from latent_encoder.terminal import complain, encodable, printable, takes_colours


def run(settings: Settings, paths: Sequence[str], *, html: bool, as_json: bool, echo: Callable[[str], None]) -> int:
    """Inspect each file and show it by `echo`; each problem is a line on standard error. A path may be a URL of a bucket.

    Returns:
        The exit status: 0 without problems; 1 if a file cannot be read as a latent, a checksum differs, a file is missing, a
        value is not finite, or a page cannot be written; 2 if no file is named, two whose previews would be one file, or an
        output folder that is none.
    """
    try:
        output_dir = _output_dir(settings)
    except ValueError as exc:
        _complain("Error", f"--output_dir {without_query(settings.output_dir)}: it {exc}.")
        return EXIT_WRONG_USAGE
    if reason := _wrong_usage(paths, output_dir, html=html):
        _complain("Error", reason)
        return EXIT_WRONG_USAGE
    inspector = Inspector(settings, output_dir, html=html, as_json=as_json, echo=echo)
    fine = [inspector.show(path) for path in paths]
    return 0 if all(fine) else EXIT_ERROR_RESPONSE


def _output_dir(settings: Settings) -> Path | None:
    """Return the folder for previews and pages; None if each belongs beside its latent.

    Raises:
        ValueError: the URL names no folder.
    """
    if "output_dir" not in settings.model_fields_set:
        return None
    return place_of(settings.output_dir) if is_url(settings.output_dir) else Path(settings.output_dir)


def _wrong_usage(paths: Sequence[str], output_dir: Path | None, *, html: bool) -> str | None:
    if not paths:
        return "Inspect mode needs latent files: python main.py inspect FILE"
    moved = [path for path in paths if output_dir is not None or (html and _is_remote(path))]
    for name, count in Counter(Path(without_query(path)).name for path in moved).most_common(1):
        if count > 1:
            folder = output_dir or "the working folder; --output_dir names another folder"
            return f"{count} files are named {name}, and the preview of one would replace the other's in {folder}."
    return None


class Inspector:
    """An inspection of one file after the other."""

    def __init__(
        self, settings: Settings, output_dir: Path | None, *, html: bool, as_json: bool, echo: Callable[[str], None]
    ) -> None:
        self._output_dir = output_dir
        self._allowed = AllowedFolders.of_outputs(settings)
        self._reading = Reading.of(settings)
        self._html = html
        self._as_json = as_json
        self._to = echo
        self._draws = not as_json and _draws_in_colour()
        self._painter = Painter(settings, warn=lambda text: _complain("Warning", text))

    def show(self, path: str) -> bool:
        """Show the file, and write its preview and its page; return whether it has no problem."""
        try:
            place = place_of_latents(path)
            with Copies(place, self._reading) as copies:
                return self._show(inspect_latent(copies))
        except LatentUnreadable as exc:
            hint = " --html sheet.html writes a contact sheet of the latents in a folder." if _may_be_folder(path) else ""
            if self._as_json:
                self._echo(unreadable_as_json(without_query(path) if is_url(path) else str(Path(path)), f"{exc}{hint}"))
            _complain("Error", f"{exc}{hint}")
            return False

    def _show(self, inspection: Inspection) -> bool:
        preview = self._preview(inspection)
        page, page_problem = self._page(inspection) if self._html else (None, None)
        shown = json_line(inspection, preview, page) if self._as_json else as_text(inspection, preview, page) + "\n"
        shown = encodable(shown, sys.stdout.encoding)  # a name may have letters that the terminal's encoding lacks
        if self._draws:
            name, _, shown = shown.partition("\n")
            self._echo(name)
            self._draw(inspection)
        self._echo(shown)
        problems = [*inspection.problems, *([page_problem] if page_problem else [])]
        for problem in problems:
            _complain("Error", f"{inspection.files.latent}: {problem}")
        return not problems

    def _echo(self, text: str) -> None:
        self._to(masked(text))  # metadata may name a presigned URL

    def _preview(self, inspection: Inspection) -> Path | None:
        """Return the path of the preview, which is written if it is missing or damaged; None if it cannot be written.

        Nothing is written beside a latent in a bucket: who looks at it may not have the right to write there.
        """
        place = inspection.files.preview if self._output_dir is None else self._output_dir / inspection.files.preview.name
        if self._output_dir is None:
            if self._painter.whole(inspection, "preview") is not None:
                return place
            if isinstance(place, ObjectPath):
                return None
        data = self._painter.preview(inspection)
        if data is None:
            return None
        try:
            self._write(place, data)
        except RequestError as exc:
            _complain(
                "Warning", f"{inspection.files.latent}: no preview was written. {exc} --output_dir names another folder."
            )
            return None
        return place

    def _page(self, inspection: Inspection) -> tuple[Path | None, str | None]:
        """Return the path of the page, or the reason why it was not written."""
        from latent_encoder.inspection.page import as_page  # only pages need jinja2

        latent = inspection.files.latent
        folder = self._output_dir or (Path() if isinstance(latent, ObjectPath) else latent.parent)
        place = folder / f"{latent.name}.html"
        try:
            self._write(place, as_page(inspection, self._painter).encode())
        except RequestError as exc:
            return None, f"no page was written. {exc} --output_dir names another folder."
        return place, None

    def _draw(self, inspection: Inspection) -> None:
        image = self._painter.image(inspection)
        if image is not None:
            terminal = shutil.get_terminal_size()
            self._echo(drawn(image, terminal.columns, terminal.lines - 2) + "\n")

    def _write(self, place: Path, data: bytes) -> None:
        """Write a file so that it appears complete or not at all.

        Raises:
            AccessDenied, OutputDirNotWritable: it cannot be written there.
        """
        with open_place(place.parent, self._allowed) as folder, staged_in(folder, "") as staged:
            staged.add(place.name, data)
            staged.publish()


def _is_remote(path: str) -> bool:
    return is_url(path) and not path.lower().startswith("file:")


def _may_be_folder(path: str) -> bool:
    return PurePath(path).suffix not in SUFFIXES.values() if _is_remote(path) else Path(path).is_dir()


def _draws_in_colour() -> bool:
    """Return whether standard output takes colours, and the characters that a drawing consists of."""
    return takes_colours(sys.stdout) and sys.stdout.encoding.lower().startswith("utf")


def _complain(kind: str, text: str) -> None:
    complain(f"{kind}: {printable(text)}")
