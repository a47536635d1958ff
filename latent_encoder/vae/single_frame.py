"""A Wan-family VAE's encoder for one image: the latent that ComfyUI's own gives, in a fraction of its time and memory.

**One frame needs no third dimension.** The Wan VAEs encode video. Their convolutions over time are causal: output frame t sees
input frames t-2, t-1 and t, and what lies before the first frame counts as zero. An image is a first frame and nothing else,
so of a kernel `[out, in, 3, 3, 3]` the first two time slices only ever meet zeros, and

    conv3d(x, kernel)[:, :, 0] == conv2d(x[:, :, 0], kernel[:, :, -1])

The convolutions over time alone, in the down-sampling layers, do not run for a first frame at all, nor does the cache of
earlier frames. What is left is a 2-D network, and that is what this module runs.

**Rows come in strips.** Nearly all layers look at a pixel and its eight neighbours. So the picture flows through them as
through pipes: a layer takes some rows, keeps the last two for the next time, and hands on the rows that are complete. No row
is computed twice, nothing is approximated, and the memory that this takes does not grow with the picture. Only the
attention in the middle, at 1/64 of the pixels, needs all rows at once.

**Memory is walked through seldom.** Tensors are `[height, width, channels]`: the normalisation over channels reads consecutive
numbers, `conv2d` gets its channels-last layout without a copy, and a strip stays in the processor's cache. Normalisation,
x / |x| * sqrt(channels) * gamma (RMS norm, Zhang and Sennrich 2019), and SiLU are computed in place right where the
convolution reads, the two factors multiplied beforehand. The attention is torch's fused one, without a matrix of scores.
In float32 on a CPU, the convolutions with many channels take half the multiplications: see `vae/winograd.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latent_encoder.vae import winograd

Rows = tuple[Tensor, bool]
"""Some rows of a picture, `[height, width, channels]`, and whether they are its last."""

Stream = Iterator[Rows]

Activation = Callable[[Tensor, Tensor, Tensor], None]
"""What `norm_silu` does."""

# How many pixels a strip has: on a CPU 6 MB of 96 float32 channels; a GPU wants fewer and larger pieces of work.
STRIP_PIXELS = {"cpu": 16 * 1024}
STRIP_PIXELS_ELSEWHERE = 1024 * 1024

EPSILON = 1e-12  # the least length that is divided by, as in `torch.nn.functional.normalize`


class UnknownArchitecture(Exception):
    """The model is not one whose encoder can be taken over; the text names what is not known."""


class SingleFrameEncoder(nn.Module):
    """Encodes one image as the Wan 2.1 or Wan 2.2 VAE does that it was made from."""

    def __init__(self, model: nn.Module, *, compiled: bool = False) -> None:
        """Take the weights from a ComfyUI `WanVAE`, in their dtype and on their device.

        With `compiled`, normalisation and SiLU become one kernel, made by `torch.compile` when they first run.

        Raises:
            UnknownArchitecture: it is none, or has a part that is not known.
        """
        super().__init__()
        activate = torch.compile(norm_silu, dynamic=True) if compiled else norm_silu
        try:
            self.patch = _patch_side(model)
            self.layers = nn.ModuleList(_layers(model, activate))
        except (AttributeError, ValueError) as exc:
            raise UnknownArchitecture(f"{type(model).__name__} is not built like a Wan VAE: {exc}") from exc
        self.requires_grad_(False)

    def forward(self, pixels: Tensor, **_: Any) -> Tensor:
        """Return the mean of the latent's distribution, `[1, channels, 1, height / 8, width / 8]` (Wan 2.2: / 16).

        `pixels` are `[1, colours, 1, height, width]` in [-1, 1], in the weights' dtype, and are moved to the weights' device.
        Further options, which ComfyUI gives to the `encode` of some models, change nothing here.
        """
        stream = _strips(pixels[0, :, 0].to(self.device), self.patch)
        for layer in self.layers:
            stream = layer(stream)
        return _joined(stream).permute(2, 0, 1)[None, :, None]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device


def _strip_pixels(device: torch.device) -> int:
    return STRIP_PIXELS.get(device.type, STRIP_PIXELS_ELSEWHERE)


def _strips(pixels: Tensor, patch: int) -> Stream:
    """The rows of a picture `[colours, height, width]`; for Wan 2.2, of `patch` x `patch` pixels, side by side as channels."""
    colours, height, width = pixels.shape
    rows = max(1, _strip_pixels(pixels.device) // width // patch) * patch
    for start in range(0, height, rows):
        strip = pixels[:, start : start + rows]
        # Of a patch's numbers, the channel comes first, then the column, then the row.
        patches = strip.view(colours, -1, patch, width // patch, patch).permute(1, 3, 0, 4, 2)
        yield patches.flatten(2), start + rows >= height


def _joined(stream: Stream) -> Tensor:
    return torch.cat([rows for rows, _ in stream])


class RowBuffer:
    """Rows of a picture that wait to be used, in one piece of memory that is used again and again.

    `left` and `right` columns of zeros stand beside them.
    """

    def __init__(self, first: Tensor, left: int = 0, right: int = 0) -> None:
        """An empty buffer for rows like `first`: of its width, channels, dtype and device."""
        self._like, self._left, self._right = first.new_empty(0, *first.shape[1:]), left, right
        self._memory = self._zeros(first.shape[0])
        self._count = 0

    @property
    def rows(self) -> Tensor:
        """What is there, `[height, left + width + right, channels]`."""
        return self._memory[: self._count]

    def add(self, height: int) -> Tensor:
        """So many further rows, `[height, width, channels]`, for the caller to write; what is in them is not defined."""
        start, self._count = self._count, self._count + height
        if self._count > self._memory.shape[0]:
            memory = self._zeros(self._count)
            memory[:start] = self._memory[:start]
            self._memory = memory
        return self._memory[start : self._count, self._left : self._left + self._like.shape[1]]

    def discard(self, height: int) -> None:
        """The first so many rows are not needed any more; without any row left, the memory is given back."""
        rest = self.rows[height:].clone()
        self._count -= height
        if self._count == 0:
            self._memory = rest
        self._memory[: self._count] = rest

    def _zeros(self, height: int) -> Tensor:
        _, width, channels = self._like.shape
        return self._like.new_zeros(height, self._left + width + self._right, channels)


def norm_silu(rows: Tensor, gamma: Tensor, out: Tensor) -> None:
    """SiLU of the RMS norm of `rows` over their channels, computed in float32 and written to `out`."""
    wide = rows.float()
    result = out if out.dtype == wide.dtype else torch.empty_like(wide)
    functional.silu(rms_norm(wide, gamma, result), inplace=True)
    if result is not out:
        out.copy_(result)


def rms_norm(rows: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """The RMS norm of float32 `rows` over their channels, written to `out`; `gamma` is a `scaled_gamma`."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(EPSILON)
    return torch.div(rows, length, out=out).mul_(gamma)


