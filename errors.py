"""Everything that can go wrong, as a small closed hierarchy.

A `RequestError` becomes an error response: each class owns its code and says whether trying the same request again can
help. A `SetupError` means that the service itself cannot work; no request is answered. Foreign exceptions are translated
into these once, where our code calls foreign code, by `translated`. `KafkaFailed` ends Kafka mode with nothing committed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import ClassVar

OUT_OF_MEMORY = "memory ran out; ask for fewer megapixels or give the service more memory"

GPU_OUT_OF_MEMORY = 2
"""The error code of that in CUDA (`cudaErrorMemoryAllocation`) and HIP (`hipErrorOutOfMemory`)."""

_OUT_OF_MEMORY_TEXT = re.compile("DefaultCPUAllocator|(CUDA|HIP|XPU|MPS backend)( error:)? out of memory")


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
    """Base of every error that this service raises on purpose; its text is written for the user."""


class SetupError(LatentEncoderError):
    """The service cannot start: no ComfyUI, a tree without a node that is needed, a device that is not there."""


class LatentUnreadable(LatentEncoderError):
    """A file that should hold a latent does not; the text names it and says what is wrong with it."""


class RequestError(LatentEncoderError):
    """One request cannot be answered with a latent."""

    code: ClassVar[ErrorCode]
    retryable: ClassVar[bool] = False


class InvalidRequest(RequestError):
    """A field of the request is missing, of the wrong type or out of range; the text names the field."""

    code = ErrorCode.INVALID_REQUEST


class AccessDenied(RequestError):
    """A path of the request leads out of the folders that the settings allow; the text does not tell what is there."""

    code = ErrorCode.ACCESS_DENIED


class ImageNotFound(RequestError):
    """The input image file does not exist."""

    code = ErrorCode.IMAGE_NOT_FOUND


class ImageInvalid(RequestError):
    """The input image is not a readable, whole, single-frame JPEG or PNG within the limits."""

    code = ErrorCode.IMAGE_INVALID


class VaeModelNotFound(RequestError):
    """No model folder has a VAE file of that name."""

    code = ErrorCode.VAE_MODEL_NOT_FOUND


class VaeModelInvalid(RequestError):
    """The VAE file is there but does not hold what encoding an image needs."""

    code = ErrorCode.VAE_MODEL_INVALID


class ScalingFailed(RequestError):
    """The image cannot be scaled to a size that the VAE can encode."""

    code = ErrorCode.SCALING_FAILED


class EncodingFailed(RequestError):
    """The VAE gave no usable latent, or memory ran out."""

    code = ErrorCode.ENCODING_FAILED
    retryable = True


class UnexpectedError(EncodingFailed):
    """A fault of ours: something was raised that no code expects. `__cause__` is what was raised."""


class OutputDirNotWritable(RequestError):
    """The output folder cannot be made, or a file in it cannot be written."""

    code = ErrorCode.OUTPUT_DIR_NOT_WRITABLE
    retryable = True


class MessageUnusable(RequestError):
    """A Kafka record, or a line of a list, holds no request at all: too large, not UTF-8, not JSON or not an object."""

    code = ErrorCode.MESSAGE_UNUSABLE


class ResponseRefused(RequestError):
    """The response topic takes no record of the response's size; the request goes to the dead-letter queue instead."""

    code = ErrorCode.RESPONSE_REFUSED


class KafkaFailed(LatentEncoderError):
    """Kafka mode cannot go on: authentication or authorisation refused, producer fenced, dead letter refused."""


def as_request_error(exc: BaseException) -> RequestError:
    """`exc` itself where it is a `RequestError`, else one that it caused: memory ran out, or an `UnexpectedError`."""
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

    torch reports a GPU's as OutOfMemoryError, as AcceleratorError with the error code 2, or as a plain RuntimeError.
    """
    if not isinstance(exc, RuntimeError):
        return isinstance(exc, MemoryError)
    kind = type(exc).__name__  # torch is not imported here
    out_of_memory_code = kind == "AcceleratorError" and getattr(exc, "error_code", None) == GPU_OUT_OF_MEMORY
    return kind == "OutOfMemoryError" or out_of_memory_code or _OUT_OF_MEMORY_TEXT.search(str(exc)) is not None


def one_line(exc: BaseException, limit: int = 300) -> str:
    """The text of a foreign exception on one line of at most `limit` characters, or its class name where it has none."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def translated(error: type[RequestError], what: str) -> Iterator[None]:
    """Turn whatever foreign code raises inside into `error`, with `what` went wrong in front of its text.

    Raises:
        RequestError: the given class; `EncodingFailed` where memory ran out, whatever the step.
    """
    try:
        yield
    except RequestError:
        raise
    except Exception as exc:
        if is_out_of_memory(exc):
            raise EncodingFailed(f"{what}: {OUT_OF_MEMORY}") from exc
        raise error(f"{what}: {one_line(exc)}") from exc
