"""Download the Qwen-Image VAE from Hugging Face; called by setup_comfyui.sh --download-vae.

    python setup/download_vae.py DEST_FOLDER

Resumes where an earlier run stopped. The file gets its name only when its size and SHA-256 are right.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download


class DownloadError(Exception):
    """The file is not there; the text says why and what to do."""


@dataclass(frozen=True)
class HubFile:
    """One file on Hugging Face, with what its content must be."""

    repository: str
    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name


QWEN_IMAGE_VAE = HubFile(
    repository="Comfy-Org/Qwen-Image_ComfyUI",
    path="split_files/vae/qwen_image_vae.safetensors",
    size=253_806_246,
    sha256="a70580f0213e67967ee9c95f05bb400e8fb08307e017a924bf3441223e023d1f",
)


def download(wanted: HubFile, folder: Path) -> Path:
    """The file in `folder`, downloaded unless it is there already.

    Raises:
        DownloadError: no connection, or the content is not the one that is pinned.
    """
    final = folder / wanted.name
    if is_whole(final, wanted):
        return final
    partial = folder / ".download"
    try:
        fetched = Path(hf_hub_download(wanted.repository, wanted.path, local_dir=partial))
    except Exception as exc:
        raise DownloadError(
            f"cannot download {wanted.name} from Hugging Face ({root_cause(exc)}). Check the connection and run this again, "
            f"or put the file into {folder} by hand."
        ) from exc
    if not is_whole(fetched, wanted):
        shutil.rmtree(partial)
        raise DownloadError(f"what was downloaded is not {wanted.name}: its size or SHA-256 is wrong. Run this again.")
    fetched.replace(final)
    shutil.rmtree(partial)
    return final


def root_cause(exc: BaseException) -> str:
    """The first line of the exception that the others were raised from."""
    while (deeper := exc.__cause__ or exc.__context__) is not None:
        exc = deeper
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]


def is_whole(file: Path, wanted: HubFile) -> bool:
    """Whether the file is there with the size and the SHA-256 that it must have."""
    if not file.is_file() or file.stat().st_size != wanted.size:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == wanted.sha256


def main() -> None:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not worth a line each
    try:
        file = download(QWEN_IMAGE_VAE, Path(sys.argv[1]))
    except DownloadError as exc:
        sys.exit(f"Error: {exc}")
    print(f"VAE: {file} is whole.")


if __name__ == "__main__":
    main()
