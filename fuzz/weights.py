"""Damage to safetensors files: eight bytes of length, a JSON header of that length, and the tensors' values."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Self

DTYPES = (
    "BOOL",
    "U8",
    "I8",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
    "C64",
    "F8_E4M3",
    "F8_E5M2",
)
ODD_DTYPES = ("F4", "F6_E2M3", "F8_E8M0", "f32", "", "F128", None, 7)
SIZES = (0, 1, 2, 3, 7, 4096, 1_000_000, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64, -1)
HOLE_BYTES = 64_000_000

# ComfyUI recognises architectures by the names of these tensors, and sizes some of them by their shapes.
TELLING_NAMES = (
    "decoder.up_blocks.0.resnets.0.norm1.weight",
    "decoder.mid.block_1.mix_factor",
    "taesd_decoder.1.weight",
    "vquantizer.codebook.weight",
    "backbone.1.0.block.0.1.num_batches_tracked",
    "blocks.11.num_batches_tracked",
    "encoder.backbone.1.0.block.0.1.num_batches_tracked",
    "decoder.conv_in.weight",
    "post_quant_conv.weight",
    "bn.running_mean",
    "decoder.layers.1.layers.0.beta",
    "blocks.2.blocks.3.stack.5.weight",
    "layers.4.layers.1.attn_block.attn.qkv.weight",
    "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
    "decoder.conv_in.conv.weight",
    "decoder.unpatcher3d.wavelets",
    "decoder.upsamples.0.upsamples.0.residual.2.weight",
    "decoder.middle.0.residual.0.gamma",
    "decoder.head.0.gamma",
    "geo_decoder.cross_attn_decoder.ln_1.bias",
    "vocoder.backbone.channel_layers.0.0.bias",
    "pixel_space_vae",
    "vocoder.activation_post.downsample.lowpass.filter",
    "decoder.22.bias",
    "decoder.1.weight",
)


@dataclass
class WeightsFile:
    """A safetensors file in parts. `header` is replaced and not changed, since copies share it."""

    header: dict[str, Any]
    values: bytes
    hole: int
    """Number of zeros after the values that are not stored."""
    raw_header: bytes | None = None
    """Bytes in place of the header, if that is not valid JSON."""
    said_length: int | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        values = data[8 + length :]
        return cls(header, values, end - len(values))

    def copy(self) -> WeightsFile:
        return WeightsFile(self.header, self.values, self.hole)

    def to_bytes(self) -> bytes:
        header = json.dumps(self.header).encode() if self.raw_header is None else self.raw_header
        length = len(header) if self.said_length is None else self.said_length
        return struct.pack("<Q", length & (2**64 - 1)) + header + self.values

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def change(self, name: str, **entries: Any) -> None:
        self.header = {**self.header, name: {**self.header[name], **entries}}

    def add(self, name: str, dtype: str, shape: list[int], bytes_each: int) -> None:
        """Add a tensor of zeros behind the others, in the hole."""
        end = len(self.values) + self.hole
        size = bytes_each
        for side in shape:
            size *= side
        self.header = {**self.header, name: {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}}
        self.hole += size


def header_length(file: WeightsFile, rng: Random) -> WeightsFile:
    length = len(json.dumps(file.header))
    file.said_length = rng.choice((0, 1, length - 1, length + 1, length + len(file.values), 2**31, 2**40, 2**63, 2**64 - 1))
    return file


def dtype(file: WeightsFile, rng: Random) -> WeightsFile:
    for _ in range(rng.choice((1, 1, 10))):
        file.change(rng.choice(file.names), dtype=rng.choice((*DTYPES, *ODD_DTYPES)))
    return file


def same_size_dtype(file: WeightsFile, rng: Random) -> WeightsFile:
    """Give tensors another dtype of the same size: the file is whole, and the numbers are senseless."""
    sizes = {"BF16": ("F16", "I16", "U16"), "F16": ("BF16", "I16", "U16"), "F32": ("I32", "U32")}
    names = file.names if rng.random() < 0.5 else rng.sample(file.names, min(3, len(file.names)))
    for name in names:
        now = file.header[name]["dtype"]
        file.change(name, dtype=rng.choice(sizes.get(now, (now,))))
    return file


def shape(file: WeightsFile, rng: Random) -> WeightsFile:
    """Change a shape, to one that the values do not fill or fill in another way."""
    name = rng.choice(file.names)
    sides = list(file.header[name]["shape"])
    choice = rng.randrange(4)
    if choice == 0 and sides:
        sides[rng.randrange(len(sides))] = rng.choice(SIZES)
    elif choice == 1:
        sides.reverse()
    elif choice == 2:
        sides = rng.choice(([1, *sides], [*sides, 1], [1] * 70 + sides))
    else:
        sides = rng.choice(([], [[1]], ["a"], [1.5], [None], [2**62, 4], [65536, 65536, 65536, 65536]))
    file.change(name, shape=sides)
    return file


def offsets(file: WeightsFile, rng: Random) -> WeightsFile:
    """Make tensors overlap, leave gaps, end before they begin or lie outside the file."""
    first, second = rng.choice(file.names), rng.choice(file.names)
    start, end = file.header[first]["data_offsets"]
    value = rng.choice(
        (
            file.header[second]["data_offsets"],
            [end, start],
            [start + 1, end + 1],
            [start, end + rng.choice((1, 2**31, 2**62))],
            [-1, end],
            [2**64 - 2, 2**64],
            [start],
            [],
            None,
            ["0", "4"],
        )
    )
    file.change(first, data_offsets=value)
    return file


def tensors_left_out(file: WeightsFile, rng: Random) -> WeightsFile:
    """Rename some tensors, so that they are missing."""
    gone = set(rng.sample(file.names, rng.choice((1, 1, 5, len(file.names)))))
    file.header = {(f"x.{name}" if name in gone else name): entry for name, entry in file.header.items()}
    return file


def tensors_renamed(file: WeightsFile, rng: Random) -> WeightsFile:
    """Swap the names of two tensors."""
    names = file.names
    first, second = rng.choice(names), rng.choice(names)
    file.header = {**file.header, first: file.header[second], second: file.header[first]}
    return file


def wild_values(file: WeightsFile, rng: Random) -> WeightsFile:
    """Set values that are infinite, not a number, or large enough to overflow in the encode."""
    patterns = {"BF16": (0x7F80, 0x7FC0, 0xFF80, 0x7F00, 0x5F00), "F16": (0x7C00, 0x7E00, 0x7B00)}
    wide = (0x7F800000, 0x7FC00000, 0x7F000000, 0x5F000000)
    values = bytearray(file.values)
    for name in rng.sample(file.names, min(len(file.names), rng.choice((1, 3)))):
        entry = file.header[name]
        start, end = entry["data_offsets"]
        if end > len(values):
            continue  # in the hole
        size = 4 if entry["dtype"] == "F32" else 2
        pattern = rng.choice(wide if size == 4 else patterns.get(entry["dtype"], (0x7F80,))).to_bytes(size, "little")
        count = (end - start) // size if rng.random() < 0.5 else 1
        values[start : start + count * size] = pattern * count
    file.values = bytes(values)
    return file


def metadata(file: WeightsFile, rng: Random) -> WeightsFile:
    value: Any = rng.choice(
        (
            {f"key{n}": "x" * 20 for n in range(20_000)},
            {"config": "[" * 100_000},
            {"config": json.dumps({"vae": {"dims": "x"}})},
            {"a": 1},
            [],
            None,
            "text",
            {"modelspec.architecture": "\ud800"},
        )
    )
    file.header = {"__metadata__": value, **file.header}
    return file


def header_text(file: WeightsFile, rng: Random) -> WeightsFile:
    """Replace the header by odd JSON, or by no JSON."""
    text = json.dumps(file.header).encode()
    first = json.dumps(file.names[0]).encode()
    file.raw_header = rng.choice(
        (
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
            b"{}",
            b"[]",
            b"null",
            b"",
            text + b" " * 1000,
            b" " + text,
            text[:-1] + b"," + first + b":" + json.dumps(file.header[file.names[-1]]).encode() + b"}",
            text.replace(b'"shape"', b'"shape": [9], "shape"', 1),
            text.replace(b"weight", b"w\\u0000\\ud83d\\ude00", 1),
            text.replace(b"weight", b"\\ud800", 1),
            text.replace(b"weight", b"\xff", 1),
            text.replace(b"bias", b"b" * 100_000, 1),
        )
    )
    return file


def end_of_file(file: WeightsFile, rng: Random) -> WeightsFile:
    """Make the values end too early or too late."""
    if rng.random() < 0.5:
        file.values, file.hole = file.values[: rng.randrange(len(file.values) + 1)], 0
    else:
        file.hole += rng.choice((1, 1000, HOLE_BYTES))
    return file


def telling_tensor(file: WeightsFile, rng: Random) -> WeightsFile:
    """Add a tensor that makes ComfyUI take the file for another architecture, or for a larger one."""
    if rng.random() < 0.5:
        file = WeightsFile({}, b"", 0)
    for name in rng.sample(TELLING_NAMES, rng.choice((1, 2, 4))):
        sides = [rng.choice((0, 1, 4, 16, 32, 64, 512, 1024, 4096)) for _ in range(rng.choice((1, 2, 4, 4, 5)))]
        while _product(sides) * 2 > HOLE_BYTES:
            sides[rng.randrange(len(sides))] = 1
        file.add(name, "F16", sides, 2)
    return file


def oversized(file: WeightsFile, rng: Random) -> WeightsFile:
    """Return a file with large tensors from which ComfyUI takes the size of the whole model."""
    width = rng.choice((200, 1000, 4000, 20_000, 1_000_000))
    sized: list[tuple[str, list[int]]] = rng.choice(
        (
            [("decoder.middle.0.residual.0.gamma", [width, 1, 1, 1]), ("decoder.head.0.gamma", [width, 1, 1, 1])],
            [("decoder.conv_in.weight", [1, width, 1, 1])],
            [("decoder.conv_in.weight", [1, width, 1, 1]), ("post_quant_conv.weight", [1, width, 1, 1])],
            [("taesd_decoder.1.weight", [1, width, 1, 1])],
            [("decoder.22.bias", [12]), ("decoder.1.weight", [1, width, 1, 1])],
        )
    )
    file = WeightsFile({}, b"", 0)
    for name, sides in sized:
        file.add(name, "F16", sides, 2)
    return file


def _product(sides: list[int]) -> int:
    product = 1
    for side in sides:
        product *= side
    return product


MUTATIONS: tuple[Callable[[WeightsFile, Random], WeightsFile], ...] = (
    header_length,
    dtype,
    same_size_dtype,
    shape,
    offsets,
    tensors_left_out,
    tensors_renamed,
    wild_values,
    metadata,
    header_text,
    end_of_file,
    telling_tensor,
    telling_tensor,
    oversized,
)
