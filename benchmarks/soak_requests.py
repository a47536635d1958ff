"""The requests of the soak: good and bad ones of every kind from a seeded generator, each with its expected outcome."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, get_args
from uuid import UUID

from PIL import Image

from errors import ErrorCode
from models import MAX_MEGAPIXELS, MIN_MEGAPIXELS, UpscaleMethod
from tests.helpers import IMAGES, TINY_VAE, stock

MAX_MESSAGE_BYTES = 100_000

FIXTURES = (
    "astronaut.png",
    "astronaut_masked.png",
    "cmyk.jpg",
    "exif_orientation_6.jpg",
    "grey.png",
    "palette_with_transparency.png",
    "photo.jpg",
    "progressive.jpeg",
    "rgba.png",
    "two_frames_mpo.jpg",
)
PHOTOS = ((640, 480), (480, 853), (1280, 720), (1080, 1920), (2000, 1500), (3000, 2000))  # pixels, as JPEGs


@dataclass(frozen=True)
class Share:
    """A VAE, the number of its requests in each twenty, and the largest size of those."""

    vae: str
    of_twenty: int
    megapixels: float


# The SD-style VAE has its real size: it is far larger than the others, and slow.
VAES = (Share(TINY_VAE, 11, 0.5), Share("taesd", 2, 0.5), Share("random_kl.safetensors", 7, 0.03))

GOOD_PERCENT = 70
NO_ID_PERCENT = 2  # a part of the good ones
REPEATED_PERCENT = 10  # all others are bad
REPEATABLE = 20  # a repetition is chosen from this number of last successes
KEPT = 200  # the last successes that keep their files: ten times REPEATABLE, because a repetition may be in flight

GOOD, GOOD_WITHOUT_ID, REPEATED = "good", "good, no id", "repeated"

Fields = dict[str, Any]
Response = Mapping[str, Any]


@dataclass(frozen=True)
class Expected:
    """The expected outcome of a request: its code, in a response, a dead letter or both."""

    code: ErrorCode | None = None
    """None: success."""
    response: bool = True
    dead_letter: bool = False


@dataclass(frozen=True)
class Planned:
    """A message to send. `stored` is the metadata of the response that must come again, for a repeated request."""

    kind: str
    value: bytes
    expected: Expected
    request_id: str | None
    stored: Mapping[str, Any] | None = None


def environment(folder: Path) -> dict[str, str]:
    """Return the settings with which the service has the models and each kind of request is cheap to make."""
    return {
        "MODEL_DIR": str(folder / "models"),
        "ALLOWED_INPUT_DIRS": f"{IMAGES},{folder}",
        "ALLOWED_OUTPUT_DIRS": str(folder),
        "VAE_CACHE_SIZE": str(len(VAES) - 1),  # they take turns in memory
        "KAFKA_MAX_MESSAGE_BYTES": str(MAX_MESSAGE_BYTES),
        "KAFKA_MAX_RETRIES": "2",
        "KAFKA_RETRY_BACKOFF_S": "0.05",
    }


def as_json(fields: Fields) -> bytes:
    return json.dumps(fields).encode()


@dataclass(frozen=True)
class Kind:
    """A bad request: a good one except for some fields, or for the way in which it becomes a message."""

    name: str
    expected: Expected
    fields: Fields = field(default_factory=dict)
    message: Callable[[Fields], bytes] = as_json


def bad_kinds(folder: Path) -> tuple[Kind, ...]:
    """Return every way in which a request of the soak is bad; a new one is a line here."""
    code = ErrorCode
    twice = Expected(code.MESSAGE_UNUSABLE, dead_letter=True)
    nobody = Expected(code.MESSAGE_UNUSABLE, response=False, dead_letter=True)
    return (
        Kind("missing image", Expected(code.IMAGE_NOT_FOUND), {"image_path": str(folder / "missing.png")}),
        Kind(
            "missing image, no id",
            Expected(code.IMAGE_NOT_FOUND),
            {"image_path": str(folder / "missing.png"), "request_id": None},
        ),
        Kind("truncated image", Expected(code.IMAGE_INVALID), {"image_path": str(IMAGES / "truncated.jpg")}),
        Kind("image with a bad checksum", Expected(code.IMAGE_INVALID), {"image_path": str(IMAGES / "bad_checksum.png")}),
        Kind("image that is text", Expected(code.IMAGE_INVALID), {"image_path": str(IMAGES / "text.png")}),
        Kind("decompression bomb", Expected(code.IMAGE_INVALID), {"image_path": str(IMAGES / "decompression_bomb.png")}),
        Kind("image outside of the allowed folders", Expected(code.ACCESS_DENIED), {"image_path": "/etc/hostname"}),
        Kind("output outside of the allowed folders", Expected(code.ACCESS_DENIED), {"output_dir": str(folder.parent)}),
        Kind("unknown VAE", Expected(code.VAE_MODEL_NOT_FOUND), {"vae_model_name": "unknown.safetensors"}),
        Kind("truncated VAE", Expected(code.VAE_MODEL_INVALID), {"vae_model_name": "truncated.safetensors"}),
        Kind("VAE that is text", Expected(code.VAE_MODEL_INVALID), {"vae_model_name": "text.safetensors"}),
        Kind("size out of range", Expected(code.INVALID_REQUEST), {"megapixels": 2 * MAX_MEGAPIXELS}),
        Kind("size that is text", Expected(code.INVALID_REQUEST), {"megapixels": "0.1"}),
        Kind("no image path", Expected(code.INVALID_REQUEST), {"image_path": None}),
        Kind(
            "too narrow when scaled",
            Expected(code.SCALING_FAILED),
            {"image_path": str(IMAGES / "5x4000.png"), "megapixels": MIN_MEGAPIXELS},
        ),
        Kind(
            "unwritable folder",
            Expected(code.OUTPUT_DIR_NOT_WRITABLE, dead_letter=True),
            {"output_dir": str(folder / "file" / "output"), "megapixels": MIN_MEGAPIXELS},
        ),
        Kind("JSON cut off", twice, message=lambda fields: as_json(fields)[:-1]),
        Kind("too large", twice, message=lambda fields: as_json(fields | {"padding": "x" * MAX_MESSAGE_BYTES})),
        Kind("no JSON", nobody, message=lambda _: b"encode this, please"),
        Kind("not UTF-8", nobody, message=lambda _: b'{"image_path": "\xff"}'),
        Kind("no object", nobody, message=lambda _: b"[]"),
    )


def prepare(folder: Path) -> tuple[Path, ...]:
    """Make the images and, in `folder/models`, the VAEs of the requests; return the good images."""
    models = folder / "models"
    stock("make-vaes", models, "kl", "taesd")
    (models / "vae" / "text.safetensors").write_text("no weights\n")
    whole = (models / "vae" / "random_kl.safetensors").read_bytes()
    (models / "vae" / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "file").touch()
    portrait = Image.open(IMAGES / "astronaut.png").convert("RGB")
    photos = [folder / f"photo_{width}x{height}.jpg" for width, height in PHOTOS]
    for photo, size in zip(photos, PHOTOS, strict=True):
        portrait.resize(size).save(photo, quality=90)
    return (*(IMAGES / name for name in FIXTURES), *photos)


class Generator:
    """The requests of a soak, the same for the same seed and the same responses."""

    def __init__(self, folder: Path, images: Sequence[Path], seed: int) -> None:
        self._random = Random(seed)  # noqa: S311  # nothing secret depends on it
        self._folder = folder
        self._images = images
        self._bad = bad_kinds(folder)
        self._answered: deque[tuple[Planned, Response]] = deque()
        self._pack: list[Share] = []

    def one_of_each(self) -> Iterator[Planned]:
        """Yield a request for every VAE at its largest size, one without an id, and one of every bad kind."""
        for share in VAES:
            yield self._good(vae_model_name=share.vae, megapixels=share.megapixels)
        yield self._good(request_id=None)
        yield from map(self._of_kind, self._bad)

    def any_one(self) -> Planned:
        """Return a request of any kind."""
        chance = self._random.uniform(0, 100)
        if chance < GOOD_PERCENT:
            return self._good(**({"request_id": None} if chance < NO_ID_PERCENT else {}))
        if chance < GOOD_PERCENT + REPEATED_PERCENT and self._answered:
            request, response = self._random.choice(list(self._answered)[-REPEATABLE:])
            return replace(request, kind=REPEATED, stored=response["metadata"])
        return self._of_kind(self._random.choice(self._bad))

    def answered(self, request: Planned, response: Response) -> None:
        """Note a success, so that it can be repeated, and remove the files of older ones."""
        if request.kind == GOOD:
            self._answered.append((request, response))
        while len(self._answered) > KEPT:
            _, old = self._answered.popleft()
            for file in files_of(old):
                file.unlink()

    def _good(self, **changes: Any) -> Planned:
        fields = self._fields() | changes
        request_id = fields["request_id"]
        return Planned(GOOD if request_id else GOOD_WITHOUT_ID, as_json(fields), Expected(), request_id)

    def _of_kind(self, kind: Kind) -> Planned:
        fields = self._fields() | kind.fields
        return Planned(kind.name, kind.message(fields), kind.expected, fields["request_id"])

    def _share(self) -> Share:
        """Return one of a shuffled pack, so that each VAE is in memory for the same time at the end as at the start."""
        if not self._pack:
            self._pack = [share for share in VAES for _ in range(share.of_twenty)]
            self._random.shuffle(self._pack)
        return self._pack.pop()

    def _fields(self) -> Fields:
        share = self._share()
        return {
            "request_id": str(UUID(int=self._random.getrandbits(128), version=4)),
            "image_path": str(self._random.choice(self._images)),
            "vae_model_name": share.vae,
            "upscale_method": self._random.choice(get_args(UpscaleMethod)),
            "megapixels": round(MIN_MEGAPIXELS * (share.megapixels / MIN_MEGAPIXELS) ** self._random.random(), 4),
            "output_dir": str(self._folder / "output"),
        }


def files_of(response: Response) -> tuple[Path, Path, Path]:
    """Return the files that a success names."""
    latent = response["latent_file_path"]
    return Path(latent), Path(response["scaled_image_path"]), Path(f"{latent}.json")
