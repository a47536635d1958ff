"""The sound files that the inputs are made from: the images of the tests, a few more, and VAEs of three families."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from fuzz import pngs
from fuzz.cases import TINY_VAE
from fuzz.process import Folders
from fuzz.records import PHOTO
from fuzz.weights import WeightsFile
from tests.helpers import IMAGES, PROJECT, stock

LARGEST = 30_000  # bytes of an image: in a larger one, damage would seldom meet a header
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def make_corpus(folders: Folders) -> None:
    """Write the corpus, the sound VAEs beside it, and the working folder with an image in it."""
    for folder in (folders.inputs, folders.work, folders.models / "vae", folders.models / "vae_approx"):
        folder.mkdir(parents=True)
    shutil.copy(IMAGES / PHOTO, folders.work)
    tiny = PROJECT / "tiny_vae" / TINY_VAE
    shutil.copy(tiny, folders.models / "vae")
    stock("make-vaes", folders.models, "taesd", "hollow-kl")
    _write(folders.corpus / "png", _pngs())
    _write(folders.corpus / "jpeg", _jpegs())
    _write(folders.corpus / "safetensors", [tiny.read_bytes(), _taesd_in_one(folders.models / "vae_approx")])
    _write(folders.corpus / "pickle", [_pickled(tiny)])
    _write(folders.corpus / "json", [])
    kl = folders.models / "vae" / "hollow_kl.safetensors"
    _write(folders.corpus / "hollow", [_head(kl)])
    kl.unlink()


def _write(folder: Path, files: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for number, data in enumerate(files):
        (folder / f"{number:03}").write_bytes(data)


def _test_images(*suffixes: str) -> Iterator[bytes]:
    for path in sorted(IMAGES.iterdir()):
        data = path.read_bytes()
        if path.suffix in suffixes and data.startswith((pngs.SIGNATURE, b"\xff\xd8")) and len(data) <= LARGEST:
            yield data


def _pngs() -> list[bytes]:
    with Image.open(IMAGES / PHOTO) as photo:
        photo.load()
    text = PngInfo()
    text.add_text("Title", "plain")
    text.add_text("Comment", "compressed " * 100, zip=True)
    text.add_itxt("Author", "größe", "de", "Autor", zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 8
    with_everything = _saved(photo, "PNG", pnginfo=text, icc_profile=profile, exif=exif, dpi=(300, 300))
    return [*_test_images(".png"), with_everything, _interlaced(photo.resize((40, 27)))]


def _jpegs() -> list[bytes]:
    with Image.open(IMAGES / PHOTO) as photo:
        photo.load()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return [
        *_test_images(".jpg", ".jpeg"),
        _saved(photo, "JPEG", icc_profile=profile, comment=b"a comment", dpi=(72, 72)),
        _saved(photo, "JPEG", subsampling="4:2:0", restart_marker_blocks=1),
        _saved(photo, "JPEG", quality=100, subsampling="4:4:4", progressive=True),
        _saved(photo, "MPO", save_all=True, append_images=[photo.rotate(90)]),
    ]


def _saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def _interlaced(image: Image.Image) -> bytes:
    """Return an interlaced PNG, which Pillow reads but cannot write."""
    rows = b""
    for top, left, down, right in ADAM7:
        for y in range(top, image.height, down):
            pixels = b"".join(bytes(image.crop((x, y, x + 1, y + 1)).tobytes()) for x in range(left, image.width, right))
            rows += b"\0" + pixels if pixels else b""
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    return pngs.build([(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def _taesd_in_one(folder: Path) -> bytes:
    """Return a TAESD with encoder and decoder in a single file, which ComfyUI loads, too."""
    file = WeightsFile({}, b"", 0)
    for part in ("encoder", "decoder"):
        half = WeightsFile.parse((folder / f"taesd_{part}.safetensors").read_bytes())
        for name in half.names:
            start, end = half.header[name]["data_offsets"]
            moved = [start + len(file.values), end + len(file.values)]
            file.header = {**file.header, f"taesd_{part}.{name}": {**half.header[name], "data_offsets": moved}}
        file.values += half.values
    for name in ("vae_scale", "vae_shift"):
        file.add(name, "F32", [], 4)
    file.values += bytes(file.hole)
    return file.to_bytes()


def _pickled(vae: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(load_file(vae), buffer)
    return buffer.getvalue()


def _head(vae: Path) -> bytes:
    with vae.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
