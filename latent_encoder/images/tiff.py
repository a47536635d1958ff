"""TIFF files, and the raw files of cameras that have the form of a TIFF."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from latent_encoder.images.content_kinds import TIFF, Kind, raw

BYTE_ORDERS: Mapping[bytes, str] = {b"II*\0": "<", b"MM\0*": ">"}
BIG_TIFF = (b"II+\0", b"MM\0+")

ENTRY_BYTES = 12  # of one tag
MOST_TAGS = 200  # of the first image; cameras write up to 70
MAKE, SUB_IMAGES, DNG_VERSION = 271, 330, 50706  # tags; a plain TIFF has no smaller images in it
MAKE_BYTES = 40  # longer than each name below

CANON_MARK = b"CR"  # at byte 8 of a CR2
MAKERS: tuple[tuple[bytes, str], ...] = (
    (b"NIKON", "Nikon NEF"),
    (b"SONY", "Sony ARW"),
    (b"PENTAX", "Pentax PEF"),
    (b"RICOH", "Pentax PEF"),
    (b"SAMSUNG", "Samsung SRW"),
    (b"Hasselblad", "Hasselblad 3FR"),
    (b"Phase One", "Phase One IIQ"),
    (b"Leaf", "Leaf MOS"),
    (b"EASTMAN KODAK", "Kodak"),
    (b"SEIKO EPSON", "Epson ERF"),
)


def kind_of_tiff(data: bytes) -> Kind | None:
    """Return the kind of a file that begins like a TIFF, None for every other file."""
    if data.startswith(BIG_TIFF):
        return TIFF
    order = BYTE_ORDERS.get(data[:4])
    if order is None:
        return None
    if data[8:10] == CANON_MARK:
        return raw("Canon CR2")
    tags = _tags(data, order)
    if DNG_VERSION in tags:
        return raw("DNG")
    maker = data[tags[MAKE] : tags[MAKE] + MAKE_BYTES] if MAKE in tags else b""
    camera = next((name for beginning, name in MAKERS if maker.upper().startswith(beginning.upper())), None)
    return raw(camera) if camera is not None and SUB_IMAGES in tags else TIFF


def _tags(data: bytes, order: str) -> Mapping[int, int]:
    """Return the tags of the first image, each with its value or the place of its value; none if they are not there."""
    try:
        (place,) = struct.unpack_from(f"{order}I", data, 4)
        (number,) = struct.unpack_from(f"{order}H", data, place)
        entries = range(place + 2, place + 2 + min(number, MOST_TAGS) * ENTRY_BYTES, ENTRY_BYTES)
        return dict(struct.unpack_from(f"{order}H6xI", data, entry) for entry in entries)
    except struct.error:
        return {}
