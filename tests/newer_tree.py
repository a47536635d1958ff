"""A copy of the pinned ComfyUI that behaves like the releases of 2026, for machines that cannot download one.

Each change is code of the tests that is appended to a module of the copy, or a word that is replaced in it. The changes follow
the behaviour of release 0.33.0.
"""

from __future__ import annotations

from pathlib import Path

EXTRAS = "comfy_extras/nodes_post_processing.py"

# As in 0.28.0 and later.
INPUT_FOLDER_ENFORCED = """
_anywhere = get_annotated_filepath


def get_annotated_filepath(name, default_dir=None):
    path = os.path.realpath(_anywhere(name, default_dir))
    allowed = os.path.realpath(default_dir or get_input_directory())
    if os.path.commonpath((path, allowed)) != allowed:
        raise ValueError(f"Invalid file path: {name!r}")
    return path
"""

# As in 0.21.0 and later. Like ffmpeg, it turns mirrored orientations and does not mirror them.
DECODED_BY_PYAV = """
import av


class LoadImageByPyav(LoadImage):
    def load_image(self, image):
        with av.open(folder_paths.get_annotated_filepath(image)) as container:
            frames = [self.pixels(frame) for frame in container.decode(video=0)]
        samples = torch.stack(frames)
        mask = 1 - samples[..., 3] if samples.shape[-1] > 3 else torch.zeros(len(frames), 64, 64)
        return samples[..., :3], mask

    def pixels(self, frame):
        components = frame.format.components
        alpha = frame.format.name == "pal8" or any(component.is_alpha for component in components)
        deep = max(component.bits for component in components) > 8
        kind = ("rgba64le" if alpha else "rgb48le") if deep else ("rgba" if alpha else "rgb24")
        values = frame.to_ndarray(format=kind).astype("float32") / (65535 if deep else 255)
        return torch.from_numpy(np.rot90(values, round(frame.rotation / 90)).copy())


LoadImage = NODE_CLASS_MAPPINGS["LoadImage"] = LoadImageByPyav
"""

# As the LTXV VAE in 0.18.0 and later; here the change is made to the VAE that the tests have.
ENCODE_WITH_DEVICE = """
_encode = WanVAE.encode
WanVAE.encode_options = {"device": torch.device("cpu")}
WanVAE.encode = lambda self, x, device=None: _encode(self, x if device is None else x.to(device))
"""

# As SeedVR2, which crops nothing, and as taef2 and taeltx_2, which state half of their factor.
WITHOUT_CROP_AND_WRONG_FACTOR = """
_init = VAE.__init__


def _newer_init(self, *args, **options):
    _init(self, *args, **options)
    match type(self.first_stage_model).__name__:
        case "TAESD":
            self.downscale_ratio = 4
        case "AutoencoderKL":
            self.crop_input = False


VAE.__init__ = _newer_init
"""

# As MiniMax H3, which encodes large images in parts by itself.
MODEL_THAT_TILES = """
_whole = TAESD.encode


def _in_parts(self, x):
    if x.shape[-1] <= 64:
        return _whole(self, x)
    half = x.shape[-1] // 16 * 8
    return torch.cat([self.encode(x[..., :half]), self.encode(x[..., half:])], -1)


TAESD.encode = _in_parts
"""

APPENDED = {
    "folder_paths.py": INPUT_FOLDER_ENFORCED,
    "nodes.py": DECODED_BY_PYAV,
    "comfy/ldm/wan/vae.py": ENCODE_WITH_DEVICE,
    "comfy/sd.py": WITHOUT_CROP_AND_WRONG_FACTOR,
    "comfy/taesd/taesd.py": MODEL_THAT_TILES,
}


def make_newer(tree: Path) -> None:
    """Change a copy of the pinned release into a tree that behaves like those of 2026."""
    for name, code in APPENDED.items():
        with (tree / name).open("a", encoding="utf-8") as file:
            file.write(code)
    replace(tree / "comfy/sd.py", "stage_model.encode(pixels_in)", "stage_model.encode(pixels_in, **_options(self))")
    with (tree / "comfy/sd.py").open("a", encoding="utf-8") as file:
        file.write('\n\ndef _options(vae):\n    return getattr(vae.first_stage_model, "encode_options", {})\n')
    require_resolution_steps(tree)
    replace(tree / EXTRAS, "int(megapixels * 1024 * 1024)", "megapixels * 1024 * 1024")
    replace(tree / "comfyui_version.py", "0.3.75", "0.33.0+changed")


def require_resolution_steps(tree: Path, default: str = "default=1, ") -> None:
    """Give ImageScaleToTotalPixels the additional input that releases of 2026 have."""
    declared = 'io.Float.Input("megapixels", default=1.0, min=0.01, max=16.0, step=0.01),'
    replace(tree / EXTRAS, declared, f'{declared}\n                io.Int.Input("resolution_steps", {default}min=1, max=256),')
    signature = "def execute(cls, image, upscale_method, megapixels) -> io.NodeOutput:"
    replace(tree / EXTRAS, signature, signature.replace("megapixels)", "megapixels, resolution_steps)"))
    for side in ("3", "2"):
        stepless = f"round(samples.shape[{side}] * scale_by)"
        stepwise = f"round(samples.shape[{side}] * scale_by / resolution_steps) * resolution_steps"
        # Only the node that was just changed: others in this file have the same expression.
        text = (tree / EXTRAS).read_text(encoding="utf-8")
        before, after = text.split("megapixels, resolution_steps)", 1)
        assert stepless in after
        (tree / EXTRAS).write_text(
            f"{before}megapixels, resolution_steps){after.replace(stepless, stepwise, 1)}", encoding="utf-8"
        )


def replace(file: Path, old: str, new: str) -> None:
    """Replace a text in a file, which must have it."""
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new), encoding="utf-8")
