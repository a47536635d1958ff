"""Every VAE that ComfyUI knows, as the names and shapes of its tensors: built by ComfyUI itself, without memory for weights.

    python tests/vae_zoo.py COMFYUI_DIR [SHAPES.json]

A case has the few tensors by which ComfyUI chooses a class. The process gives ComfyUI only these, takes the tensors that the
class then has, and gives ComfyUI a state with all of them, as a file would contain it. It prints a JSON object with an entry
for each case: the class, its channels, the tensors of the file, and the tensors of the second state that ComfyUI missed and
did not use; or the error. The states in SHAPES.json, `{name: {tensor: shape}}`, are loaded too. The process runs no code of
ours.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Shape = Sequence[int]

WAN_21 = {"decoder.middle.0.residual.0.gamma": (384, 1, 1, 1), "decoder.head.0.gamma": (96, 1, 1, 1)}
LTX_BLOCK = "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight"
SD_LEVEL = {"encoder.down.2.downsample.conv.weight": (512, 512, 3, 3)}

# A small VAE in the form of LTX-2's header. Its decoder does not depend on the time step.
LTX_2 = {
    "dims": 3,
    "latent_channels": 128,
    "encoder_blocks": [["res_x", {"num_layers": 1}]],
    "decoder_blocks": [["res_x", {"num_layers": 1}], *[["compress_all", {"residual": True, "multiplier": 2}]] * 3],
    "norm_layer": "pixel_norm",
    "patch_size": 4,
    "latent_log_var": "uniform",
    "timestep_conditioning": False,
}
LTX_2_AUDIO = {
    "audio_vae": {
        "model": {
            "params": {
                "ddconfig": {
                    "double_z": True,
                    "z_channels": 8,
                    "resolution": 256,
                    "in_channels": 2,
                    "out_ch": 2,
                    "ch": 32,
                    "num_res_blocks": 1,
                    "attn_resolutions": [],
                    "norm_type": "pixel",
                }
            }
        }
    },
    "vocoder": {"upsample_initial_channel": 64},
}


@dataclass(frozen=True)
class Case:
    """A VAE of a family."""

    family: str
    """The name of its row in `FAMILIES`."""
    file: str
    """The name of a published file, or the name under which VAELoader offers it."""
    model: str
    """The name of ComfyUI's class."""
    channels: int
    """The number of latent channels that ComfyUI states for it."""
    since: str
    """The oldest tested release that encodes with it; the oldest that builds it if it is not for images."""
    marks: Mapping[str, Shape]
    """The tensors by which ComfyUI chooses the class."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The metadata in the file's header that the class is built from."""
    names: Sequence[tuple[str, str]] = (("", ""),)
    """Beginnings of the tensors' names, in the model and in the file. Tensors that begin otherwise are not in the file."""
    images: bool = True
    """True if it encodes images."""
    needs: str = "torch"
    """A package that ComfyUI needs for it."""
    older_untried: bool = False
    """True if older releases may build it although they do not encode images right with it."""
    on_cpu: bool = False
    """True if building it reads values, which tensors on the meta device do not have."""