def scaled_gamma(norm: Any) -> Tensor:
    """A norm's `gamma` times the square root of the number of channels, in float32 whatever the model's dtype."""
    gamma: Tensor = norm.gamma.flatten().float()
    return gamma * math.sqrt(gamma.numel())


class Convolution(nn.Module):
    """RMS norm and SiLU, where there is a norm, and a 3 x 3 convolution.

    With stride 1 there are zeros around the picture, with stride 2 only below and to the right of it.
    """

    def __init__(self, convolution: Any, norm: Any = None, activate: Activation = norm_silu, stride: int = 1) -> None:
        super().__init__()
        kernel = convolution.weight if convolution.weight.ndim == 4 else convolution.weight[:, :, -1]
        self.stride = stride
        self.winograd = stride == 1 and winograd.is_worth_it(kernel)
        self.kernel = nn.Parameter(
            winograd.transformed_kernel(kernel) if self.winograd else kernel.contiguous(memory_format=torch.channels_last)
        )
        self.bias = nn.Parameter(convolution.bias)
        self.gamma = nn.Parameter(scaled_gamma(norm)) if norm is not None else None
        self.activate = activate

    def forward(self, stream: Stream) -> Stream:
        seen: RowBuffer | None = None
        for rows, last in stream:
            if seen is None:
                tiles = winograd.TILE if self.winograd else 1
                seen = RowBuffer(rows, left=self.stride % 2, right=1 + -rows.shape[1] % tiles)
                seen.add(self.stride % 2).zero_()
            self._take(rows, seen.add(rows.shape[0]))
            if last:
                seen.add(1).zero_()
            width = rows.shape[1] // self.stride
            del rows  # not to be kept in memory while the layers behind are at work
            if seen.rows.shape[0] >= 3:
                yield self._result(seen, last)[:, :width], last

    def _take(self, rows: Tensor, out: Tensor) -> None:
        if self.gamma is None:
            out.copy_(rows)
        else:
            self.activate(rows, self.gamma, out)

    def _result(self, seen: RowBuffer, last: bool) -> Tensor:
        window = seen.rows
        if self.winograd:
            result = winograd.convolve(window, self.kernel, self.bias)
        else:
            result = functional.conv2d(window.permute(2, 0, 1)[None], self.kernel, self.bias, self.stride)[0].permute(1, 2, 0)
        seen.discard(window.shape[0] if last else result.shape[0] * self.stride)
        return result


class Residual(nn.Module):
    """Some layers, and beside them a shortcut whose result is added to theirs; `shrink` is their stride."""

    def __init__(self, path: Iterable[nn.Module], shortcut: nn.Module, shrink: int = 1) -> None:
        super().__init__()
        self.path = nn.ModuleList(path)
        self.shortcut = shortcut
        self.shrink = shrink

    def forward(self, stream: Stream) -> Stream:
        waiting: list[RowBuffer] = []

        def remembered() -> Stream:
            for rows, last in stream:
                if not waiting:
                    waiting.append(RowBuffer(rows))
                waiting[0].add(rows.shape[0]).copy_(rows)
                yield rows, last

        results: Stream = remembered()
        for layer in self.path:
            results = layer(results)
        for result, last in results:
            taken = result.shape[0] * self.shrink
            result.add_(self.shortcut(waiting[0].rows[:taken]))
            waiting[0].discard(taken)
            yield result, last


