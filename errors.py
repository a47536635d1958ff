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
from typing import ClassVar, NamedTuple

from latent_encoder.masking import masked

OUT_OF_MEMORY = "memory ran out; ask for fewer megapixels or give the service more memory"

GPU_OUT_OF_MEMORY = 2
"""The error code for memory that ran out in CUDA (`cudaErrorMemoryAllocation`) and HIP (`hipErrorOutOfMemory`)."""

GPU_LOST = {46, 100, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999}
"""The error codes of CUDA, and of HIP, that leave the process without a usable device: for example 700, an illegal address.

Source: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html ("the process must be terminated and
relaunched"); 46, 100 and 999 mean that no device is available any more.
"""

_GPU_LOST_TEXT = re.compile(
    "(CUDA|HIP) error: (an illegal memory access|device-side assert|unspecified launch failure|misaligned address"
    "|an illegal instruction|uncorrectable|no CUDA-capable device|the launch timed out|unknown error)"
)

_OUT_OF_MEMORY_TEXT = re.compile("DefaultCPUAllocator|(CUDA|HIP|XPU|MPS backend)( error:)? out of memory")

_NO_MEMORY_FOR_LIBRARY = re.compile("failed to map segment|[Cc]annot allocate memory")  # the C library's words
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

SURROGATES_OF_BYTES = 0xDC00
"""The surrogate for a byte that is not UTF-8 is this much above it, by PEP 383."""


class ErrorCode(StrEnum):
    """The `error_code` of an error response."""

    IMAGE_NOT_FOUND = "IMAGE_NOT_FOUND"
    IMAGE_UNREACHABLE = "IMAGE_UNREACHABLE"
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
    REQUEST_CRASHES_WORKER = "REQUEST_CRASHES_WORKER"


class LatentEncoderError(Exception):
    """The base of every error that this service raises on purpose. Its text is written for the user, in UTF-8."""

    def __init__(self, text: str) -> None:
        super().__init__(in_utf8(text))


class SetupError(LatentEncoderError):
    """The service cannot start: for example ComfyUI, one of its nodes or the device is missing."""


class LatentUnreadable(LatentEncoderError):
    """A file that should hold a latent does not. The text names the file and the reason."""


class StorageFault(NamedTuple):
    """A fault of object storage, or of the credentials for it."""

    name: str
    """For example `s3://bucket`."""
    certain: bool
    """No request can be the cause: for example the storage is out of reach, or throttles."""


class RequestError(LatentEncoderError):
    """One request cannot get a latent."""

    code: ClassVar[ErrorCode]
    retryable: ClassVar[bool] = False
    storage_fault: StorageFault | None = None
    """The fault of object storage that caused it."""


class InvalidRequest(RequestError):
    """A field of the request is missing, of the wrong type, out of range, or names another request's files.

    The text names the field.
    """

    code = ErrorCode.INVALID_REQUEST


class AccessDenied(RequestError):
    """A path of the request leads out of the folders that the settings allow. The text reveals nothing about that place."""

    code = ErrorCode.ACCESS_DENIED


class ImageNotFound(RequestError):
    """The input image file does not exist."""

    code = ErrorCode.IMAGE_NOT_FOUND


class ImageUnreachable(RequestError):
    """The server of the input image cannot be reached, is overloaded or fails."""

    code = ErrorCode.IMAGE_UNREACHABLE
    retryable = True


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


class DeviceLost(EncodingFailed):
    """The GPU failed in a way that only a new process can recover from. Every later request of this process fails too."""


class UnexpectedError(EncodingFailed):
    """A fault of ours: an exception that no code expects. It is the `__cause__`."""


class OutputDirNotWritable(RequestError):
    """The output folder cannot be created, or a file in it cannot be written."""

    code = ErrorCode.OUTPUT_DIR_NOT_WRITABLE
    retryable = True

    @property
    def errno(self) -> int | None:
        """The system's error number, for example `errno.ENOSPC` for a full disk; None if the system refused nothing."""
        return self.__cause__.errno if isinstance(self.__cause__, OSError) else None


