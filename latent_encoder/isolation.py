"""The separation of our modules from those of custom nodes, which use names such as `config` and `models` too.

Our code and each node package have a view of the import system: the modules under the names that both may use, and
`sys.path`. The view of a node package is the one that plain ComfyUI gives it: no module of ours, no project folder, and
ComfyUI's own `utils`. It is in force while the package is imported, and later for each import statement in its functions.
"""

# `importlib.import_module("config")` in a function of a node package is not an import statement: after the package is loaded,
# it finds our module.

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

OUR_NAMES = frozenset({"config", "errors", "kafka_handler", "main", "models", "service", "utils"})
"""The top-level names of our modules. Nobody else has a `latent_encoder`, so that name stays ours everywhere."""

_PROJECT = Path(__file__).absolute().parents[1]


@dataclass
class _View:
    """The import system as our code or a node package sees it; up to date only while another view is in force."""

    path: list[str] = field(default_factory=list)
    modules: dict[str, ModuleType] = field(default_factory=dict)
    """The modules of `OUR_NAMES`, and the modules below them."""


_OURS = _View()
_in_force = _OURS
_node_packages: dict[str, _View] = {}  # by the path that begins the `__file__` of each of a package's modules
_lock = threading.RLock()  # held by the thread for which another view than ours is in force
_plain_import = builtins.__import__


@contextmanager
def isolated(package: Path, comfyui: Path) -> Iterator[None]:
    """Import the node package at `package` inside this context, in the ComfyUI tree `comfyui`.

    Afterwards our modules and `sys.path` are as before, followed by the folders that the package added. If the import fails,
    these are dropped.
    """
    places = {str(package), str(package.resolve())}
    with _lock:
        before = sys.path[:]
        view = _node_packages.get(str(package)) or _new_view(comfyui)
        _node_packages.update(dict.fromkeys(places, view))
        builtins.__import__ = _import
        try:
            with _in_view(view):
                yield
        except BaseException:
            for place in places:
                del _node_packages[place]
            sys.path[:] = before
            raise


def _new_view(comfyui: Path) -> _View:
    """Return the view that plain ComfyUI gives its node packages: its own folder comes first."""
    others = [entry for entry in sys.path if entry != str(comfyui) and not _is_project(entry)]
    utils = _utils_of(comfyui)
    return _View([str(comfyui), *others], {} if utils is None else {"utils": utils})


@cache
def _utils_of(comfyui: Path) -> ModuleType | None:
    """Return ComfyUI's package `utils`, which all node packages share; None if the tree has none."""
    spec = PathFinder.find_spec("utils", [str(comfyui)])
    if spec is None:
        return None
    module = importlib.util.module_from_spec(spec)
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return module


def _is_project(entry: str) -> bool:
    return Path(entry or os.curdir).resolve() == _PROJECT.resolve()


@contextmanager
def _in_view(view: _View) -> Iterator[None]:
    """Put a view in force; entries of `sys.path` that are added inside come last afterwards."""
    if _in_force is view:  # also in a thread that a node package starts and waits for while it is imported
        yield
        return
    with _lock:
        outer = _in_force
        _show(view)
        known = sys.path[:]
        try:
            yield
        finally:
            added = [entry for entry in sys.path if entry not in known]
            _show(outer)
            sys.path += [entry for entry in added if entry not in sys.path]


def _show(view: _View) -> None:
    """Save the view in force, and put `view` in its place."""
    global _in_force  # noqa: PLW0603
    _in_force.path, _in_force.modules = sys.path[:], _take_modules()
    sys.path[:] = view.path
    sys.modules.update(view.modules)
    _in_force = view
    _share_submodules_of_utils()


def _take_modules() -> dict[str, ModuleType]:
    """Remove the modules under `OUR_NAMES` from `sys.modules`, and return them; ComfyUI's `utils.*` are shared and stay."""
    names = [name for name in list(sys.modules) if _top(name) in OUR_NAMES and not name.startswith("utils.")]
    return {name: sys.modules.pop(name) for name in names}


def _share_submodules_of_utils() -> None:
    """Make each `utils.*` that was imported in another view an attribute of the `utils` of this one."""
    for name, module in list(sys.modules.items()):
        if name.startswith("utils.") and "utils" in sys.modules:
            vars(sys.modules["utils"]).setdefault(name.removeprefix("utils."), module)


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,  # noqa: A002
    locals: Mapping[str, object] | None = None,  # noqa: A002
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Run an import statement, in the view of the module that has it. Replaces `builtins.__import__`."""
    view = None if level > 0 else _view_for(name, globals)
    if view is None:
        return _plain_import(name, globals, locals, fromlist, level)
    with _in_view(view):
        return _plain_import(name, globals, locals, fromlist, level)


def _view_for(name: str, importing: Mapping[str, object] | None) -> _View | None:
    """Return the view in which a module has to import a name; None if any gives the same."""
    shared = _top(name) not in OUR_NAMES
    file = (importing or {}).get("__file__")
    if not isinstance(file, str) or (shared and name in sys.modules):
        return None
    for place, view in _node_packages.items():
        if file == place or file.startswith(f"{place}{os.sep}"):
            return view
    return _OURS if not shared and _is_ours(file) else None


def _is_ours(file: str) -> bool:
    return Path(file).parent == _PROJECT or _PROJECT / "latent_encoder" in Path(file).parents


def _top(name: str) -> str:
    return name.partition(".")[0]