class Pointwise(nn.Module):
    """A 1 x 1 convolution, of which only the first `outputs` results are wanted."""

    def __init__(self, convolution: Any, outputs: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight[:outputs].flatten(1))
        self.bias = nn.Parameter(convolution.bias[:outputs])

    def forward(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self.weight, self.bias)


class MeanOfPatches(nn.Module):
    """Wan 2.2's shortcut around a down-sampling, run as ComfyUI has it: it looks at each patch on its own."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, rows: Tensor) -> Tensor:
        mean: Tensor = self.shortcut(rows.permute(2, 0, 1)[None, :, None])
        return mean[0, :, 0].permute(1, 2, 0)


class Attention(nn.Module):
    """Attention of every pixel to every pixel, with one head, added to the pixels."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gamma = nn.Parameter(scaled_gamma(block.norm))
        self.to_qkv = Pointwise(block.to_qkv)
        self.proj = Pointwise(block.proj)

    def forward(self, stream: Stream) -> Stream:
        picture = _joined(stream)
        pixels = picture.flatten(0, 1).float()
        normed = rms_norm(pixels, self.gamma, torch.empty_like(pixels)).to(picture.dtype)
        q, k, v = self.to_qkv(normed)[None, None].chunk(3, dim=-1)
        del pixels, normed
        attended = functional.scaled_dot_product_attention(q, k, v)[0, 0]
        del q, k, v
        picture += self.proj(attended).view_as(picture)
        del attended
        yield from _regrouped(iter([(picture, True)]))


class Regroup(nn.Module):
    """The same rows in strips of another height: those that come out of the down-sampling have very few."""

    def forward(self, stream: Stream) -> Stream:
        return _regrouped(stream)


def _regrouped(stream: Stream) -> Stream:
    waiting: list[Tensor] = []
    for rows, last in stream:
        waiting.append(rows)
        height = sum(strip.shape[0] for strip in waiting)
        wanted = max(1, _strip_pixels(rows.device) // 4 // rows.shape[1])  # their pixels have four times the channels
        if last or height >= wanted:
            joined = torch.cat(waiting) if len(waiting) > 1 else rows
            waiting.clear()
            pieces = torch.split(joined, wanted)
            for number, piece in enumerate(pieces, 1):
                yield piece, last and number == len(pieces)


class Each(nn.Module):
    """A function of each pixel on its own."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, stream: Stream) -> Stream:
        for rows, last in stream:
            yield self.function(rows), last


def _patch_side(model: Any) -> int:
    """The side of the patches that a model takes: 1 pixel of RGB or RGBA (Wan 2.1), 2 pixels of RGB (Wan 2.2)."""
    channels = model.encoder.conv1.weight.shape[1]
    sides = {3: 1, 4: 1, 12: 2}
    if channels not in sides:
        raise UnknownArchitecture(f"{type(model).__name__} takes {channels} channels")
    return sides[channels]


def _layers(model: Any, activate: Activation) -> Iterator[nn.Module]:
    """The layers of a `WanVAE`'s encoder in their order."""
    encoder = model.encoder
    yield Convolution(encoder.conv1)
    shrinking = [number for number, layer in enumerate(encoder.downsamples) if _stride(layer) > 1]
    for number, layer in enumerate(encoder.downsamples):
        yield _layer(layer, activate)
        if number == shrinking[-1]:
            yield Regroup()
    for layer in encoder.middle:
        yield _layer(layer, activate)
    norm, _, convolution = encoder.head
    yield Convolution(convolution, norm, activate)
    yield Each(Pointwise(model.conv1, outputs=model.conv1.weight.shape[0] // 2))  # the other half is the variance


def _layer(layer: Any, activate: Activation) -> nn.Module:
    match type(layer).__name__:
        case "ResidualBlock":
            norm1, _, convolution1, norm2, _, _, convolution2 = layer.residual
            shortcut = layer.shortcut if isinstance(layer.shortcut, nn.Identity) else Pointwise(layer.shortcut)
            return Residual([Convolution(convolution1, norm1, activate), Convolution(convolution2, norm2, activate)], shortcut)
        case "AttentionBlock":
            return Attention(layer)
        case "Resample":
            _, convolution = layer.resample
            return Convolution(convolution, stride=2)
        case "Down_ResidualBlock":
            path = [_layer(inner, activate) for inner in layer.downsamples]
            return Residual(path, MeanOfPatches(layer.avg_shortcut), shrink=_stride(layer))
        case name:
            raise UnknownArchitecture(f"it has a {name}")


def _stride(layer: Any) -> int:
    match type(layer).__name__:
        case "Resample":
            return 2
        case "Down_ResidualBlock":
            return max(map(_stride, layer.downsamples))
        case _:
            return 1
