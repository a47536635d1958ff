"""Files in the place of a VAE that are something else, named for it, each with the next step.

Each text is the reason in an error message, after "VAE model … cannot be used (…): ". Files of other formats are recognised by
their first bytes, and models that are no VAE by the names of their tensors.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

SAFETENSORS = (".safetensors", ".sft")  # ComfyUI reads files with these endings as safetensors, and all others as pickles

AGAIN = "download it again"
GET_VAE = "get the VAE as a file of its own, in safetensors"
GET_PLAIN = "get the file in bf16, fp16 or fp32"

HEAD_BYTES = 4096
"""Bytes from which a format is recognised. The signatures lie in the first 300; the rest is for text before a tag."""

LARGEST_HEADER = 100_000_000
"""The largest header in bytes that the safetensors library accepts. A larger number in its place means another format."""

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"

SIGNATURES = (
    (b"GGUF", f"it is a GGUF file, which VAELoader does not read; {GET_VAE}"),
    (b"\x89HDF\r\n", f"it is an HDF5 file, as Keras writes them; {GET_VAE}"),
    (b"\x93NUMPY", f"it is a NumPy array; {GET_VAE}"),
    (b"\x1f\x8b", "it is a gzip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7-Zip archive; unpack it"),
    (b"Rar!", "it is a RAR archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is a Zstandard archive; unpack it"),
    (b"\xfd7zXZ\x00", "it is an XZ archive; unpack it"),
    (b"BZh", "it is a bzip2 archive; unpack it"),
    (b"\x89PNG", "it is a PNG image, not a model"),
    (b"\xff\xd8\xff", "it is a JPEG image, not a model"),
    (b"%PDF", "it is a PDF document, not a model"),
    (
        b"version https://git-lfs",
        "it is a Git LFS pointer, not the model; run `git lfs pull` in its repository, or download the file",
    ),
    (b"/annex/objects/", "it is a git-annex pointer, not the model; run `git annex get` for it"),
    (b"../.git/annex/", "it is a git-annex pointer, not the model; run `git annex get` for it"),
)
"""First bytes of files that are neither safetensors nor pickles, and the reason."""

HTML = re.compile(rb"<!doctype html|<html|<head[ >]", re.IGNORECASE)
ONNX = re.compile(rb"\x08[\x01-\x20](?:\x10[\x00-\x7f])?\x12.[ -~]+", re.DOTALL)  # version of the format, name of the program
TAR_SIGNATURE, TAR_PLACE = b"ustar", 257

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.")

QUANTISED = re.compile(
    r"(?:^|[._])(?:scale_weight|weight_scale\w*|scale_input|input_scale\w*|scaled_fp8|comfy_quant|weight_zero_point|zero_point"
    r"|qweight|qzeros|g_idx|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\w*|SCB|weight_format|scales)(?:$|\.)"
)
"""Names of the tensors that stand beside quantised weights, as ComfyUI, diffusers, bitsandbytes and GPTQ write them."""

# Names of tensors that no VAE has, by the kind of model; the first row that matches a name of the file wins.
KINDS = (
    (
        re.compile(r"(?:lora_(?:up|down|A|B|unet|te\d?)\b|lora_(?:unet|te\d?)_|\.?lora\.(?:up|down)\.|hada_w1|lokr_w1)"),
        "a LoRA",
    ),
    (re.compile(r"^(?:control_model|controlnet_\w+|input_hint_block)\."), "a ControlNet"),
    (re.compile(r"^(?:image_proj|ip_adapter)\."), "an IP-Adapter"),
    (re.compile(r"(?:^|\.)vision_model\.encoder\.layers\.|^visual\.(?:blocks|transformer)\."), "a vision or text encoder"),
    (
        re.compile(
            r"(?:^|\.)text_model\.encoder\.layers\.|^(?:\w+\.)*encoder\.block\.\d+\.layer\.\d+\.SelfAttention"
            r"|^(?:model\.|language_model\.)*layers\.\d+\.self_attn\.|^(?:transformer\.)?resblocks\.|^(?:emb_params|string_to_param)"
        ),
        "a text encoder",
    ),
    (
        re.compile(
            r"^(?:model\.)?(?:diffusion_model\.)?(?:(?:single_)?transformer_blocks|double_blocks|single_blocks|double_stream_blocks"
            r"|joint_blocks|input_blocks|(?:down|up)_blocks|noise_refiner|patchify_proj|x_embedder|img_in|txt_in)\."
            r"|^(?:model\.)?(?:diffusion_model\.)?blocks\.\d+\.(?:self_attn|cross_attn|attn\d?)\.|^(?:model\.)?diffusion_model\."
        ),
        "a diffusion model",
    ),
    (
        re.compile(r"^(?:params\.|params_ema\.)?(?:conv_first\.|body\.\d+\.rdb1\.|model\.1\.sub\.)"),
        "a model that enlarges images",
    ),
    (re.compile(r"^latent(?:_tensor)?$"), "a latent"),
)

CHECKPOINT = "a full checkpoint"

SAVE_VAE = "in ComfyUI, the nodes CheckpointLoaderSimple and VAESave write its VAE to a file, which goes into the VAE folder"


def kind_of_bytes(path: Path) -> str | None:
    """Return the reason why a file that is neither safetensors nor a pickle is no VAE, by its first bytes; None if unknown.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return f"it is empty (0 bytes); {AGAIN}"
    if not any(head):
        return f"it begins with {len(head)} zeros, as a download that was broken off leaves it; {AGAIN}"
    for signature, reason in SIGNATURES:
        if head.startswith(signature):
            return reason
    if head[TAR_PLACE:].startswith(TAR_SIGNATURE):
        return "it is a tar archive; unpack it"
    if ONNX.match(head):
        return f"it is an ONNX model, which VAELoader does not read; {GET_VAE}"
    return _kind_of_text(head)


