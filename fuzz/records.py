"""Values of Kafka records: requests whose fields, text or bytes are odd."""

from __future__ import annotations

import json
from random import Random
from typing import Any

from fuzz import bytewise
from models import EncodeRequest

PHOTO = "photo.jpg"  # a relative path: the working folder of the fuzzing process has this image
PLACEHOLDER = "@@"  # stands for a value that json.dumps cannot write

FIELDS = tuple(EncodeRequest.model_fields)
SOUND = {
    "image_path": PHOTO,
    "vae_model_name": "pixel_space",
    "upscale_method": "lanczos",
    "megapixels": 0.01,
    "request_id": "a",
    "correlation_id": "b",
    "timestamp": 1234567890,
}
TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "//",
        "a/../b",
        "../../etc/passwd",
        "-",
        "~",
        "$(id)",
        "%s%n",
        "a\0b",
        "\n",
        "\r\n\t",
        "\x7f\x1b[31m",
    ),
    *(
        "é",
        "e\u0301",
        "\u202edcba",
        "\ufeff",
        "\uffff",
        "😀",
        "ß" * 300,
        "a" * 256,
        "a" * 5000,
        "x/" * 3000,
        "\ud800",
        "a\udcff",
    ),
    *(
        "NaN",
        "null",
        "1",
        "true",
        "lanczos",
        "LANCZOS",
        "nearest",
        "area",
        "safetensors",
        "comfy",
        "pixel_space",
        "taesd",
        "taesdxl",
        "tiny_qwen_vae.safetensors",
    ),
    *(
        "/dev/null",
        "/dev/zero",
        "/dev/stdin",
        "/",
        "/dev/fd/0",
        "photo.jpg [output]",
        "photo.jpg/",
        "./photo.jpg",
        "image.png",
    ),
)
NUMBERS = (0, -1, 1, 0.01, 0.0099, 16, 16.1, 1e-320, 1e308, -0.0, 2**31, 2**63, 2**64, 10**300, float("nan"), float("inf"))
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [1], {"a": 1}, [[]], ["photo.jpg"], {"image_path": "photo.jpg"})
RAW = (
    *(
        "1e999",
        "-1e999",
        "1" * 4000,
        "1" * 5000,
        "0." + "1" * 5000,
        "1E400",
        "01",
        "0x10",
        "1_0",
        "'a'",
        "undefined",
        '"\\ud800"',
    ),
    *('"\\u0000"', '"\\ud800\\udc00"', '"\\udc00\\ud800"', '"\t"', '"\\x"', "[" * 900 + "]" * 900, "[" * 990 + "]" * 990),
    *(
        "[" * 100_000,
        '{"a":' * 985 + "1" + "}" * 985,
        "[" * 500_000 + "]" * 500_000,
        '"' + "a" * 900_000 + '"',
        "Infinity",
        "-NaN",
    ),
)


def damaged_record(rng: Random) -> tuple[str, bytes]:
    """Return the damage's name, and the record's value."""
    mutate = rng.choice((values, values, values, texts, texts, encodings, repeated_names, no_object, sizes))
    data = mutate(rng)
    if rng.random() < 0.2:
        blind = rng.choice(bytewise.MUTATIONS)
        return f"{mutate.__name__}+{blind.__name__}", bytewise.damaged(data, blind, rng, data)
    return mutate.__name__, data


def values(rng: Random) -> bytes:
    """Return a request with fields of any type and value, left out, or added."""
    return json.dumps(_fields(rng), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def texts(rng: Random) -> bytes:
    """Return a request with a value that only raw text can have: numbers out of range, deep nesting, broken escapes."""
    name = rng.choice(FIELDS)
    text = json.dumps({**_fields(rng), name: PLACEHOLDER})
    return text.replace(f'"{PLACEHOLDER}"', rng.choice(RAW)).encode("utf-8", "surrogatepass")


def encodings(rng: Random) -> bytes:
    """Return a request in another encoding than UTF-8, or with a byte order mark, overlong or stray bytes."""
    text = json.dumps(_fields(rng))
    stray = rng.choice((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\x80", b"\xf5\x80\x80\x80", b"\0"))
    place = rng.randrange(len(text))
    return rng.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-32"),
            b"\xef\xbb\xbf" + text.encode(),
            b"\xef\xbb\xbf" * 2 + text.encode(),
            text[:place].encode() + stray + text[place:].encode(),
        )
    )


def repeated_names(rng: Random) -> bytes:
    """Return a request with the same name several times, also in broken JSON."""
    name, count = rng.choice(FIELDS), rng.choice((1, 2, 1000))
    pairs = [json.dumps({rng.choice((name, rng.choice(FIELDS))): _value(rng)})[1:-1] for _ in range(count)]
    text = "{" + ",".join([*pairs, json.dumps(_fields(rng))[1:-1]])
    return (text + rng.choice(("}", "", "}}", ",}"))).encode("utf-8", "surrogatepass")


def no_object(rng: Random) -> bytes:
    """Return JSON that is not an object, or no JSON."""
    value = rng.choice((*OTHERS, *TEXTS, 1, 1.5, "{}", [_fields(rng)]))
    return rng.choice((b"", b" ", b"null", b"{", b"}", json.dumps(value).encode(), b"\0" * 100))


def sizes(rng: Random) -> bytes:
    """Return a request with many fields, or with more bytes than a record may have."""
    count = rng.choice((10, 1000, 40_000, 200_000))
    fields = {**{f"f{number}": number for number in range(count)}, **_fields(rng)}
    return json.dumps(fields).encode()


def _fields(rng: Random) -> dict[str, Any]:
    fields: dict[str, Any] = dict(SOUND)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        name = rng.choice(FIELDS)
        if rng.random() < 0.15:
            fields.pop(name, None)
        else:
            fields[name] = _value(rng)
    if rng.random() < 0.1:
        fields[rng.choice(TEXTS)] = _value(rng)
    return fields


def _value(rng: Random) -> Any:
    return rng.choice(rng.choice((TEXTS, TEXTS, NUMBERS, OTHERS)))
