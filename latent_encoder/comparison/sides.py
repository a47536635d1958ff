"""One side of a comparison: a process that encodes one image several times, and reports its times, memory and latent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from config import Settings
from errors import EncodingFailed, RequestError, SetupError
from latent_encoder.exits import wait_heeding_signals
from latent_encoder.process_memory import peak_bytes
from latent_encoder.telemetry.logs import LogStyle, configure_logging
from models import EncodeRequest

MOST_ROUNDS = 5
ENOUGH_S = 10.0
"""Seconds of encodes after which no further round begins. One encode may take longer than that; it is the only one then."""


@dataclass(frozen=True)
class Side:
    """An encoder under test: its name, and the settings that choose it."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Facts:
    """Facts about a side's encode."""

    comfyui_version: str
    encoder: str
    encoder_reason: str
    vae_dtype: str
    device: str
    threads: int
    scaled_size: tuple[int, int]
    """Height and width of the image that was encoded, in pixels."""
    seconds: list[float]
    """The time of each encode, after one of a small image."""
    peak_bytes: int | None
    """The most memory that the process had; None if the system does not tell."""
    gpu_peak_bytes: int | None
    """The most memory that torch took on the GPU; None without a GPU."""
    tiled: bool

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Result:
    """The result of a side for one image: facts and the latent, float32 `[1, channels, height, width]`, or an error."""

    side: Side
    facts: Facts | None = None
    latent: NDArray[np.float32] | None = field(default=None, repr=False)
    error: str | None = None


def measured(side: Side, request: EncodeRequest, log_style: LogStyle) -> Result:
    """Encode the request's image in a process with the side's settings.

    Raises:
        RequestError: the image or the VAE cannot be used, or the encode fails.
        SetupError: ComfyUI cannot be loaded with these settings.
    """
    context = multiprocessing.get_context("spawn")  # a fork would begin with this process's memory
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, side, request, log_style), name=side.name, daemon=True)
    process.start()
    theirs.close()  # otherwise this process would keep the pipe open, and the other's death would not be noticed
    try:
        wait_heeding_signals(ours.poll)
        answer = ours.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise EncodingFailed(f"Its process ended: {_end(process.exitcode or 0)}.") from None
    process.join()
    if isinstance(answer, Exception):
        raise answer
    facts, latent = answer
    return Result(side, facts, latent)


def _end(code: int) -> str:
    if code == -signal.SIGKILL:
        return "it was killed, by the system for lack of memory as a rule; try fewer megapixels"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _work(connection: Connection, side: Side, request: EncodeRequest, log_style: LogStyle) -> None:
    """Run the process of a side: send its facts and its latent, or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is left to the parent, which ends this process
    configure_logging(*log_style)
    try:
        connection.send(_encoded(side.settings, request))
    except (RequestError, SetupError) as exc:
        connection.send(type(exc)(str(exc)))  # without its causes, which may be unfit for a pipe


def _encoded(settings: Settings, request: EncodeRequest) -> tuple[Facts, Any]:
    import torch

    from service import LatentEncoder

    encoder = LatentEncoder.set_up(settings)
    prepared = encoder.prepare(request)
    seconds: list[float] = []
    while not seconds or (len(seconds) < MOST_ROUNDS and sum(seconds) < ENOUGH_S):
        start = time.perf_counter()
        image = encoder.encode_prepared(prepared).image
        seconds.append(time.perf_counter() - start)
    on_gpu = prepared.vae.vae.device.type == "cuda"
    height, width = prepared.scaled.shape[1:3]
    facts = Facts(
        comfyui_version=encoder.runtime.version,
        encoder=image.encoder,
        encoder_reason=prepared.vae.encoder_reason,
        vae_dtype=prepared.vae.dtype,
        device=prepared.vae.device,
        threads=torch.get_num_threads(),
        scaled_size=(height, width),
        seconds=seconds,
        peak_bytes=_peak_bytes(),
        gpu_peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        tiled=image.tiled,
    )
    return facts, image.latent.numpy()


def _peak_bytes() -> int | None:
    """Return the most resident memory of this process since it began to run its program; None without `/proc`."""
    with suppress(OSError):
        return peak_bytes(os.getpid())
    return None