CASES = (
    Case(
        "Wan 2.1 / Qwen-Image",
        "qwen_image_vae.safetensors",
        "WanVAE",
        16,
        "0.3.52",
        {**WAN_21, "encoder.conv1.weight": (96, 3, 3, 3, 3), "decoder.head.2.weight": (3, 96, 3, 3, 3)},
    ),
    Case(
        "Wan 2.1 with alpha / Qwen-Image-Layered",
        "qwen_image_layered_vae.safetensors",
        "WanVAE",
        16,
        "0.33.0",
        {**WAN_21, "encoder.conv1.weight": (96, 4, 3, 3, 3), "decoder.head.2.weight": (4, 96, 3, 3, 3)},
    ),
    Case(
        "Wan 2.2",
        "wan2.2_vae.safetensors",
        "WanVAE",
        48,
        "0.3.52",
        {
            "decoder.middle.0.residual.0.gamma": (1024, 1, 1, 1),
            "decoder.upsamples.0.upsamples.0.residual.2.weight": (1024, 1024, 3, 3, 3),
        },
    ),
    Case(
        "FLUX.2",
        "flux2-vae.safetensors",
        "AutoencoderKL",
        128,
        "0.3.75",
        {
            **SD_LEVEL,
            "decoder.conv_in.weight": (512, 32, 3, 3),
            "post_quant_conv.weight": (32, 32, 1, 1),
            "bn.running_mean": (128,),
        },
    ),
    Case(
        "FLUX.2 with a small decoder",
        "full_encoder_small_decoder.safetensors",
        "AutoencoderKL",
        128,
        "0.33.0",
        {
            **SD_LEVEL,
            "decoder.conv_in.weight": (384, 32, 3, 3),
            "post_quant_conv.weight": (32, 32, 1, 1),
            "bn.running_mean": (128,),
        },
    ),
    Case(
        "Mage",
        "mage_vae.safetensors",
        "MageVAE",
        128,
        "0.33.0",
        {"student.dconv_encoder.proj_out.weight": (256, 384, 1, 1)},
        names=(("dconv_encoder.", "student.dconv_encoder."), ("decoder_model.", "pipeline.")),
    ),
    Case(
        "Stable Video Diffusion",
        "svd_xt_vae.safetensors",
        "AutoencodingEngine",
        4,
        "0.3.52",
        {"decoder.mid.block_1.mix_factor": (1,)},
        on_cpu=True,
    ),
    Case(
        "SD x4 upscaler",
        "x4-upscaler-vae.safetensors",
        "AutoencoderKL",
        4,
        "0.3.52",
        {"decoder.conv_in.weight": (512, 4, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
    ),
    *(
        Case(
            family,
            file,
            "AutoencoderKL",
            4,
            "0.3.52",
            {**SD_LEVEL, "decoder.conv_in.weight": (512, 4, 3, 3), "post_quant_conv.weight": (4, 4, 1, 1)},
        )
        for family, file in (
            ("SDXL (by the file's name)", "sdxl_vae.safetensors"),
            ("SD 1.x / 2.x (SDXL has 'xl' in the file's name)", "vae-ft-mse-840000.safetensors"),
        )
    ),
    *(
        Case(
            family,
            file,
            "AutoencodingEngine",
            16,
            "0.3.52",
            {**SD_LEVEL, "decoder.conv_in.weight": (512, 16, 3, 3)},
        )
        for family, file in (
            ("SD3 (by the file's name)", "sd3_vae.safetensors"),
            ("FLUX.1 (SD3 has 'sd3' in the file's name)", "ae.safetensors"),
        )
    ),
    Case(
        "HunyuanImage 2.1",
        "hunyuan_image_2.1_vae_fp16.safetensors",
        "AutoencodingEngine",
        64,
        "0.3.64",
        {"decoder.conv_in.weight": (1024, 64, 3, 3)},
    ),
    Case(
        "HunyuanImage 2.1's refiner",
        "hunyuan_image_refiner_vae_fp16.safetensors",
        "AutoencodingEngine",
        32,
        "0.3.75",
        {"decoder.conv_in.conv.weight": (1024, 32, 3, 3, 3)},
        older_untried=True,
    ),
    Case("LTX-Video", "ltxv_0.9.0_vae.safetensors", "VideoVAE", 128, "0.3.52", {LTX_BLOCK: (512, 512, 3, 3, 3)}),
    Case("LTX-Video", "ltxv_0.9.1_vae.safetensors", "VideoVAE", 128, "0.3.52", {LTX_BLOCK: (1024, 1024, 3, 3, 3)}),
    Case(
        "LTX-Video",
        "ltxv_0.9.5_vae.safetensors",
        "VideoVAE",
        128,
        "0.3.52",
        {LTX_BLOCK: (1024, 1024, 3, 3, 3), "encoder.down_blocks.1.conv.conv.bias": (64,)},
    ),
    Case(
        "LTX-2",
        "LTX2_video_vae_bf16.safetensors",
        "VideoVAE",
        128,
        "0.33.0",
        {LTX_BLOCK: (1024, 1024, 3, 3, 3)},
        metadata={"config": json.dumps({"vae": LTX_2})},
        older_untried=True,
    ),
    Case(
        "LTX 2.4 / 2.5",
        "ltx_2.4_vae.safetensors",
        "CausalDiffusionVAE",
        128,
        "0.33.0",
        {"decoder.conv_in_x_t.weight": (256, 48), "decoder.conv_in.weight": (2048, 128)},
    ),
    *(
        Case(
            family,
            file,
            "AutoencoderKLCogVideoX",
            16,
            "0.33.0",
            {
                "decoder.conv_in.conv.weight": (512, 16, 3, 3, 3),
                "decoder.mid_block.resnets.0.norm1.norm_layer.weight": (512,),
                "encoder.conv_out.conv.weight": (32, 512, 3, 3, 3),
            },
        )
        for family, file in (
            ("CogVideoX 5B / 1.5 (by the file's name)", "cogvideox-5b_vae.safetensors"),
            ("CogVideoX 2B (5B and 1.5 have that in the file's name)", "cogvideox_vae.safetensors"),
        )
    ),
    Case(
        "HunyuanVideo",
        "hunyuan_video_vae_bf16.safetensors",
        "AutoencoderKL",
        16,
        "0.3.52",
        {"decoder.conv_in.conv.weight": (512, 16, 3, 3, 3), "post_quant_conv.weight": (16, 16, 1, 1, 1)},
    ),
    Case(
        "HunyuanVideo 1.5",
        "hunyuanvideo15_vae_fp16.safetensors",
        "AutoencodingEngine",
        32,
        "0.3.64",
        {"decoder.conv_in.weight": (1024, 32, 3, 3, 3)},
    ),
    Case(
        "Cosmos 1",
        "cosmos_cv8x8x8_1.0.safetensors",
        "CausalContinuousVideoTokenizer",
        16,
        "0.3.52",
        {"decoder.unpatcher3d.wavelets": (2,)},
        on_cpu=True,
    ),
    Case(
        "Mochi",
        "mochi_vae.safetensors",
        "VideoVAE",
        12,
        "0.3.52",
        {"decoder.blocks.2.blocks.3.stack.5.weight": (512, 512, 3, 3, 3)},
    ),
    Case(
        "Mochi",
        "mochi_encoder.safetensors",
        "VideoVAE",
        12,
        "0.3.52",
        {"layers.4.layers.1.attn_block.attn.qkv.weight": (384, 128)},
        names=(("encoder.", ""),),
    ),
    Case(
        "SeedVR2",
        "ema_vae_fp16.safetensors",
        "VideoAutoencoderKLWrapper",
        16,
        "0.33.0",
        {"decoder.up_blocks.2.upsamplers.0.upscale_conv.weight": (1024, 256, 1, 1, 1)},
    ),
    Case(
        "MiniMax H3",
        "minimax_h3_video_vae.safetensors",
        "MiniMaxH3VideoVAE",
        24,
        "0.33.0",
        {"decoder.transformer_blocks.0.scale1": (2048,), "encoder.down.5.block.0.conv1.weight": (1024, 512, 3, 3, 3)},
    ),
    Case(
        "Stable Cascade, stage A",
        "stage_a.safetensors",
        "StageA",
        4,
        "0.3.52",
        {"vquantizer.codebook.weight": (8192, 4)},
    ),
    Case(
        "Stable Cascade, stage C",
        "effnet_encoder.safetensors",
        "StageC_coder",
        16,
        "0.3.52",
        {"backbone.1.0.block.0.1.num_batches_tracked": ()},
        names=(("encoder.", ""),),
    ),
    Case(
        "Stable Cascade, stage C",
        "stage_c_vae.safetensors",
        "StageC_coder",
        16,
        "0.3.52",
        {"encoder.backbone.1.0.block.0.1.num_batches_tracked": ()},
    ),
    *(
        Case(family, file, "TAESD", channels, "0.3.52", {"taesd_decoder.1.weight": (64, channels, 3, 3)})
        for family, file, channels in (
            ("TAESD for SDXL", "taesdxl", 4),
            ("TAESD for SD 1.x / 2.x", "taesd", 4),
            ("TAESD for SD3", "taesd3", 16),
            ("TAESD for FLUX.1", "taef1", 16),
        )
    ),
    Case(
        "TAESD for FLUX.2",
        "taef2",
        "TAESD",
        128,
        "0.33.0",
        {"taesd_decoder.1.weight": (64, 32, 3, 3)},
        metadata={"tae_latent_channels": 128},
    ),
    *(
        Case(
            family,
            file,
            "TAEHV",
            channels,
            since,
            {"decoder.22.bias": (pixels,), "decoder.1.weight": (256, channels, 3, 3)},
            older_untried=channels in (32, 48),  # 0.3.75 builds them, and refuses to encode
        )
        for family, file, channels, pixels, since in (
            ("TAEHV for HunyuanVideo", "taehv.safetensors", 16, 3, "0.3.75"),
            ("TAEHV for Wan 2.1", "lighttaew2_1.safetensors", 16, 3, "0.3.75"),
            ("TAEHV of 16 channels (the file's name names no model)", "tiny.safetensors", 16, 3, "0.3.75"),
            ("TAEHV for Wan 2.2", "lighttaew2_2.safetensors", 48, 12, "0.33.0"),
            ("TAEHV for HunyuanVideo 1.5", "lighttaehy1_5.safetensors", 32, 12, "0.33.0"),
            ("TAEHV for LTX-2", "taeltx_2.safetensors", 128, 48, "0.33.0"),
            ("TAEHV for MiniMax H3", "taeh3.safetensors", 24, 12, "0.33.0"),
        )
    ),
    Case("pixel space", "pixel_space", "PixelspaceConversionVAE", 3, "0.3.64", {"pixel_space_vae": ()}, names=(("none", ""),)),
    Case(
        "ACE-Step",
        "ace_step_vae.safetensors",
        "MusicDCAE",
        8,
        "0.3.52",
        {"vocoder.backbone.channel_layers.0.0.bias": (128,)},
        images=False,
        needs="torchaudio",
        on_cpu=True,
    ),
    Case(
        "Stable Audio / ACE-Step 1.5",
        "oobleck_vae.safetensors",
        "AudioOobleckVAE",
        64,
        "0.3.52",
        {"decoder.layers.1.layers.0.beta": (2048,)},
        images=False,
    ),
    Case(
        "Stable Audio 3",
        "stable_audio_3_vae.safetensors",
        "SA3AudioVAE",
        256,
        "0.33.0",
        {"decoder.layers.3.transformers.0.pre_norm.alpha": (1,)},
        images=False,
    ),
    Case(
        "MMAudio",
        "mmaudio_vae_16k.safetensors",
        "AudioAutoencoder",
        20,
        "0.3.75",
        {"vocoder.activation_post.downsample.lowpass.filter": (1, 1, 12)},
        images=False,
    ),
    Case(
        "LTX-2 audio",
        "LTX2_audio_vae_bf16.safetensors",
        "AudioVAE",
        8,
        "0.33.0",
        {"vocoder.resblocks.0.convs1.0.weight": (32, 32, 3)},
        metadata={"config": json.dumps(LTX_2_AUDIO)},
        images=False,
        needs="torchaudio",
    ),
    Case(
        "MiniMax Music 3",
        "minimax_music3_dav.safetensors",
        "MiniMaxMusic3DAV",
        128,
        "0.33.0",
        {"dec_in_proj.weight": (1024, 64, 1), "decoder.model.0.weight_g": (1536, 1, 1)},
        images=False,
    ),
    Case(
        "MiniMax H3 audio",
        "minimax_h3_audio_vae.safetensors",
        "MiniMaxH3AudioVAE",
        32,
        "0.33.0",
        {"pre_block.attn.zero_k_bias": (2048,)},
        images=False,
    ),
    Case(
        "Hunyuan3D 2",
        "hunyuan3d-vae-v2.safetensors",
        "ShapeVAE",
        4,
        "0.3.64",
        {"geo_decoder.cross_attn_decoder.ln_1.bias": (1024,)},
        images=False,
        older_untried=True,
    ),
    Case(
        "Trellis 2 shape",
        "trellis2_shape_vae.safetensors",
        "ShapeVae",
        4,
        "0.33.0",
        {"shape_dec.blocks.1.16.to_subdiv.weight": (8, 512)},
        images=False,
    ),
    Case(
        "Trellis 2 texture",
        "trellis2_texture_vae.safetensors",
        "TextureVae",
        4,
        "0.33.0",
        {"txt_dec.blocks.3.4.conv2.weight": (64, 3, 3, 3, 64)},
        images=False,
    ),
    Case(
        "TripoSplat",
        "triposplat_vae.safetensors",
        "OctreeGaussianDecoder",
        16,
        "0.33.0",
        {"gs.base_offset_scale": (), "octree.out_proj.weight": (8, 1024)},
        images=False,
    ),
    Case(
        "Stable Cascade's previewer",
        "previewer.safetensors",
        "StageC_coder",
        16,
        "0.3.52",
        {"blocks.11.num_batches_tracked": ()},
        names=(("previewer.", ""),),
        images=False,
    ),
    Case(
        "Mochi's decoder",
        "mochi_decoder.safetensors",
        "VideoVAE",
        12,
        "0.3.52",
        {"blocks.2.blocks.3.stack.5.weight": (512, 512, 3, 3, 3)},
        names=(("decoder.", ""),),
        images=False,
    ),
)


class Missing(logging.Handler):
    """A log handler that keeps ComfyUI's lines about missing tensors and about those that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.left_over = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Missing VAE keys"):
            self.text = record.getMessage()
        if record.getMessage().startswith("Leftover VAE keys"):
            self.left_over = record.getMessage()


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    comfy_args = importlib.import_module("comfy.cli_args").args
    comfy_args.cpu = True
    logging.getLogger().setLevel(logging.DEBUG)  # the line about unused tensors is of this level
    comfy = importlib.import_module("comfy.sd")
    built = {case.file: attempt(comfy, case) for case in CASES}
    for path in sys.argv[2:]:
        with open(path) as file:  # noqa: PTH123  # a Path is needed nowhere else here
            shapes = json.load(file)
        built |= {name: loaded(comfy, state) for name, state in shapes.items()}
    sys.stdout.write(json.dumps(built))


def attempt(comfy: Any, case: Case) -> dict[str, Any]:
    """Build a case's class, then load a state with all of its tensors. Return the class, its tensors and the missing ones."""
    if importlib.util.find_spec(case.needs) is None:
        return {"needs": case.needs}
    result = loaded(comfy, case.marks, case)
    if "error" in result:
        return result
    shapes = {
        end + name.removeprefix(start): shape
        for name, shape in result["shapes"].items()
        for start, end in case.names
        if name.startswith(start)
    }
    result["shapes"] = {**case.marks, **shapes} if case.file != "pixel_space" else {}
    if case.images:
        whole = loaded(comfy, {**case.marks, **shapes}, case)
        result |= {line: whole.get(line, "all of them") for line in ("missing", "left_over")}
    return result


def loaded(comfy: Any, shapes: Mapping[str, Shape], case: Case | None = None) -> dict[str, Any]:
    """Return the VAE that ComfyUI builds for tensors of these shapes, or the error."""
    import torch

    device = "cpu" if case is not None and case.on_cpu else "meta"
    missing = Missing()
    logging.getLogger().addHandler(missing)
    try:
        with torch.device(device):
            state = {name: torch.empty(tuple(shape), dtype=torch.float32, device=device) for name, shape in shapes.items()}
            metadata = {"metadata": dict(case.metadata)} if case is not None and case.metadata else {}
            vae = comfy.VAE(sd=state, **metadata)
            model = vae.first_stage_model
            if model is None:
                return {"error": "ComfyUI recognises no VAE"}
            tensors = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except Exception as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    finally:
        logging.getLogger().removeHandler(missing)
    return {
        "model": type(model).__name__,
        "channels": vae.latent_channels,
        "output_channels": vae.output_channels,
        "shapes": tensors,
        "missing": missing.text,
        "left_over": missing.left_over,
    }


if __name__ == "__main__":
    main()
