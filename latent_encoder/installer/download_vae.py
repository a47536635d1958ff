"""Download the Qwen-Image VAE from Hugging Face; called by setup_comfyui.sh --download-vae.

    python latent_encoder/installer/download_vae.py DEST_FOLDER

A run continues the partial file of an earlier one. The file gets its name only if its size and SHA-256 are right. HF_ENDPOINT
names a mirror, as for Hugging Face's own tools.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

CHUNK_BYTES = 1 << 20
STALLED_SECONDS = 30
"""Seconds without any data, after which the download fails instead of hanging."""


class DownloadError(Exception):
    """A file that cannot be downloaded; the message has the reason and the next step."""


@dataclass(frozen=True)
class HubFile:
    """One file on Hugging Face, with the size in bytes and the checksum that it must have."""

    repository: str
    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def url(self) -> str:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/{self.repository}/resolve/main/{self.path}"


QWEN_IMAGE_VAE = HubFile(
    repository="Comfy-Org/Qwen-Image_ComfyUI",
    path="split_files/vae/qwen_image_vae.safetensors",
    size=253_806_246,
    sha256="a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f",
)


def download(wanted: HubFile, folder: Path) -> Path:
    """Return the file in `folder`, downloaded unless it is there already.

    Raises:
        DownloadError: the connection failed, or the content is not the pinned one.
    """
    final, partial = folder / wanted.name, folder / f"{wanted.name}.part"
    if is_whole(final, wanted):
        return final
    try:
        if not partial.exists() or partial.stat().st_size < wanted.size:
            fetch(wanted, partial)
    except (OSError, HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise DownloadError(
            f"cannot download {wanted.name} from {wanted.url} ({reason}). Check the connection and run this again: it "
            f"continues the partial file. Or put the file into {folder} by hand."
        ) from exc
    if not is_whole(partial, wanted):
        partial.unlink()
        raise DownloadError(f"the downloaded file is not {wanted.name}: its size or SHA-256 is wrong. Run this again.")
    partial.replace(final)
    return final


def fetch(wanted: HubFile, partial: Path) -> None:
    """Append the missing bytes to `partial`, with a progress bar on standard error."""
    start = partial.stat().st_size if partial.exists() else 0
    request = Request(wanted.url, headers={"Range": f"bytes={start}-"})  # noqa: S310, HF_ENDPOINT is the user's own choice
    with urlopen(request, timeout=STALLED_SECONDS) as response:  # noqa: S310, as above
        if response.status != HTTPStatus.PARTIAL_CONTENT:
            start = 0  # a server that ignores ranges sends the whole file
        bar = tqdm(total=wanted.size, initial=start, unit="B", unit_scale=True, desc=wanted.name)
        with partial.open("ab" if start else "wb") as file, bar:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
        if response.length:
            raise ConnectionError("the connection broke off")


def is_whole(file: Path, wanted: HubFile) -> bool:
    """Return whether the file exists with the size and the checksum that it must have."""
    if not file.is_file() or file.stat().st_size != wanted.size:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == wanted.sha256


def main() -> None:
    if len(sys.argv) < 2:  # the script and its argument
        sys.exit("Usage: python latent_encoder/installer/download_vae.py DEST_FOLDER")
    try:
        file = download(QWEN_IMAGE_VAE, Path(sys.argv[1]))
    except DownloadError as exc:
        sys.exit(f"Error: {exc}")
    print(f"VAE: {file} is complete.")


if __name__ == "__main__":
    main()