class MessageUnusable(RequestError):
    """A Kafka record, or a line of a list, holds no request: it is too large, or no JSON object in UTF-8."""

    code = ErrorCode.MESSAGE_UNUSABLE


class ResponseRefused(RequestError):
    """The response is too large for its topic. The request becomes a dead letter instead."""

    code = ErrorCode.RESPONSE_REFUSED


class RequestCrashesWorker(RequestError):
    """The request was begun by several workers, and none of them lived to report a result. It becomes a dead letter too."""

    code = ErrorCode.REQUEST_CRASHES_WORKER


class KafkaFailed(LatentEncoderError):
    """Kafka mode cannot go on: access was refused, the producer was fenced, or a dead letter was refused."""


def as_request_error(exc: BaseException) -> RequestError:
    """Return `exc` if it is a `RequestError`, else a new one that it caused.

    That is out of memory, a lost device, or an `UnexpectedError`.
    """
    if isinstance(exc, RequestError):
        return exc
    error = _known("Request failed", exc) or UnexpectedError(
        f"Unexpected error, please report it with the service's log: {one_line(exc)}"
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


def is_device_lost(exc: BaseException) -> bool:
    """Return whether `exc` is an error of a GPU after which only a new process can use it."""
    if not isinstance(exc, RuntimeError) or is_out_of_memory(exc):
        return False
    code = getattr(exc, "error_code", None) if type(exc).__name__ == "AcceleratorError" else None
    return code in GPU_LOST or _GPU_LOST_TEXT.search(str(exc)) is not None


def outside_cause(exc: BaseException) -> str | None:
    """Return the reason of an exception whose cause is outside of our code, such as a full disk; None for every other one."""
    if is_out_of_memory(exc):
        return OUT_OF_MEMORY
    if isinstance(exc, RuntimeError) and "can't start new thread" in str(exc):
        return "no further thread can be started; raise the limit of processes (ulimit -u, or the container's pids limit)"
    if isinstance(exc, ImportError):
        if _NO_MEMORY_FOR_LIBRARY.search(str(exc)):
            return OUT_OF_MEMORY
        return f"a package cannot be imported ({one_line(exc)}); run ./setup_comfyui.sh, which installs what is missing"
    if isinstance(exc, OSError) or type(exc).__name__ == "KafkaException":  # the client is not imported here
        return one_line(exc)
    return None


def in_utf8(text: str) -> str:
    r"""Return the text with each lone surrogate, which UTF-8 lacks, written out.

    Python reads a byte of a file's name that is not UTF-8 as such a character: `\xff` stands for the byte 255.
    """
    return _LONE_SURROGATE.sub(lambda found: _written_out(ord(found[0])), text)


def _written_out(surrogate: int) -> str:
    byte = surrogate - SURROGATES_OF_BYTES
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{surrogate:04x}"


def one_line(exc: BaseException, limit: int = 300) -> str:
    """Return the text of a foreign exception, or its class name if it has none, on one line of at most `limit` characters.

    It holds no secret: a cut could leave the beginning of one, so secrets are masked before it.
    """
    try:
        text = in_utf8(" ".join(masked(str(exc)).split())) or type(exc).__name__
    except Exception:  # an exception whose text cannot be made
        text = type(exc).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def translated(error: type[RequestError], failed: str, *, quoting: bool = True) -> Iterator[None]:
    """Turn every exception of foreign code inside into `error`; its text begins with `failed`, for example `Encoding failed`.

    `failed` is all of the text if the foreign text is not to be quoted.

    Raises:
        RequestError: of the given class; `EncodingFailed` if memory ran out, `DeviceLost` if the GPU needs a new process.
    """
    try:
        yield
    except RequestError:
        raise
    except Exception as exc:
        raise _known(failed, exc) or error(f"{failed}: {one_line(exc)}" if quoting else failed) from exc


def _known(failed: str, exc: BaseException) -> EncodingFailed | None:
    """Return the error for memory that ran out or a device that is lost; its text begins with `failed`."""
    if is_out_of_memory(exc):
        return EncodingFailed(f"{failed}: {OUT_OF_MEMORY}")
    if is_device_lost(exc):
        return DeviceLost(f"{failed}: the device needs a new process, restart the service ({one_line(exc)})")
    return None
