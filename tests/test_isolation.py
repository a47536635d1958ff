"""Custom node packages whose modules have the names of ours, in one process with them."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from errors import SetupError
from latent_encoder import isolation
from latent_encoder.installer.placing import copy, place_runtime, symlink
from service import LatentEncoder
from tests.helpers import COMFYUI, IMAGES, PROJECT, VAE, RunMain, clean_environment
from utils import import_custom_nodes_minimal

pytestmark = pytest.mark.core

# A node package as many are: its folder is put first on `sys.path`, and its modules have the names of ours.
OWN_NAMES = {
    "__init__.py": (
        "import os, sys\n"
        "sys.path.insert(0, os.path.dirname(__file__))\n"
        "import errors, main, metrics, service, kafka_handler\n"
        "from config import NUMBER\n"
        "from models.baseline import Baseline\n"
        "\n"
        "class Node:\n"
        "    def seen(self):\n"
        "        return NUMBER, Baseline.number, [m.__file__ for m in (errors, main, metrics, service, kafka_handler)]\n"
        "    def seen_later(self):\n"
        "        import config, models.later\n"
        "        from models import baseline\n"
        "        import only_later\n"
        "        return config.NUMBER, models.later.NUMBER, baseline.Baseline is Baseline, only_later.__file__\n"
        "\n"
        "NODE_CLASS_MAPPINGS = {'Node of ' + __name__: Node}\n"
    ),
    "config.py": "NUMBER = 7\n",
    "models/__init__.py": "",
    "models/baseline.py": "from config import NUMBER\nclass Baseline:\n    number = NUMBER\n",
    "models/later.py": "from config import NUMBER\n",
    **{f"{name}.py": "" for name in ("errors", "main", "metrics", "service", "kafka_handler", "only_later")},
}

Load = Callable[..., Any]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a tree of links to the tests' ComfyUI, with a `custom_nodes` of its own."""
    tree = tmp_path / "tree"
    tree.mkdir()
    place_runtime(COMFYUI, tree, symlink)
    (tree / "custom_nodes").unlink(missing_ok=True)
    (tree / "custom_nodes").mkdir()
    return tree


@pytest.fixture
def load(tree: Path, encoder: LatentEncoder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Load a node package of these files into this process, which has ComfyUI; gives the package's module."""
    assert encoder.runtime.path == COMFYUI
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)

    def load(package: str, files: dict[str, str]) -> ModuleType:
        write(tree / "custom_nodes" / package, files)
        import_custom_nodes_minimal(tree, (), [package])
        return sys.modules[f"custom_nodes_{package}"]

    yield load
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tree)):
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def ours() -> dict[str, ModuleType]:
    return {name: importlib.import_module(name) for name in isolation.OUR_NAMES}


def test_every_module_in_the_project_folder_is_hidden() -> None:
    """`OUR_NAMES` has all modules of the project folder."""
    assert {file.stem for file in PROJECT.glob("*.py")} == isolation.OUR_NAMES


def test_node_package_gets_its_own_modules(load: Load, tree: Path) -> None:
    """A package whose modules have all of our names imports its own, and ours are in place afterwards."""
    before, path = ours(), sys.path[:]
    package = load("own", OWN_NAMES)
    folder = tree / "custom_nodes" / "own"
    names = ("errors", "main", "metrics", "service", "kafka_handler")
    assert package.Node().seen() == (7, 7, [str(folder / f"{name}.py") for name in names])
    assert ours() == before
    assert not any(name.startswith("models.") for name in sys.modules)
    assert sys.path[: len(path)] == path
    assert sys.path[len(path) :].count(str(folder)) == 1


