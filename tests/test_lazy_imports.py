"""Tests of delayed imports: importing code sees no difference, except that a module has not run yet."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import pytest

from latent_encoder.installer.placing import copy as copy_entry
from latent_encoder.installer.placing import place_runtime
from latent_encoder.lazy_imports import lazy_imports
from tests.helpers import COMFYUI, PROJECT, VAE, clean_environment

RELEASE_0_3_52 = PROJECT / "tests" / ".comfyui-0.3.52"

# A package that prints when it runs, and runs one of its modules itself, as most packages do.
PARCEL = {
    "parcel/__init__.py": 'print("parcel runs"); from parcel import inner\nclass Thing: pass',
    "parcel/inner.py": 'print("inner runs"); number = 1',
    "parcel/extra.py": 'print("extra runs"); number = 2',
    "parcel/deep/__init__.py": 'print("deep runs")',
    "parcel/deep/other.py": 'print("other runs"); number = 6',
    "parcel/deep/down.py": 'print("down runs"); from parcel import extra; number = 3',
}

# A package that imports one of its own packages on demand, as torch does with `torch._dynamo`.
HOLDER = {
    "holder/__init__.py": (
        "import importlib\n"
        "def __getattr__(name):\n"
        "    if name == 'late': return importlib.import_module('holder.late')\n"
        "    raise AttributeError(name)\n"
    ),
    "holder/late/__init__.py": 'import time\nprint("late runs")\ntime.sleep(0.05)\nfrom holder.late import inner\nnumber = 7',
    "holder/late/inner.py": 'print("inner runs"); number = 1',
    "holder/late/extra.py": 'print("extra runs"); number = 2',
}

Write = Callable[[str, str], None]
Import = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Give a function that writes a module, which can be imported until the test ends."""
    written = set()

    def write(file: str, code: str) -> None:
        path = tmp_path / file
        written.add(file.partition("/")[0].removesuffix(".py"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    for file, code in (PARCEL | HOLDER).items():
        write(file, code)
    yield write
    forget(*written)


@pytest.fixture
def import_lazily(write: Write) -> Import:
    """Give a function that runs code while modules of these names (default: `parcel`) are delayed, and returns its module."""

    def import_lazily(code: str, *names: str) -> Any:
        write("importing.py", code)
        forget("importing")
        with lazy_imports(*(names or ("parcel",))):
            return importlib.import_module("importing")

    return import_lazily


def forget(*packages: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def ran(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the modules that have run since the last call."""
    return [line.removesuffix(" runs") for line in capsys.readouterr().out.splitlines()]


def test_module_runs_when_it_is_used(import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """A delayed module runs once, however often it is imported and used; before that, `sys.modules` does not have it."""
    user = import_lazily("import parcel\nimport parcel as again\nimport parcel.inner, parcel.deep.down")
    assert ran(capsys) == []
    assert not any(name.startswith("parcel") for name in sys.modules)
    assert user.parcel.Thing is user.again.Thing
    assert user.parcel.Thing is sys.modules["parcel"].Thing
    assert ran(capsys) == ["parcel", "inner"]


def test_submodules_run_one_by_one(import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """Each submodule runs after the packages around it, and once, even if its package runs it too."""
    user = import_lazily("import parcel.inner, parcel.extra, parcel.deep.down")
    assert user.parcel.inner.number == 1
    assert ran(capsys) == ["parcel", "inner"]
    assert user.parcel.deep.down.number == 3
    assert ran(capsys) == ["deep", "down", "extra"]
    assert user.parcel.extra is sys.modules["parcel.extra"]
    assert user.parcel.inner is sys.modules["parcel.inner"]
    assert ran(capsys) == []


def test_what_comes_out_is_the_modules_own(import_lazily: Import) -> None:
    """Objects, pickles, assignments and deletions are the module's own, and so are the results of `dir`, `vars` and `repr`."""
    stand_in = import_lazily("import parcel").parcel
    thing = stand_in.Thing()
    real = sys.modules["parcel"]
    assert isinstance(thing, real.Thing)
    assert issubclass(type("Mine", (stand_in.Thing,), {}), real.Thing)
    assert type(pickle.loads(pickle.dumps(thing))) is real.Thing  # noqa: S301
    assert (dir(stand_in), vars(stand_in), repr(stand_in)) == (dir(real), vars(real), repr(real))
    stand_in.added = 1
    assert vars(real)["added"] == 1
    del stand_in.added
    assert "added" not in vars(real)
    with pytest.raises(AttributeError, match="module 'parcel' has no attribute 'nothing'"):
        _ = stand_in.nothing
    assert isinstance(stand_in, ModuleType)


@pytest.mark.parametrize(
    "code",
    [
        "from parcel import Thing",
        "import parcel\nclass Mine(parcel.Thing): pass\nThing = Mine.__base__",
        "import parcel, parcel.extra\nfrom parcel.inner import number\nfrom parcel import Thing",
        "import parcel.deep.down as down\nnumber = down.number\nfrom parcel import Thing",
    ],
)
def test_use_while_importing_is_an_import_as_always(
    code: str, import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that is used while it is imported runs at once, with its own modules."""
    thing = import_lazily(code).Thing
    assert ran(capsys)[:2] == ["parcel", "inner"]
    assert thing is importlib.import_module("parcel").Thing
    assert sys.modules["parcel"].inner is importlib.import_module("parcel.inner")
    assert importlib.import_module("parcel.extra") is sys.modules["parcel"].extra
    assert not set(ran(capsys)) & {"parcel", "inner"}


def test_names_can_mean_what_is_in_a_package(import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """With `package.*`, each module of the package is delayed on its own; the package, and packages in it, are not."""
    user = import_lazily("from parcel.extra import number\nimport parcel.deep.down\nfrom parcel import deep", "parcel.*")
    assert ran(capsys) == ["parcel", "extra", "deep"]
    assert importlib.import_module("parcel.deep.other").number == 6
    assert ran(capsys) == ["other"]
    assert user.deep.down.number == 3
    assert user.parcel.inner.number == 1
    assert ran(capsys) == ["down", "inner"]
    assert user.parcel.inner is sys.modules["parcel.inner"]


@pytest.mark.parametrize("statement", ["import holder.late as late", "from holder import late", "import holder.late, holder"])
def test_package_that_its_package_fetches_waits(
    statement: str, import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package that is given by its full name is delayed; afterwards, the package around it gives the real one."""
    user = import_lazily(f"import holder\n{statement}", "holder.late")
    assert ran(capsys) == []
    assert "holder.late" not in sys.modules
    assert "late" not in vars(sys.modules["holder"])
    assert user.holder.late.number == 7
    assert user.holder.late is sys.modules["holder.late"]
    assert vars(user).get("late", user.holder.late).inner is sys.modules["holder.late.inner"]
    assert ran(capsys) == ["late", "inner"]


def test_fetched_package_can_be_imported_in_every_way(import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """After the block, every kind of import statement gives the real package, which stays."""
    user = import_lazily("import holder.late", "holder.late")
    from holder import late  # type: ignore[import-not-found]

    assert late is sys.modules["holder.late"]
    assert user.holder.late is late
    assert importlib.import_module("holder.late.extra").number == 2
    assert late.extra is sys.modules["holder.late.extra"]
    assert ran(capsys) == ["late", "inner", "extra"]


@pytest.mark.parametrize("module", ["inner", "extra"])
def test_module_of_a_fetched_package_does_not_wait(
    module: str, import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module of such a package runs at once after its package, and once, even if its package runs it too."""
    user = import_lazily(f"import holder.late.{module}\nimport holder.late.{module}", "holder.late")
    assert ran(capsys) == {"inner": ["late", "inner"], "extra": ["late", "inner", "extra"]}[module]
    real = sys.modules[f"holder.late.{module}"]
    assert user.holder.late is sys.modules["holder.late"]
    assert getattr(user.holder.late, module) is real
    assert real.__spec__ is not None
    assert type(real.__spec__.loader).__name__ == "SourceFileLoader"
    assert ran(capsys) == []


@pytest.mark.parametrize(("statement", "pattern"), [("import holder.late", "holder.*"), ("import parcel.deep", "parcel.deep")])
def test_other_package_in_a_package_runs_at_once(
    statement: str, pattern: str, import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A package in a package runs at once unless it is named in full and imported on demand."""
    import_lazily(statement, pattern)
    assert set(ran(capsys)) & {"late", "deep"}


def test_missing_module_of_a_fetched_package_is_missed_at_the_import(
    import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing module fails at its import statement, and its package is there afterwards."""
    code = "try:\n    import holder.late.nowhere\nexcept ModuleNotFoundError as exc:\n    print(exc.name)"
    assert import_lazily(code, "holder.late").__name__ == "importing"
    assert "holder.late.nowhere" in capsys.readouterr().out.split()
    assert importlib.import_module("holder").late.number == 7


@pytest.mark.usefixtures("write")
@pytest.mark.parametrize("still_open", [True, False])
def test_threads_fetch_a_package_once(still_open: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Threads that fetch a package at once, by attribute, import statement or a module of it, run it once."""
    ways = (
        "import holder; number = holder.late.number",
        "import holder.late; number = holder.late.number",
        "from holder import late; number = late.number",
        "from holder.late.extra import number; number += 5",
    )
    together = Barrier(len(ways))

    def use(way: str) -> int:
        names: dict[str, Any] = {}
        together.wait()
        exec(way, names)  # noqa: S102
        number: int = names["number"]
        return number

    with ThreadPoolExecutor(len(ways)) as pool, ExitStack() as block:
        block.enter_context(lazy_imports("holder.late"))
        importlib.import_module("holder.late")
        if not still_open:
            block.close()
        assert list(pool.map(use, ways)) == [7] * len(ways)
    assert sys.modules["holder"].late is sys.modules["holder.late"]
    assert sorted(ran(capsys)) == ["extra", "inner", "late"]


def test_missing_module_is_missed_at_the_import(import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing module or submodule fails at its import statement, so that `except ImportError` catches it."""
    guarded = "try:\n    import {0}\nexcept ModuleNotFoundError as exc:\n    print(exc.name)\n"
    import_lazily(guarded.format("nowhere") + guarded.format("parcel.nowhere"), "nowhere", "parcel")
    assert capsys.readouterr().out.split() == ["nowhere", "parcel.nowhere"]


def test_failing_module_fails_at_each_use(write: Write, import_lazily: Import) -> None:
    """A failing module raises its own error at each use, until it can be imported."""
    write("broken.py", "raise ImportError('libbroken.so is missing')")
    user = import_lazily("import broken", "broken")
    for _ in range(2):
        with pytest.raises(ImportError, match=r"libbroken\.so is missing"):
            _ = user.broken.number
    write("broken.py", "number = 'mended now'")
    assert user.broken.number == "mended now"


def test_module_may_put_another_object_in_its_place(write: Write, import_lazily: Import) -> None:
    """A delayed module may replace itself in `sys.modules`, as packages with their own lazy modules do."""
    write("swapped.py", "import sys, types\nsys.modules[__name__] = types.SimpleNamespace(number=4)")
    assert import_lazily("import swapped", "swapped").swapped.number == 4


def test_threads_see_only_modules_that_have_run(
    write: Write, import_lazily: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    """If several threads use a module at once, one runs it and the others wait."""
    write("slow.py", "import time\nprint('slow runs')\ntime.sleep(0.1)\nnumber = 5")
    stand_in, together = import_lazily("import slow", "slow").slow, Barrier(4)

    def use() -> int:
        together.wait()
        number: int = stand_in.number
        return number

    with ThreadPoolExecutor(4) as pool:
        assert [task.result() for task in [pool.submit(use) for _ in range(4)]] == [5] * 4
    assert ran(capsys) == ["slow"]


def test_afterwards_all_is_as_before(write: Write, import_lazily: Import, capsys: pytest.CaptureFixture[str]) -> None:
    """After the block, also if an import in it failed, no finder is left, and an import runs the module and its stand-in's."""
    write("early.py", "import parcel\nfrom parcel.deep import no_such_name")
    finders = sys.meta_path[:]
    with pytest.raises(ImportError, match="no_such_name"), lazy_imports("parcel"):
        importlib.import_module("early")
    assert sys.meta_path == finders
    assert ran(capsys) == ["parcel", "inner", "deep"]
    forget("parcel")
    stand_in = import_lazily("import parcel").parcel
    assert ran(capsys) == []
    real = importlib.import_module("parcel")
    assert ran(capsys) == ["parcel", "inner"]
    assert stand_in.Thing is real.Thing
    assert import_lazily("import parcel").parcel.Thing is real.Thing


# ComfyUI


def run_python(code: str, *arguments: object) -> None:
    """Run code in another process, with `encoder` set up on the tree in the first argument."""
    set_up = (
        "import importlib, sys; from pathlib import Path; from config import Settings; from service import LatentEncoder\n"
        "meta_path = sys.meta_path[:]\n"
        "settings = Settings(_env_file=None, comfyui_path=Path(sys.argv[1]), device='cpu', megapixels=0.02)\n"
        "encoder = LatentEncoder.set_up(settings)\n"
        "heavy = {'scipy', 'tokenizers', 'torch._dynamo', 'torchsde', 'torchvision', 'transformers'}\n"
    )
    command = [sys.executable, "-c", set_up + code, *map(str, arguments)]
    environment = clean_environment()
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.core
def test_encoding_uses_none_of_it_and_others_get_all_of_it(tmp_path: Path) -> None:
    """Encoding loads none of the slow packages; ComfyUI's other parts get the real modules of them."""
    run_python(
        "from latent_encoder.requests import parse_request\n"
        "fields = {'image_path': sys.argv[2], 'vae_model_name': sys.argv[3], 'output_dir': sys.argv[4]}\n"
        "encoder.encode(parse_request(fields, settings.request_defaults))\n"
        "assert not heavy & sys.modules.keys()\n"
        "nodes, sd = map(importlib.import_module, ('nodes', 'comfy.sd'))\n"
        "assert 'euler' in nodes.KSampler.INPUT_TYPES()['required']['sampler_name'][0]\n"
        "import comfy.k_diffusion.sampling, scipy.integrate, torchsde\n"
        "assert comfy.k_diffusion.sampling.integrate is scipy.integrate\n"
        "assert comfy.k_diffusion.sampling.torchsde is torchsde\n"
        "assert comfy.samplers.scipy.stats is sys.modules['scipy.stats']\n"
        "import transformers\n"
        "assert sd.sd1_clip.CLIPTokenizer is transformers.CLIPTokenizer\n"
        "assert issubclass(comfy.text_encoders.sd2_clip.SD2Tokenizer, comfy.sd1_clip.SD1Tokenizer)\n"
        "coder = sys.modules['comfy.ldm.cascade.stage_c_coder']\n"
        "compose = coder.torchvision.transforms.Compose\n"
        "import torchvision.transforms\n"
        "assert compose is torchvision.transforms.Compose\n",
        *(COMFYUI, PROJECT / "tests/fixtures/test_images/photo.jpg", VAE, tmp_path),
    )


@pytest.mark.core
def test_compiler_of_torch_waits_and_works(tmp_path: Path) -> None:
    """A module that imports torch's compiler by name, as comfy_kitchen does, gets the real one, and so do torch and others."""
    place_runtime(COMFYUI, tmp_path, copy_entry)
    with (tmp_path / "nodes.py").open("a") as file:
        file.write("\nimport torch._dynamo\ndef compiler(): return torch._dynamo\n")
    run_python(
        "import torch\n"
        "assert not heavy & sys.modules.keys()\n"
        "assert '_dynamo' not in vars(torch)\n"
        "double = torch.compile(lambda x: x * 2, backend='eager')\n"
        "assert double(torch.ones(2)).tolist() == [2, 2]\n"
        "real = sys.modules['torch._dynamo']\n"
        "from torch import _dynamo\n"
        "assert importlib.import_module('nodes').compiler() is torch._dynamo is _dynamo is real\n"
        "assert real.__spec__.loader.__class__.__name__ == 'SourceFileLoader'\n",
        tmp_path,
    )


def test_it_stays_away_on_an_older_release() -> None:
    """On an older release the slow packages stay unloaded too, and no finder of ours is left in `sys.meta_path`."""
    run_python("assert not heavy & sys.modules.keys(); assert sys.meta_path == meta_path", RELEASE_0_3_52)


@pytest.mark.core
def test_tree_that_uses_it_while_it_is_imported_works(tmp_path: Path) -> None:
    """A tree that uses a delayed module while it is imported, as a later release may, gets it imported at once."""
    place_runtime(COMFYUI, tmp_path, copy_entry)
    with (tmp_path / "nodes.py").open("a") as file:
        file.write(
            "\nimport torchvision, comfy.model_base\nfrom torchvision import transforms\n"
            "class OwnTransform(torchvision.transforms.Compose): pass\n"
            "class OwnModel(comfy.model_base.BaseModel): pass\n"
        )
    run_python(
        "nodes, torchvision, model_base = map(importlib.import_module, ('nodes', 'torchvision', 'comfy.model_base'))\n"
        "assert nodes.OwnTransform.__base__ is torchvision.transforms.Compose\n"
        "assert nodes.transforms is torchvision.transforms\n"
        "assert nodes.OwnModel.__base__ is model_base.BaseModel\n",
        tmp_path,
    )
