"""The families of VAEs: how each is recognised, the name of its latents, and the ComfyUI releases that encode with it.

A new family is one more row in `FAMILIES`. The scaling and the colours of a family's latents are not here: ComfyUI has them,
in the class of `comfy.latent_formats` that the row names as its `latent_space`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from latent_encoder.releases import is_older
from latent_encoder.vae.diffusers_names import has_wan_names, native_names
from latent_encoder.vae.recognition import (
    LTX_BLOCK,
    Predicate,
    Shapes,
    cogvideox,
    flux2,
    has,
    has_any,
    kl,
    ltxv,
    pixel_space,
    taehv,
    taesd,
    takes,
    wan,
    x4_upscaler,
)


@dataclass(frozen=True)
class Family:
    """VAEs with the same tensors whose latents mean the same to a diffusion model."""

    name: str
    """Its name for people, in messages and in `docs/vae-families.md`."""
    latent_space: str | None
    """The name of ComfyUI's class in `comfy.latent_formats`; None if ComfyUI has none."""
    recognises: Predicate = field(repr=False, compare=False)
    """The predicate that recognises a file of this family."""
    since: str | None = None
    """The oldest tested ComfyUI release that encodes with it; None for a VAE that encodes no images."""
    single_frame: bool = False
    """True if the single-frame encoder encodes it."""
    by_name: str | None = None
    """The part of the file's name that distinguishes it from a family with the same tensors; None if the tensors decide."""
    no_images: str | None = None
    """A noun phrase for its real purpose, such as `a VAE for audio`; None for a VAE that encodes images."""

    def fault(self, release: str) -> str | None:
        """Return the reason why that ComfyUI release cannot encode an image with it; None if no reason is known."""
        if self.no_images is not None:
            return f"it is {self.no_images} ({self.name}), which encodes no images"
        if self.since is not None and is_older(release, self.since):
            return f"it is {self.name}, which needs a newer ComfyUI than {release}; {self.since} is tested with it"
        return None


AUDIO = "a VAE for audio"
OBJECTS = "a VAE for 3-D objects"
DECODER = "a decoder without its encoder"


