"""Import rules of the product: layers that import downwards only, and names that only some modules may import.

An import counts wherever it stands: in a function, under `TYPE_CHECKING`, or as `import_module("a.name")`. An import by a name
that is computed at run time does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import COMFYUI, FEWEST_FILES, OUR_FILES, PROJECT

PACKAGE = "latent_encoder"

LAYERS = """
main
command
modes
contact_sheet
cli : standalone : kafka_handler : doctor : inspection : comparison : start_event
stages : kafka : installer
service
outputs
vae
images
trial : admission
comfy_runtime
installer.comfy_packages : comfy_node : comfy_input
installer.import_trial
comfy_import
images.features
images.colours
images.input_folder : images.jpeg_markers : images.png_metadata : images.pillow
images.png_chunks
model_files
access
storage
setting_names
telemetry
torch_threads
cpus
config
secret_files : env_file
requests
models
utils
importing
errors : terminal : drawing
geometry : suggestions : exits : lazy_imports : isolation : releases : torch_caches : latent_encoder
columns : process_memory : masking : small_files : interpreter : container : user_paths : shared_context
storage.locations
"""
"""Layers from the top to the bottom; `:` separates neighbours, which do not import each other.

A package has one layer with all that is in it. The exceptions are modules of `images` and `installer`: `comfy_runtime` stands
between the ones that it uses and the ones that use it. Requests and settings are parsed by `storage.locations`.
"""

NEVER_REACHED = {"kafka": {"torch", "service"}}
"""Modules that a part never imports, not even through another module."""

BESIDE_THE_PRODUCT = {"tests", "fuzz", "benchmarks", "scripts", "clients", "latent_encoder_client"}

MAY_IMPORT_COMFYUI = {"utils", "comfy_import", "comfy_runtime"}


class Import(NamedTuple):
    """One import, and the place where it stands."""

    file: Path
    line: int
    importer: str
    imported: str

    def wrong(self, reason: str) -> Wrong:
        """Return this import as one that breaks a rule."""
        return Wrong(
            self.importer, self.imported, f"{self.file}:{self.line}: {self.importer} imports {self.imported}: {reason}"
        )


class Wrong(NamedTuple):
    """An import that breaks a rule, and the message for the reader."""

    importer: str
    imported: str
    message: str


@cache
def layers() -> dict[str, int]:
    """Return the number of each part's layer, counted from the top."""
    lines = LAYERS.strip().splitlines()
    return {part: number for number, line in enumerate(lines) for part in line.split(" : ")}


def module_of(file: Path) -> str:
    """Return the dotted name of a module, of a package for its `__init__.py`."""
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str | None:
    """Return the part of LAYERS that a module belongs to, the most specific one; None if no line names it."""
    names = module.removeprefix(f"{PACKAGE}.").split(".")
    prefixes = [".".join(names[:length]) for length in range(len(names), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in layers()), None)


def names_in(node: ast.AST, package: str) -> list[str]:
    """Return the dotted names that a node of a module's tree imports; of `from a import b`, `a.b`."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            origin = resolve_name("." * level + (module or ""), package) if level else module or ""
            return [f"{origin}.{alias.name}" for alias in names]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def imports_of(root: Path, files: list[Path]) -> list[Import]:
    """Return every import of the files; an imported name that is no module of theirs is cut to the module it comes from."""
    modules = {module_of(file.relative_to(root)) for file in files}
    return [found for file in files for found in imports_in(file.relative_to(root), file.read_text("utf-8"), modules)]


def imports_in(file: Path, text: str, modules: set[str]) -> Iterator[Import]:
    """Yield the imports of one file."""
    importer = module_of(file)
    package = importer if file.name == "__init__.py" else importer.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        for name in names_in(node, package):
            imported = name
            while imported not in modules and "." in imported and imported.rpartition(".")[0].split(".")[0] in tops(modules):
                imported = imported.rpartition(".")[0]
            yield Import(file, node.lineno, importer, imported)  # type: ignore[attr-defined]


def tops(modules: set[str]) -> set[str]:
    """Return the top-level names of modules."""
    return {module.split(".")[0] for module in modules}


@cache
def comfyui_names() -> set[str]:
    """Return the top-level modules of ComfyUI's tree, except for those whose names the product has, too."""
    found = {
        path.relative_to(COMFYUI).parts[0].removesuffix(".py") for path in [*COMFYUI.glob("*.py"), *COMFYUI.glob("*/*.py")]
    }
    assert {"comfy", "nodes", "folder_paths"} <= found, f"{COMFYUI} is not ComfyUI"
    return found - tops({module_of(file.relative_to(PROJECT)) for file in OUR_FILES})


def wrong_imports(root: Path, files: list[Path]) -> list[Wrong]:
    """Return every import of the files that breaks a rule."""
    found = imports_of(root, files)
    modules = {module_of(file.relative_to(root)) for file in files}
    return [wrong for each in found for wrong in (*wrong_layer(each, modules), *wrong_name(each))] + [*reached(found)]


