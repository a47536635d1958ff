"""The errors of this service, as a small closed hierarchy.

A `RequestError` becomes an error response. Each of its classes owns its code, and knows whether a retry can help. A
`SetupError` means that the service itself cannot work, so no request gets a response. `KafkaFailed` stops Kafka mode with
nothing committed. Foreign exceptions are translated into these classes once, by `translated`, at the call of foreign code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import ClassVar

OUT_OF_MEMORY = "memory ran out; ask for fewer megapixels or give the service more memory"

GPU_OUT_OF_MEMORY = 2
"""The error code for memory that ran out in CUDA (`cudaErrorMemoryAllocation`) and HIP (`hipErrorOutOfMemory`)."""

_OUT_OF_MEMORY_TEXT = re.compile("DefaultCPUAllocator|(CUDA|HIP|XPU|MPS backend)( error:)? out of memory")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

SURROGATES_OF_BYTES = 0xDC00
"""The surrogate for a byte that is not UTF-8 is this much above it, by PEP 383."""


class ErrorCode(StrEnum):
    """The `error_code` of an error response."""

    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    IMAGE_INVALID = "IMAGE_INVALID"
    VAE_MODEL_NOT_FOUND = "VAE_MODEL_NOT_FOUND"
    VAE_MODEL_INVALID = "VAE_MODEL_INVALID"
    INVALID_REQUEST = "INVALID_REQUEST"
    ACCESS_DENIED = "ACCESS_DENIED"
    SCALING_FAILED = "SCALING_FAILED"
    ENCODING_FAILED = "ENCODING_FAILED"
    OUTPUT_DIR_NOT_WRITABLE = "OUTPUT_DIR_NOT_WRITABLE"
    MESSAGE_UNUSABLE = "MESSAGE_UNUSABLE"
    RESPONSE_REFUSED = "RESPONSE_REFUSED"


class LatentEncoderError(Exception):
    """The base of every error that this service raises on purpose. Its text is written for the user, in UTF-8."""

    def __init__(self, text: str) -> None:
        super().__init__(in_utf8(text))


class SetupError(LatentEncoderError):
    """The service cannot start: for example ComfyUI, one of its nodes or the device is missing."""


class LatentUnreadable(LatentEncoderError):
    """A file that should hold a latent does not. The text names the file and the reason."""


class RequestError(LatentEncoderError):
    """One request cannot get a latent."""

    code: ClassVar[ErrorCode]
    retryable: ClassVar[bool] = False


class InvalidRequest(RequestError):
    """A field of the request is missing, of the wrong type or out of range. The text names the field."""

    code = ErrorCode.INVALID_REQUEST


class AccessDenied(RequestError):
    """A path of the request leads out of the folders that the settings allow. The text reveals nothing about that place."""

    code = ErrorCode.ACCESS_DENIED


class ImageNotFound(RequestError):
    """The input image file does not exist."""

    code = ErrorCode.IMAGE_NOT_FOUND


class ImageInvalid(RequestError):
    """The input image is not a readable, complete, single-frame JPEG or PNG within the limits."""

    code = ErrorCode.IMAGE_INVALID


class VaeModelNotFound(RequestError):
    """No model folder has a VAE file of that name."""

    code = ErrorCode.VAE_MODEL_NOT_FOUND


class VaeModelInvalid(RequestError):
    """The VAE file exists but cannot encode images."""

    code = ErrorCode.VAE_MODEL_INVALID


class ScalingFailed(RequestError):
    """The image cannot be scaled to a size that the VAE can encode."""

    code = ErrorCode.SCALING_FAILED


class EncodingFailed(RequestError):
    """The VAE gave no usable latent, or memory ran out."""

    code = ErrorCode.ENCODING_FAILED
    retryable = True


class UnexpectedError(EncodingFailed):
    """A fault of ours: an exception that no code expects. It is the `__cause__`."""


class OutputDirNotWritable(RequestError):
    """The output folder cannot be created, or a file in it cannot be written."""

    code = ErrorCode.OUTPUT_DIR_NOT_WRITABLE
    retryable = True


class MessageUnusable(RequestError):
    """A Kafka record, or a line of a list, holds no request: it is too large, or no JSON object in UTF-8."""

    code = ErrorCode.MESSAGE_UNUSABLE


class ResponseRefused(RequestError):
    """The response is too large for its topic. The request becomes a dead letter instead."""

    code = ErrorCode.RESPONSE_REFUSED


class KafkaFailed(LatentEncoderError):
    """Kafka mode cannot go on: access was refused, the producer was fenced, or a dead letter was refused."""


def as_request_error(exc: BaseException) -> RequestError:
    """Return `exc` if it is a `RequestError`, else a new one that it caused: out of memory, or an `UnexpectedError`."""
    if isinstance(exc, RequestError):
        return exc
    error = (
        EncodingFailed(f"Request failed: {OUT_OF_MEMORY}")
        if is_out_of_memory(exc)
        else UnexpectedError(f"Unexpected error, please report it with the service's log: {one_line(exc)}")
    )
    error.__cause__ = exc
    return error


def is_out_of_memory(exc: BaseException) -> bool:
    """Return whether `exc` means that memory ran out: Python's, or torch's on a CPU or a GPU.

    For a GPU torch raises OutOfMemoryError, AcceleratorError with the error code 2, or a plain RuntimeError.
    """
    if not isinstance(exc, RuntimeError):
        return isinstance(exc, MemoryError)
    kind = type(exc).__name__  # torch is not imported here
    out_of_memory_code = kind == "AcceleratorError" and getattr(exc, "error_code", None) == GPU_OUT_OF_MEMORY
    return kind == "OutOfMemoryError" or out_of_memory_code or _OUT_OF_MEMORY_TEXT.search(str(exc)) is not None


def in_utf8(text: str) -> str:
    r"""Return the text with each lone surrogate, which UTF-8 lacks, written out.

    Python reads a byte of a file's name that is not UTF-8 as such a character: `\xff` stands for the byte 255.
    """
    return _LONE_SURROGATE.sub(lambda found: _written_out(ord(found[0])), text)


def _written_out(surrogate: int) -> str:
    byte = surrogate - SURROGATES_OF_BYTES
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{surrogate:04x}"


def one_line(exc: BaseException, limit: int = 300) -> str:
    """Return the text of a foreign exception, or its class name if it has none, on one line of at most `limit` characters."""
    try:
        text = in_utf8(" ".join(str(exc).split())) or type(exc).__name__
    except Exception:  # an exception whose text cannot be made
        text = type(exc).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def translated(error: type[RequestError], failed: str) -> Iterator[None]:
    """Turn every exception of foreign code inside into `error`; its text begins with `failed`, for example `Encoding failed`.

    Raises:
        RequestError: of the given class, or `EncodingFailed` if memory ran out.
    """
    try:
        yield
    except RequestError:
        raise
    except Exception as exc:
        if is_out_of_memory(exc):
            raise EncodingFailed(f"{failed}: {OUT_OF_MEMORY}") from exc
        raise error(f"{failed}: {one_line(exc)}") from exc
