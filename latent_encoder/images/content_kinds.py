"""The contents that files have in place of a JPEG or PNG: patterns of their first bytes, names, and advice."""

from __future__ import annotations

import re
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of content."""

    name: str
    """With its article."""
    advice: str
    """The way to an image, as a sentence without its end."""


def converted(name: str, command: str = "magick FILE out.png") -> Kind:
    """Return the kind of an image that a program converts."""
    return Kind(name, f"convert it to JPEG or PNG, for example with `{command}`")


def raw(camera: str) -> Kind:
    """Return the kind of a raw file of a camera."""
    return Kind(
        f"a raw file of a camera ({camera})",
        "develop it and export a JPEG or PNG, for example with `darktable-cli FILE out.png`",
    )


def video(name: str) -> Kind:
    """Return the kind of a video."""
    return Kind(name, "give one frame of it as an image of its own, for example with `ffmpeg -i FILE -frames:v 1 out.png`")


def archive(name: str, command: str) -> Kind:
    """Return the kind of an archive."""
    return Kind(name, f"unpack it first, for example with `{command}`")


def other(name: str) -> Kind:
    """Return the kind of a file without an image."""
    return Kind(name, "give a JPEG or PNG")


HEIC = converted("a HEIC image", "heif-convert FILE out.png")
AVIF = converted("an AVIF image", "avifdec FILE out.png")
JPEG_XL = converted("a JPEG XL image", "djxl FILE out.png")
JPEG_2000 = converted("a JPEG 2000 image", "opj_decompress -i FILE -o out.png")
TIFF = converted("a TIFF image", "magick 'FILE[0]' out.png")
PDF = converted("a PDF document", "pdftoppm -r 150 -singlefile -png FILE out")
SVG = converted("an SVG drawing", "rsvg-convert -o out.png FILE")
MP4 = video("a video (MP4 or QuickTime)")
SOUND = other("a sound file")
ENCODED_TEXT = "text that encodes an image in base64"
REPLACED = "open it to read the cause, and fetch the image again"

_BINARY: tuple[tuple[bytes, Kind], ...] = (
    # Images.
    (rb".{4}ftyp(avif|avis)|.{4}ftyp(mif1|msf1|miaf).{4}(?:.{4}){0,8}?(avif|avis)", AVIF),
    (rb".{4}ftyp(hei[cxms]|hev[cxms])|.{4}ftyp(mif1|msf1|miaf).{4}(?:.{4}){0,8}?(hei[cxms]|hev[cxms])", HEIC),
    (rb".{4}ftyp(mif1|msf1|miaf)", converted("a HEIF image", "heif-convert FILE out.png")),
    (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", JPEG_XL),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP(  |\x1a\x1a)\r\n\x87\n", JPEG_2000),
    (rb"RIFF.{4}WEBP", converted("a WebP image", "dwebp FILE -o out.png")),
    (rb"GIF8[79]a", converted("a GIF image", "magick 'FILE[0]' out.png")),
    (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", converted("a BMP image")),
    (
        rb"[\x28\x34\x38\x6c\x7c]\0\0\0.{8}\x01?\x01\0[\x01\x04\x08\x10\x18\x20]\0",
        converted("a BMP image without its file header"),
    ),
    (rb"8BPS\0[\x01\x02]", converted("a Photoshop file", "magick 'FILE[0]' out.png")),
    (rb"\0\0\x01\0[^\0]\0", converted("an icon (ICO)", "magick 'FILE[0]' out.png")),
    (rb"\0\0\x02\0[^\0]\0", converted("a mouse cursor (CUR)", "magick 'FILE[0]' out.png")),
    (rb"icns", converted("an icon of macOS (ICNS)", "icns2png -x FILE")),
    (rb"\x8aMNG\r\n\x1a\n", converted("an MNG animation", "magick 'FILE[0]' out.png")),
    (rb"\x8bJNG\r\n\x1a\n", converted("a JNG image")),
    (rb"gimp xcf ", converted("a GIMP file (XCF)", "magick FILE -flatten out.png")),
    (rb"II\xbc[\0\x01]", converted("a JPEG XR image", "JxrDecApp -i FILE -o out.tif")),
    (rb"qoif", converted("a QOI image")),
    (rb"DDS ", converted("a DDS texture")),
    (rb"v/1\x01", converted("an OpenEXR image")),
    (rb"#\?(RADIANCE|RGBE)", converted("a Radiance HDR image")),
    (rb"P[1-7fF]\s", converted("a Netpbm image (PPM, PGM, PBM, PAM or PFM)")),
    (rb"\n[\0\x02-\x05]\x01[\x01\x02\x04\x08]", converted("a PCX image")),
    (rb"\x01\xda[\0\x01][\x01\x02]", converted("an SGI image")),
    (rb"\x59\xa6\x6a\x95", converted("a Sun raster image")),
    (rb"SIMPLE  =", converted("a FITS image")),
    (rb".{128}DICM", converted("a DICOM image", "dcm2pnm --write-png FILE out.png")),
    (rb"BPG\xfb", converted("a BPG image", "bpgdec -o out.png FILE")),
    (rb"FLIF", converted("a FLIF image", "flif -d FILE out.png")),
    (rb"AT&TFORM", converted("a DjVu document", "ddjvu -format=tiff FILE out.tif")),
    (rb"(\xc5\xd0\xd3\xc6|%!PS)", converted("a PostScript file", "gs -sDEVICE=png16m -r150 -o out.png FILE")),
    (rb"(\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF)", converted("a drawing of Windows (WMF or EMF)", "inkscape FILE -o out.png")),
    (rb"BLP[12]", converted("a BLP texture")),
    (rb"/\* XPM \*/|#define [^\n]*_width ", converted("an X11 image (XPM or XBM)")),
    (rb"[\s\S]\0[\x02\x03\x0a\x0b]\0{5}.{8}[\x08\x10\x18\x20]", converted("a TGA image")),
    (rb"[\s\S]\x01[\x01\x09]\0\0.{2}[\x0f\x10\x18\x20].{8}\x08", converted("a TGA image")),
    (rb"(\xef\xbb\xbf)?\s{0,64}%PDF-", PDF),
    # Raw files that are no TIFF files; tiff.py has the others.
    (rb".{4}ftypcrx ", raw("Canon CR3")),
    (rb"II\x1a\0\0\0HEAPCCDR", raw("Canon CRW")),
    (rb"FUJIFILMCCD-RAW", raw("Fujifilm RAF")),
    (rb"II(RO|RS)|MMOR", raw("Olympus ORF")),
    (rb"IIU\0", raw("Panasonic RW2")),
    (rb"FOVb", raw("Sigma X3F")),
    (rb"\0MRM", raw("Minolta MRW")),
    # Videos and sounds.
    (rb".{4}ftypM4[AB] ", SOUND),
    (rb".{4}(ftyp|moov|mdat|wide|free|skip|pnot)", MP4),
    (rb"\x1aE\xdf\xa3", video("a video (WebM or Matroska)")),
    (rb"RIFF.{4}AVI ", video("a video (AVI)")),
    (rb"\0\0\x01[\xb3\xba]|G.{187}G", video("a video (MPEG)")),
    (rb"0&\xb2u\x8ef\xcf\x11", video("a video (WMV)")),
    (rb"FLV\x01", video("a video (FLV)")),
    (rb".{4}(\x11|\x12)\xaf", video("an animation (FLI or FLC)")),
    (rb"RIFF.{4}WAVE|OggS|ID3|fLaC|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]|MThd", SOUND),
    # Archives and compressed files.
    (rb"PK(\x03\x04|\x05\x06|\x07\x08)", archive("a ZIP archive, or a document that is one", "unzip FILE")),
    (rb"\x1f\x8b", archive("compressed with gzip", "gunzip < FILE > out")),
    (rb"7z\xbc\xaf\x27\x1c", archive("a 7-Zip archive", "7z x FILE")),
    (rb"Rar!\x1a\x07", archive("a RAR archive", "unrar x FILE")),
    (rb"BZh[1-9]", archive("compressed with bzip2", "bunzip2 < FILE > out")),
    (rb"\xfd7zXZ\0", archive("compressed with xz", "unxz < FILE > out")),
    (rb"\x28\xb5\x2f\xfd", archive("compressed with Zstandard", "zstd -d < FILE > out")),
    (rb"\x04\x22\x4d\x18", archive("compressed with LZ4", "lz4 -d FILE out")),
    (rb".{257}ustar", archive("a tar archive", "tar -xf FILE")),
    # Other files.
    (
        rb"\0\x05\x16[\0\x07]",
        Kind("metadata that macOS stores beside a file", "give the file of the same name without `._` at its beginning"),
    ),
    (rb"\0\0\0\x01Bud1", other("a folder's settings of macOS (.DS_Store)")),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", other("an old Office file, or a database of thumbnails (Thumbs.db)")),
    (rb"\x4c\0\0\0\x01\x14\x02\0", Kind("a shortcut of Windows", "give the file that it leads to")),
    (rb"\x93NUMPY", other("a NumPy array")),
    (rb"\x89HDF\r\n\x1a\n", other("an HDF5 file")),
    (rb"GRIB|BUFR", other("a file of weather data")),
    (rb"SQLite format 3\0", other("a SQLite database")),
    (rb"\x80[\x02-\x05].*\.\Z", other("a Python pickle")),
    (rb"\x7fELF|MZ.{58}.{2}\0\0", other("a program")),
    (rb"bplist00", other("a property list of macOS")),
)

_TEXTS: tuple[tuple[bytes, Kind], ...] = (
    (
        rb"version https://(git-lfs\.github|hawser\.github)\.com/",
        Kind("a Git LFS pointer", "fetch the image with `git lfs pull`"),
    ),
    (
        rb"(\.\./)*(\.git)?/?annex/objects/",
        Kind("a git-annex pointer", "fetch the image with `git annex get FILE`"),
    ),
    (rb"outs:\s*-\s+(md5|etag):", Kind("a DVC pointer", "fetch the image with `dvc pull`")),
    (
        rb"[\"']?data:image/[\w.+-]+;base64,",
        Kind(ENCODED_TEXT, "decode it first, for example with `sed 's/^[^,]*,//' FILE | base64 -di > out`"),
    ),
    (rb"[\"']?(iVBORw0KGgo|/9j/)", Kind(ENCODED_TEXT, "decode it first, for example with `base64 -di FILE > out`")),
    (
        rb"(?i)[\"'b\\]*(0x|x)?(89504e470d0a1a0a|ffd8ff)",
        Kind("text that encodes an image in hexadecimal digits", "decode it first, for example with `xxd -r -p FILE out`"),
    ),
    (rb"[\"']?data:", Kind("a data URL", "decode it first, and give a JPEG or PNG")),
    (rb"(?is)(<\?xml.*?\?>\s*)?((<!--.*?-->|<!doctype svg.*?>)\s*)*<(\w+:)?svg\b", SVG),
    (
        rb"(?is)(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body|title|meta|script|style|div|p|br|h1|center)\b",
        Kind("an HTML page, as servers send in place of a file for errors and logins", REPLACED),
    ),
    (rb"(?i)<\?xml|<!doctype|<[a-z]", Kind("XML, as storage services send in place of a file for errors", REPLACED)),
    (
        rb"\{\s*[\"}]|\[\s*([\[{\"\]\d-]|true|false|null)",
        Kind("JSON, as services send in place of a file for errors", REPLACED),
    ),
    (rb"HTTP/\d", Kind("an HTTP response without an image", REPLACED)),
    (rb"-----BEGIN (PGP|AGE)", Kind("encrypted", "decrypt it first")),
    (rb"\[InternetShortcut\]|\[Desktop Entry\]", Kind("a shortcut", "give the file that it leads to")),
    (rb"https?://\S+\s*\Z", Kind("text with an address", "download the image from there, and give the file")),
    (
        rb"(?i)[^\r\n]*\.(jpe?g|jpe|jfif|png|heic|webp|avif|tiff?|gif|bmp)\Z",
        Kind("text with the name of another file, such as a symbolic link that was copied as a file", "give that file"),
    ),
    (rb"\Z", other("blank: it holds nothing except white space")),
)

OTHER_TEXT = other("text")

BINARY = tuple((re.compile(pattern, re.DOTALL), kind) for pattern, kind in _BINARY)
"""Patterns of the beginning of a file, in the order of their judgement."""
TEXTS = tuple((re.compile(pattern), kind) for pattern, kind in _TEXTS)
"""Patterns of the beginning of a text in UTF-8, without white space before it."""