def wrong_layer(found: Import, modules: set[str]) -> Iterator[Wrong]:
    """Yield an import that goes up, or to a neighbour."""
    importer, imported = part_of(found.importer), part_of(found.imported)
    if found.imported not in modules or importer is None or imported is None or importer == imported:
        return
    if layers()[imported] < layers()[importer]:
        yield found.wrong("it is in a higher layer")
    elif layers()[imported] == layers()[importer]:
        yield found.wrong("neighbours do not import each other")


def wrong_name(found: Import) -> Iterator[Wrong]:
    """Yield an import of ComfyUI or of the code beside the product."""
    top = found.imported.split(".")[0]
    if top in BESIDE_THE_PRODUCT:
        yield found.wrong("the product imports nothing from there")
    if top in comfyui_names() and part_of(found.importer) not in MAY_IMPORT_COMFYUI:
        yield found.wrong(f"only {', '.join(sorted(MAY_IMPORT_COMFYUI))} import ComfyUI")


def reached(found: list[Import]) -> Iterator[Wrong]:
    """Yield the imports that bring a part, through any number of modules, to one that it never imports."""
    for part, forbidden in NEVER_REACHED.items():
        inside = {each.importer for each in found if part_of(each.importer) == part}
        while more := {each.imported for each in found if each.importer in inside} - inside:
            inside |= more
        for each in found:
            if each.importer in inside and each.imported.split(".")[0] in forbidden:
                yield each.wrong(f"{part} never imports it, not even through another module")


def test_imports_go_downwards() -> None:
    """No import of the product breaks a rule."""
    assert len(OUR_FILES) > FEWEST_FILES
    wrong = [each.message for each in wrong_imports(PROJECT, OUR_FILES)]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_layer() -> None:
    """A line of LAYERS names every module of the product, itself or by its package."""
    assert [module for file in OUR_FILES if part_of(module := module_of(file.relative_to(PROJECT))) is None] == []


def test_every_part_of_the_layers_exists() -> None:
    """Each part in LAYERS has a module of the product."""
    parts = {part_of(module_of(file.relative_to(PROJECT))) for file in OUR_FILES}
    assert layers().keys() - parts == set()


def test_no_part_has_two_layers() -> None:
    """Each part stands in LAYERS once."""
    assert len(layers()) == len(LAYERS.replace(":", " ").split())


def test_unlisted_module_has_no_layer() -> None:
    """A new module directly in the package, or at the top level, belongs to no line of LAYERS until it is listed."""
    assert [part_of(module) for module in ("latent_encoder.unlisted", "unlisted")] == [None, None]
    assert part_of("latent_encoder.vae.unlisted") == "vae"


SOUND_TREE = {
    **dict.fromkeys(("main.py", "service.py", "errors.py", "latent_encoder/__init__.py", "latent_encoder/stages.py"), ""),
    **dict.fromkeys(("latent_encoder/vae/__init__.py", "latent_encoder/kafka/__init__.py"), ""),
    "config.py": "import errors",
    "latent_encoder/access.py": "from config import Settings",
    "latent_encoder/vae/cache.py": "import torch\nfrom latent_encoder.access import absolute",
    "latent_encoder/kafka/lanes.py": "import config",
}


@pytest.mark.parametrize(
    ("file", "text", "line", "imported"),
    [
        ("errors.py", "import config", 1, "config"),
        ("errors.py", "from latent_encoder import access", 1, "latent_encoder.access"),
        ("errors.py", "def late():\n    from config import Settings", 2, "config"),
        ("errors.py", "if TYPE_CHECKING:\n    from config import Settings", 2, "config"),
        ("errors.py", "import importlib\nimportlib.import_module('config')", 2, "config"),
        ("latent_encoder/access.py", "from .vae.cache import VaeCache", 1, "latent_encoder.vae.cache"),
        ("latent_encoder/access.py", "from .vae import cache", 1, "latent_encoder.vae.cache"),
        ("latent_encoder/kafka/lanes.py", "from latent_encoder.stages import Stages", 1, "latent_encoder.stages"),
        ("latent_encoder/kafka/lanes.py", "from service import LatentEncoder", 1, "service"),
        ("latent_encoder/kafka/lanes.py", "from torch import Tensor", 1, "torch.Tensor"),
        ("config.py", "import errors\nimport torch", 2, "torch"),  # kafka reaches it
        ("latent_encoder/vae/cache.py", "from comfy.sd import VAE", 1, "comfy.sd.VAE"),
        ("latent_encoder/vae/cache.py", "import importlib\nimportlib.import_module('nodes')", 2, "nodes"),
        ("main.py", "from tests.helpers import PROJECT", 1, "tests.helpers.PROJECT"),
        ("main.py", "import scripts.sbom", 1, "scripts.sbom"),
    ],
)
def test_wrong_import_is_reported(tmp_path: Path, file: str, text: str, line: int, imported: str) -> None:
    """One wrong import in a small tree without others is reported, with its file and line."""
    for name, content in SOUND_TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    files = sorted(tmp_path.rglob("*.py"))
    assert wrong_imports(tmp_path, files) == []
    (tmp_path / file).write_text(text)
    messages = {wrong.message.rpartition(": ")[0] for wrong in wrong_imports(tmp_path, files)}
    assert messages == {f"{file}:{line}: {module_of(Path(file))} imports {imported}"}
