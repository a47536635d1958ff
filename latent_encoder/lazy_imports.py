"""Imports that wait until the imported module is used.

An import statement finds a module and runs its code, which imports further modules. Finding costs little; running may cost
seconds. Inside `with lazy_imports("name"):`, a module of that name is still found, so a module that is not installed fails as
usual. The import statement then gets a stand-in. The first use of the stand-in imports the module in the regular way; this use
and all later ones are passed on to it. So every object taken from a stand-in is the module's own. Locks, errors and the order
of packages are those of the import system.

After the block, `sys.meta_path` is as before, and `sys.modules` holds only modules that have run. A later import runs
the module as usual. Stand-ins that were handed out stay lazy.

`from package import thing` uses the package at once. To delay it, name the module that contains this statement.
"""

# `importlib.util.LazyLoader` of the standard library delays the module itself. In Python 3.11, a second thread may then see a
# module that has half run, a submodule runs twice if its package imports it too, and a second import statement ends the delay.

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Attributes that the import system sets on a module before its code runs, and reads when the module is imported again.
_SET_BY_IMPORT = frozenset({"__file__", "__name__", "__path__", "__spec__"})


@contextmanager
def lazy_imports(*patterns: str) -> Iterator[None]:
    """Delay imports of modules with these names until their first use; `*` stands for any characters, dots too.

    Modules below a delayed package are delayed with it. Modules that were imported before stay as they are. A package inside a
    package that has run is not delayed: after it has run, nothing would notice the first use of one of its modules.

    One such package is delayed: its full name is given, and the package around it has a `__getattr__` that imports it on
    demand. For example, torch imports `torch._dynamo` on demand. When the block ends, its stand-in is removed from the package
    around it, as if it had never been imported. Modules in it are not delayed: an import of one runs both at once.
    """
    finder = _Finder(patterns)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.close()


class _StandIn(ModuleType):
    """The object that an import statement gets for a delayed module."""

    def __getattribute__(self, name: str) -> Any:
        finder, own_name = _origin(self)
        if name == "__class__" or (finder.is_open and name in _SET_BY_IMPORT):
            return super().__getattribute__(name)
        return getattr(finder.run(own_name, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        finder, own_name = _origin(self)
        # The import system sets a submodule's stand-in here; it will set the submodule itself after that has run.
        if not (type(value) is _StandIn and _origin(value) == (finder, f"{own_name}.{name}")):
            setattr(finder.run(own_name, name), name, value)

    def __delattr__(self, name: str) -> None:
        finder, own_name = _origin(self)
        delattr(finder.run(own_name, name), name)


def _origin(stand_in: _StandIn) -> tuple[_Finder, str]:
    """Return the finder that made the stand-in, and its module's name."""
    own = object.__getattribute__
    return own(stand_in, "__loader__"), own(stand_in, "__name__")


class _Finder(MetaPathFinder, Loader):
    """The finder and loader of stand-ins for the modules to delay."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.is_open = True
        self._patterns = patterns
        self._names: list[str] = []  # of all stand-ins; a module that is imported again is not delayed again
        self._on_demand: set[str] = set()  # packages that the package around them imports on demand
        self._lock = threading.RLock()

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent = fullname.rpartition(".")[0]
        below = type(sys.modules.get(parent)) is _StandIn
        if fullname in self._names or not (below or any(fnmatchcase(fullname, pattern) for pattern in self._patterns)):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None:
            return None
        if parent and not below and spec.submodule_search_locations is not None:
            if not (fullname in self._patterns and "__getattr__" in vars(sys.modules[parent])):
                return None
            self._on_demand.add(fullname)
        spec.loader = self
        return spec

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        parent = name.rpartition(".")[0]
        with self._lock:
            self._names.append(name)
        if parent in self._on_demand:
            self._withdraw([parent])
            del sys.modules[name]
            importlib.import_module(name)  # the import system continues with the module that is under that name now
        else:
            module.__class__ = _StandIn

    def run(self, name: str, attribute: str) -> ModuleType:
        """Run the module, and submodules imported under that attribute of it, unless they have run; return the module."""
        if type(sys.modules.get(name)) is _StandIn:
            package = name.partition(".")[0]
            self._withdraw(self._at_or_below(package if package in self._names else name))
        module = importlib.import_module(name)
        for submodule in self._at_or_below(f"{name}.{attribute}"):
            importlib.import_module(submodule)
        return module

    def _at_or_below(self, top: str) -> list[str]:
        """Return the names of stand-ins at that name and below it, in the order of their imports."""
        with self._lock:
            return [name for name in self._names if f"{name}.".startswith(f"{top}.")]

    def _withdraw(self, names: Iterable[str]) -> None:
        """Remove the stand-ins of these names from `sys.modules`."""
        with self._lock:
            for name in names:
                if type(sys.modules.get(name)) is _StandIn:
                    del sys.modules[name]

    def close(self) -> None:
        """Stop delaying imports, and remove the stand-ins that have not run."""
        self.is_open = False
        self._withdraw(self._names)
        for name in self._on_demand:
            parent, _, child = name.rpartition(".")
            if type(vars(sys.modules[parent]).get(child)) is _StandIn:
                delattr(sys.modules[parent], child)
