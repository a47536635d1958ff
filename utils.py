"""The shared utilities that find a ComfyUI tree and import its nodes.

ComfyUI has a package of the same name. After `add_comfyui_directory_to_sys_path`, both can be imported.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from errors import SetupError, one_line
from latent_encoder.isolation import isolated
from latent_encoder.releases import TESTED


def get_value_at_index(output: Any, index: int) -> Any:
    """Return the `index`th value of a node's output: a tuple, a V3 `NodeOutput`, or a mapping with the values as `result`.

    Raises:
        IndexError: the output has fewer values.
    """
    return output["result"][index] if isinstance(output, Mapping) else output[index]


def find_path(comfyui_path: Path) -> Path:
    """Return the absolute path of the ComfyUI tree at `comfyui_path`.

    Raises:
        SetupError: there is no ComfyUI tree; the message has the commands that get one.
    """
    path = comfyui_path.expanduser().absolute()
    missing = [name for name in ("nodes.py", "folder_paths.py", "comfy") if not (path / name).exists()]
    if missing:
        raise SetupError(
            f"No ComfyUI in {path}: {', '.join(missing)} missing. "
            f"Run ./setup_comfyui.sh, or set COMFYUI_PATH to a ComfyUI checkout ({TESTED})."
        )
    return path


def add_comfyui_directory_to_sys_path(comfyui: Path) -> None:
    """Make ComfyUI's modules importable without hiding ours.

    The tree goes to the end of `sys.path`, so that `import main` still finds our `main.py`. `utils` stays ours, and becomes a
    package with ComfyUI's submodules, such as `utils.extra_config`.
    """
    if str(comfyui) not in sys.path:
        sys.path.append(str(comfyui))
    this_module = sys.modules[__name__]
    this_module.__path__ = [str(comfyui / "utils")]


def add_extra_model_paths(comfyui: Path) -> None:
    """Add the model folders in the tree's `extra_model_paths.yaml` by ComfyUI's own reader; a tree may have no such file.

    Raises:
        SetupError: ComfyUI cannot read the file.
    """
    config = comfyui / "extra_model_paths.yaml"
    if not config.is_file():
        return
    try:
        importlib.import_module("utils.extra_config").load_extra_path_config(str(config))
    except Exception as exc:
        raise SetupError(f"Cannot use the extra model paths in {config}: {one_line(exc)}") from exc


def import_custom_nodes_minimal(comfyui: Path, node_ids: Iterable[str], packages: Iterable[str] = ()) -> dict[str, type]:
    """Return ComfyUI's node classes by node id: the core nodes, others of `node_ids`, and all nodes of `packages`.

    A node that the core does not have is searched by its id in `comfy_extras/`, because releases keep it in different modules.
    `packages` are folders or modules in `custom_nodes/`. No server and no prompt queue is started.

    Raises:
        SetupError: a node or a package is not in the tree, or its module cannot be imported.
    """
    classes: dict[str, type] = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
    for node_id in node_ids:
        if node_id not in classes:
            classes[node_id] = _find_extra_node(comfyui, node_id)
    for package in packages:
        for node_id, node_class in _load_custom_nodes(comfyui, package).items():
            classes.setdefault(node_id, node_class)  # as in ComfyUI, a package cannot replace a core node
    return classes


def _find_extra_node(comfyui: Path, node_id: str) -> type:
    """Return the class of a node in `comfy_extras/`. Only modules whose text has the node's id are imported."""
    reason, failure = "no module in comfy_extras/ has it", None
    for file in sorted((comfyui / "comfy_extras").glob("*.py")):
        if f'"{node_id}"' not in file.read_text(encoding="utf-8"):
            continue
        try:
            classes = _node_classes(importlib.import_module(f"comfy_extras.{file.stem}"))
        except Exception as exc:
            reason, failure = f"{file.name} cannot be loaded: {one_line(exc)}", exc
            continue
        if node_id in classes:
            return classes[node_id]
    raise SetupError(f"The ComfyUI tree {comfyui} has no node {node_id}: {reason} ({TESTED}).") from failure


def _load_custom_nodes(comfyui: Path, package: str) -> dict[str, type]:
    """Return the node classes of a package in `custom_nodes/`, by node id."""
    path = custom_node_path(comfyui, package)
    try:
        with isolated(path, comfyui):
            return _node_classes(_import_node_package(package, path))
    except Exception as exc:
        raise SetupError(f"The custom node package {path} cannot be loaded: {one_line(exc)}") from exc


def custom_node_path(comfyui: Path, package: str) -> Path:
    """Return the folder or the module of a package in `custom_nodes/`.

    Raises:
        SetupError: there is none.
    """
    folder = comfyui / "custom_nodes"
    path = next((path for path in (folder / package, folder / f"{package}.py") if path.exists()), None)
    if path is None:
        raise SetupError(f"No custom node package {package!r} in {folder}; CUSTOM_NODES names it.")
    return path


def _import_node_package(package: str, path: Path) -> ModuleType:
    """Import a node package under a unique name: its folder's name may have dashes, or be that of another module."""
    init = path / "__init__.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location("custom_nodes_" + re.sub(r"\W", "_", package), init)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def _node_classes(module: Any) -> dict[str, type]:
    """Return the nodes of a module by node id: V1 from `NODE_CLASS_MAPPINGS`, V3 from the extension of `comfy_entrypoint`."""
    classes: dict[str, type] = dict(getattr(module, "NODE_CLASS_MAPPINGS", None) or {})
    if hasattr(module, "comfy_entrypoint"):
        for node in asyncio.run(_extension_nodes(module.comfy_entrypoint)):
            classes[node.GET_SCHEMA().node_id] = node
    return classes


async def _extension_nodes(entrypoint: Any) -> list[Any]:
    extension = entrypoint()
    if inspect.isawaitable(extension):
        extension = await extension
    nodes: list[Any] = await extension.get_node_list()
    return nodes