def test_our_modules_are_found_after_a_node_package(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of ours that is imported first after the package, or once more, is ours."""
    load("own", OWN_NAMES)
    for name in ("config", "errors", "latent_encoder.suggestions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        assert Path(str(module.__file__)).is_relative_to(PROJECT)
        assert not Path(str(module.__file__)).is_relative_to(PROJECT / "comfyui")


def test_import_in_a_function_of_a_node_gets_the_packages_own_module(load: Load, tree: Path) -> None:
    """Modules that a node imports when it first runs are its own, under our names and under others."""
    before, package = ours(), load("own", OWN_NAMES)
    path = sys.path[:]
    expected = (7, 7, True, str(tree / "custom_nodes" / "own" / "only_later.py"))
    assert package.Node().seen_later() == expected
    assert package.Node().seen_later() == expected
    assert ours() == before
    assert sys.path == path


def test_two_node_packages_have_each_its_own_config(load: Load) -> None:
    """The second package with a `config` does not get the first one's, as it would in plain ComfyUI; nor does the first."""
    first = load("first", OWN_NAMES)
    second = load("second", {**OWN_NAMES, "config.py": "NUMBER = 8\n"})
    assert [package.Node().seen()[:2] for package in (first, second)] == [(7, 7), (8, 8)]
    assert [package.Node().seen_later()[:3] for package in (first, second)] == [(7, 7, True), (8, 8, True)]


def test_failing_node_package_leaves_nothing_behind(load: Load) -> None:
    """After a package that fails while it is imported, our modules, `sys.path` and `sys.modules` are as before."""
    before, path = ours(), sys.path[:]
    with pytest.raises(SetupError, match=r"custom node package .*own cannot be loaded: no such thing"):
        load("own", {**OWN_NAMES, "models/baseline.py": "raise ValueError('no such thing')\n"})
    assert ours() == before
    assert sys.path == path
    assert "custom_nodes_own" not in sys.modules
    assert load("own", OWN_NAMES).Node().seen()[0] == 7


def test_node_package_that_exits_leaves_our_modules_in_place(load: Load) -> None:
    """`sys.exit` in a package is passed on, with our modules in place."""
    before, path = ours(), sys.path[:]
    with pytest.raises(SystemExit):
        load("own", {"__init__.py": "import sys\nsys.path.insert(0, '/nowhere')\nsys.exit(4)\n"})
    assert ours() == before
    assert sys.path == path


def test_node_package_gets_the_modules_of_comfyui(load: Load, tree: Path) -> None:
    """`utils` and its modules are ComfyUI's, the same for us; `folder_paths` and `nodes` are those that are loaded."""
    code = (
        "import folder_paths, nodes, utils, utils.install_util\n"
        "from utils.json_util import merge_json_recursive\n"
        "import comfy.utils\n"
        "def later():\n"
        "    import utils.extra_config\n"
        "    return utils\n"
        "NODE_CLASS_MAPPINGS = {}\n"
    )
    package = load("user", {"__init__.py": code})
    assert package.folder_paths is sys.modules["folder_paths"]
    assert package.nodes is sys.modules["nodes"]
    assert package.utils.__file__ == str(tree / "utils" / "__init__.py")
    assert package.merge_json_recursive is importlib.import_module("utils.json_util").merge_json_recursive
    assert package.utils.install_util is importlib.import_module("utils").install_util
    assert package.later() is package.utils
    assert package.utils.extra_config is importlib.import_module("utils.extra_config")
    assert importlib.import_module("utils").import_custom_nodes_minimal is import_custom_nodes_minimal


def test_node_package_sees_no_folder_of_ours(load: Load) -> None:
    """Our folder is not on its `sys.path`, ComfyUI's comes first, and `latent_encoder` cannot be replaced."""
    code = (
        "import os, sys\nseen = sys.path[:]\nsys.path.insert(0, os.path.dirname(__file__))\n"
        "import latent_encoder\nNODE_CLASS_MAPPINGS = {}\n"
    )
    package = load("user", {"__init__.py": code, "latent_encoder.py": ""})
    assert not {str(PROJECT), "", "."} & set(package.seen)
    assert Path(package.seen[0], "nodes.py").is_file()
    assert package.latent_encoder is sys.modules["latent_encoder"]


def test_extension_of_a_node_package_gets_its_own_modules(load: Load) -> None:
    """The coroutine that gives a package's nodes imports the package's own modules."""
    code = (
        "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\n"
        "class Extension:\n"
        "    async def get_node_list(self):\n"
        "        import config\n"
        "        globals()['seen'] = config.NUMBER\n"
        "        return []\n"
        "async def comfy_entrypoint():\n"
        "    return Extension()\n"
    )
    assert load("user", {"__init__.py": code, "config.py": "NUMBER = 9\n"}).seen == 9


def test_thread_of_a_node_package_imports_while_the_package_waits_for_it(load: Load) -> None:
    """A package that starts a thread while it is imported, and waits for it, does not hang; the thread gets its modules."""
    code = (
        "import os, sys, threading\nsys.path.insert(0, os.path.dirname(__file__))\nseen = []\n"
        "def run():\n    import config\n    seen.append(config.NUMBER)\n"
        "thread = threading.Thread(target=run, daemon=True)\nthread.start()\nthread.join(30)\nNODE_CLASS_MAPPINGS = {}\n"
    )
    assert load("user", {"__init__.py": code, "config.py": "NUMBER = 9\n"}).seen == [9]


def test_import_of_ours_in_another_thread_waits_for_the_package(load: Load) -> None:
    """A thread of ours that imports `errors` while a package is imported gets our module, when the package is done."""
    begun, go, seen = threading.Event(), threading.Event(), []

    def import_ours() -> None:
        begun.wait(30)
        scope: dict[str, Any] = {"__file__": str(PROJECT / "latent_encoder" / "access.py"), "go": go}
        exec("go.set()\nimport errors", scope)  # noqa: S102
        seen.append(scope["errors"])

    thread = threading.Thread(target=import_ours)
    thread.start()
    sys.modules["begun_and_go"] = events = ModuleType("begun_and_go")
    vars(events).update(begun=begun, go=go)
    try:
        load("own", {**OWN_NAMES, "errors.py": "from begun_and_go import *\nbegun.set()\ngo.wait(30)\n"})
    finally:
        del sys.modules["begun_and_go"]
        begun.set()
        thread.join()
    assert seen == [importlib.import_module("errors")]


def test_log_handler_of_ours_imports_ours_while_a_package_is_imported(load: Load) -> None:
    """Code of ours that a node package calls imports our modules, and the package its own afterwards."""
    source = "def ours():\n    import config\n    return config\n"
    scope: dict[str, Any] = {"__file__": str(PROJECT / "latent_encoder" / "access.py")}
    exec(source, scope)  # noqa: S102
    sys.modules["caller"] = caller = ModuleType("caller")
    vars(caller).update(ours=scope["ours"])
    try:
        code = "\nimport caller\nseen = caller.ours()\nimport config\n"
        package = load("own", {**OWN_NAMES, "__init__.py": OWN_NAMES["__init__.py"] + code})
    finally:
        del sys.modules["caller"]
    assert package.seen is importlib.import_module("config")
    assert package.config.NUMBER == 7


def test_command_line_encodes_with_such_a_node_package(tmp_path: Path, model_dir: Path, run_main: RunMain) -> None:
    """A process whose CUSTOM_NODES names two such packages encodes an image, although one replaces LoadImage."""
    tree = tmp_path / "copied"
    tree.mkdir()
    place_runtime(COMFYUI, tree, copy)
    replace = (
        "\nimport nodes\nclass Loading(nodes.LoadImage):\n"
        "    def load_image(self, image):\n"
        "        assert Node().seen_later()[:3] == (7, 7, True)\n"
        "        print('loading with', NUMBER)\n"
        "        return super().load_image(image)\n"
        "nodes.NODE_CLASS_MAPPINGS['LoadImage'] = Loading\n"
    )
    write(tree / "custom_nodes" / "first-nodes", {**OWN_NAMES, "__init__.py": OWN_NAMES["__init__.py"] + replace})
    write(tree / "custom_nodes" / "second", {**OWN_NAMES, "config.py": "NUMBER = 8\n"})
    done = run_main(
        *("--image_path", IMAGES / "photo.jpg", "--vae_model_name", VAE, "--megapixels", "0.02"),
        env={
            **clean_environment(),
            "COMFYUI_PATH": str(tree),
            "MODEL_DIR": str(model_dir),
            "CUSTOM_NODES": "first-nodes,second",
        },
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "success"