# The first row that recognises a file wins. So of rows with the same tensors, the one without a word in the name comes last.
FAMILIES = (
    Family("Wan 2.1 / Qwen-Image", "Wan21", wan(16, 3), "0.3.52", single_frame=True),
    Family("Wan 2.1 with alpha / Qwen-Image-Layered", "Wan21", wan(16, 4), "0.33.0", single_frame=True),
    Family("Wan 2.2", "Wan22", wan(48, 12), "0.3.52", single_frame=True),
    Family("FLUX.2", "Flux2", flux2(lambda channels: channels == 512), "0.3.75"),
    Family("FLUX.2 with a small decoder", "Flux2", flux2(lambda channels: channels != 512), "0.33.0"),
    Family("Mage", "Flux2", has("student.dconv_encoder.proj_out.weight"), "0.33.0"),
    Family("Stable Video Diffusion", "SD15", has("decoder.mid.block_1.mix_factor"), "0.3.52"),
    Family("SD x4 upscaler", "SD_X4", x4_upscaler, "0.3.52"),
    Family("SDXL (by the file's name)", "SDXL", kl(4, "xl"), "0.3.52", by_name="xl"),
    Family("SD 1.x / 2.x (SDXL has 'xl' in the file's name)", "SD15", kl(4), "0.3.52"),
    Family("SD3 (by the file's name)", "SD3", kl(16, "sd3"), "0.3.52", by_name="sd3"),
    Family("FLUX.1 (SD3 has 'sd3' in the file's name)", "Flux", kl(16), "0.3.52"),
    Family("HunyuanImage 2.1", "HunyuanImage21", takes("decoder.conv_in.weight", 4, 64), "0.3.64"),
    Family("HunyuanImage 2.1's refiner", "HunyuanImage21Refiner", takes("decoder.conv_in.conv.weight", 5, 32), "0.3.75"),
    Family("LTX-Video", "LTXV", ltxv, "0.3.52"),
    Family("LTX-2", "LTXAV", has(LTX_BLOCK), "0.33.0"),
    Family("LTX 2.4 / 2.5", "LTXAV", has("decoder.conv_in_x_t.weight"), "0.33.0"),
    Family(
        "CogVideoX 5B / 1.5 (by the file's name)",
        "CogVideoX1_5",
        cogvideox(("5b", "1_5", "1.5")),
        "0.33.0",
        by_name="5b, 1.5 or 1_5",
    ),
    Family("CogVideoX 2B (5B and 1.5 have that in the file's name)", "CogVideoX", cogvideox(), "0.33.0"),
    Family("HunyuanVideo", "HunyuanVideo", takes("decoder.conv_in.conv.weight", 5, 16), "0.3.52"),
    Family("HunyuanVideo 1.5", "HunyuanVideo15", takes("decoder.conv_in.weight", 5, 32), "0.3.64"),
    Family("Cosmos 1", "Cosmos1CV8x8x8", has("decoder.unpatcher3d.wavelets"), "0.3.52"),
    Family(
        "Mochi",
        "Mochi",
        has_any(
            "decoder.blocks.2.blocks.3.stack.5.weight",
            "encoder.layers.4.layers.1.attn_block.attn.qkv.weight",
            "layers.4.layers.1.attn_block.attn.qkv.weight",
        ),
        "0.3.52",
    ),
    Family("SeedVR2", "SeedVR2", has("decoder.up_blocks.2.upsamplers.0.upscale_conv.weight"), "0.33.0"),
    Family(
        "MiniMax H3",
        "MiniMaxH3Video",
        has("decoder.transformer_blocks.0.scale1", "encoder.down.5.block.0.conv1.weight"),
        "0.33.0",
    ),
    Family("Stable Cascade, stage A", "SC_B", has("vquantizer.codebook.weight"), "0.3.52"),
    Family(
        "Stable Cascade, stage C",
        "SC_Prior",
        has_any("encoder.backbone.1.0.block.0.1.num_batches_tracked", "backbone.1.0.block.0.1.num_batches_tracked"),
        "0.3.52",
    ),
    Family("TAESD for SDXL", "SDXL", taesd(4, "xl"), "0.3.52", by_name="xl"),
    Family("TAESD for SD 1.x / 2.x", "SD15", taesd(4), "0.3.52"),
    Family("TAESD for SD3", "SD3", taesd(16, "sd3"), "0.3.52", by_name="sd3"),
    Family("TAESD for FLUX.1", "Flux", taesd(16), "0.3.52"),
    Family("TAESD for FLUX.2", "Flux2", taesd(32), "0.33.0"),
    Family("TAEHV for HunyuanVideo", "HunyuanVideo", taehv(16, "taehv"), "0.3.75", by_name="taehv"),
    Family("TAEHV for Wan 2.1", "Wan21", taehv(16, "taew2_1"), "0.3.75", by_name="taew2_1"),
    Family("TAEHV for Wan 2.2", "Wan22", taehv(48), "0.33.0"),
    Family("TAEHV for HunyuanVideo 1.5", "HunyuanVideo15", taehv(32), "0.33.0"),
    Family("TAEHV for LTX-2", "LTXAV", taehv(128), "0.33.0"),
    Family("TAEHV for MiniMax H3", "MiniMaxH3Video", taehv(24), "0.33.0"),
    Family("TAEHV of 16 channels (the file's name names no model)", None, taehv(16), "0.3.75"),
    Family("pixel space", "ChromaRadiance", pixel_space, "0.3.64"),
    Family("ACE-Step", None, has("vocoder.backbone.channel_layers.0.0.bias"), no_images=AUDIO),
    Family("Stable Audio / ACE-Step 1.5", None, has("decoder.layers.1.layers.0.beta"), no_images=AUDIO),
    Family("Stable Audio 3", None, has("decoder.layers.3.transformers.0.pre_norm.alpha"), no_images=AUDIO),
    Family("MMAudio", None, has("vocoder.activation_post.downsample.lowpass.filter"), no_images=AUDIO),
    Family(
        "LTX-2 audio",
        None,
        has_any("vocoder.resblocks.0.convs1.0.weight", "vocoder.vocoder.resblocks.0.convs1.0.weight"),
        no_images=AUDIO,
    ),
    Family("MiniMax Music 3", None, has("dec_in_proj.weight", "decoder.model.0.weight_g"), no_images=AUDIO),
    Family("MiniMax H3 audio", None, has("pre_block.attn.zero_k_bias"), no_images=AUDIO),
    Family("Hunyuan3D 2", None, has("geo_decoder.cross_attn_decoder.ln_1.bias"), no_images=OBJECTS),
    Family("Trellis 2 shape", None, has("shape_dec.blocks.1.16.to_subdiv.weight"), no_images=OBJECTS),
    Family("Trellis 2 texture", None, has("txt_dec.blocks.3.4.conv2.weight"), no_images=OBJECTS),
    Family("TripoSplat", None, has("gs.base_offset_scale", "octree.out_proj.weight"), no_images=OBJECTS),
    Family("Stable Cascade's previewer", None, has("blocks.11.num_batches_tracked"), no_images=DECODER),
    Family("Mochi's decoder", None, has("blocks.2.blocks.3.stack.5.weight"), no_images=DECODER),
)


def family_of(shapes: Shapes, file_name: str) -> Family | None:
    """Return the family of the VAE whose tensors have these shapes; None if it is unknown.

    `file_name` may be a path or a VAE's name. It decides between families with the same tensors: SD 1.x and SDXL, SD3 and
    FLUX.1.
    """
    if has_wan_names(shapes):
        names = native_names(shapes)
        shapes = {names[tensor]: shape for tensor, shape in shapes.items()}
    name = Path(file_name).name.lower()
    return next((family for family in FAMILIES if family.recognises(shapes, name)), None)