def _kind_of_text(head: bytes) -> str | None:
    """Return the reason for a file of text; None for any other one."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if HTML.search(text[:HEAD_BYTES]) and text.startswith(b"<"):
        return f"it is a web page (HTML), often a login or an error in place of the download; {AGAIN}"
    if text.startswith((b"<?xml", b"<Error")):
        return f"it is an XML document, often an error in place of the download; {AGAIN}"
    if text[:1] in (b"{", b"["):
        if b"weight_map" in text:
            return f"it is the index of a model in several files, not the model; VAELoader reads one file: {GET_VAE}"
        return f"it is a JSON document, often a configuration or an error in place of the download; {AGAIN}"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in text):
        return f"it is a text, not a model; {AGAIN}"
    return None


def kind_of_safetensors(path: Path, error: str) -> str:
    """Return the reason why a file with the ending of a safetensors file cannot be read as one; `error` is the library's.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if reason := kind_of_bytes(path):
        return reason
    if head.startswith(ZIP):
        return _kind_of_zip(path)
    if head.startswith(PICKLE):
        return "it is a pickle whose name ends like that of a safetensors file; get the model as safetensors"
    return _cut(path, head) or f"it is no sound safetensors file ({error}); {AGAIN}"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return f"it is a damaged or truncated archive; {AGAIN}"
    if any(name.endswith("data.pkl") for name in names):
        return "it is a pickle of torch.save whose name ends like that of a safetensors file; rename it so that it ends in .pt"
    return "it is a ZIP archive; unpack it"


def _cut(path: Path, head: bytes) -> str | None:
    """Return the reason for a safetensors file of another size than its header says; None if it is none."""
    size = path.stat().st_size
    length = int.from_bytes(head[:8], "little")
    if length > LARGEST_HEADER or not head[8:9].startswith(b"{"):
        return None
    if 8 + length > size:
        return f"it is truncated: it has {size} bytes, and its header alone takes {8 + length}; {AGAIN}"
    with path.open("rb") as file:
        file.seek(8)
        content = file.read(length)
    try:
        entries = [entry for name, entry in json.loads(content).items() if name != "__metadata__"]
        whole = 8 + length + max(int(entry["data_offsets"][1]) for entry in entries)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None
    if whole > size:
        return f"it is truncated: it has {size} of {whole} bytes; {AGAIN}"
    return f"it has {size - whole} bytes too many; {AGAIN}" if whole < size else None


def is_safetensors(path: Path) -> bool:
    """Return whether a file's first bytes are those of a safetensors file."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= min(LARGEST_HEADER, path.stat().st_size - 8)


def part_of(path: Path) -> str | None:
    """Return the reason for a file whose name is that of one part of a model in several; None for any other one."""
    found = _PART.search(path.name)
    if found is None or int(found[2]) < 2:
        return None
    return (
        f"it is part {int(found[1])} of {int(found[2])} of a model in several files, by its name; VAELoader reads one file: "
        f"{GET_VAE}"
    )


def kind_of_tensors(names: Iterable[str]) -> str | None:
    """Return the reason why a model with tensors of these names is no VAE that VAELoader reads; None if it may be one."""
    kind = model_kind(names)
    if kind == CHECKPOINT:
        return f"it is {kind}, of which VAELoader reads no part; {SAVE_VAE}"
    return None if kind is None else f"it is {kind}, not a VAE; name the VAE that belongs to your diffusion model"


def model_kind(names: Iterable[str]) -> str | None:
    """Return the kind of a model with tensors of these names, such as `a LoRA`; None if it may be a VAE."""
    names = list(names)
    if any(name.startswith(("first_stage_model.", "vae.")) for name in names):
        return CHECKPOINT
    return next((kind for pattern, kind in KINDS if any(pattern.search(name) for name in names)), None)


def quantised(names: Iterable[str]) -> list[str]:
    """Return the names that stand beside quantised weights."""
    return [name for name in names if QUANTISED.search(name)]


def shortened(names: Sequence[str], shown: int) -> str:
    """Return the first names, and the number of the others: `a, b, c and 12 more`."""
    first = ", ".join(names[:shown])
    return first if len(names) <= shown else f"{first} and {len(names) - shown} more"
