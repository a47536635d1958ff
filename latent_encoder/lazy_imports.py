"""Imports that wait until what they import is used.

An import statement does two things: it finds a module, and it runs the module's code, which imports further modules. Finding
costs little, running may cost seconds. Inside `with lazy_imports("name"):` a module of that name is found as always, so that
one which is not installed fails as always, but who imports it gets a stand-in. As soon as anything of the stand-in is used, it
imports the module in the regular way and passes on to it that use and all later ones. So whatever comes out of a stand-in
is the module's own, and locks, errors and the order in which packages run are those of the import system.

When the block ends, `sys.meta_path` is as before, and `sys.modules` holds only modules that have run: an import statement that
comes later runs the module as if nothing had been. The stand-ins that were handed out stay lazy.

`from package import thing` uses the package at once. To have it wait, give the name of the module that says so.
"""

# The standard library's `importlib.util.LazyLoader` makes the module itself wait. With Python 3.11's, a second thread sees a
# module of which half has run, a submodule runs twice if its package imports it too, and a second import statement ends the
# waiting.

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

# What the import system sets on a module before its code runs, and reads when it is imported once more.
_SET_BY_IMPORT = frozenset({"__file__", "__name__", "__path__", "__spec__"})


@contextmanager
def lazy_imports(*patterns: str) -> Iterator[None]:
    """Let imports of modules with these names wait for the first use; `*` stands for anything, dots too.

    What is below a package that waits, waits with it. A package in a package that has run does not wait: once it has run too,
    nothing would tell that one of its modules is used. What was imported before stays as it is.

    One such package waits all the same: it is given by its full name, and the package around it has a `__getattr__`, which
    has to import it on demand. For example, torch imports `torch._dynamo` on demand. When the block ends, its stand-in leaves
    the package around it, as if it had never been imported. Modules in it do not wait: an import of one runs both at once.
    """
    finder = _Finder(patterns)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.close()


class _StandIn(ModuleType):
    """What an import statement gets for a module that waits."""

    def __getattribute__(self, name: str) -> Any:
        finder, own_name = _origin(self)
        if name == "__class__" or (finder.is_open and name in _SET_BY_IMPORT):
            return super().__getattribute__(name)
        return getattr(finder.run(own_name, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        finder, own_name = _origin(self)
        # A submodule's stand-in comes from the import system, which will set the submodule itself when that has run.
        if not (type(value) is _StandIn and _origin(value) == (finder, f"{own_name}.{name}")):
            setattr(finder.run(own_name, name), name, value)

    def __delattr__(self, name: str) -> None:
        finder, own_name = _origin(self)
        delattr(finder.run(own_name, name), name)


def _origin(stand_in: _StandIn) -> tuple[_Finder, str]:
    own = object.__getattribute__
    return own(stand_in, "__loader__"), own(stand_in, "__name__")


class _Finder(MetaPathFinder, Loader):
    """Finds the modules that are to wait, and loads stand-ins for them."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self.is_open = True
        self._patterns = patterns
        self._names: list[str] = []  # of all stand-ins; what is imported once more is not to wait any longer
        self._on_demand: set[str] = set()  # packages that the package around them imports when it is asked for them
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
            importlib.import_module(name)  # the import system goes on with what is under that name now
        else:
            module.__class__ = _StandIn

    def run(self, name: str, attribute: str) -> ModuleType:
        """The module, and what was imported under that attribute of it, run now if they have not."""
        if type(sys.modules.get(name)) is _StandIn:
            package = name.partition(".")[0]
            self._withdraw(self._at_or_below(package if package in self._names else name))
        module = importlib.import_module(name)
        for submodule in self._at_or_below(f"{name}.{attribute}"):
            importlib.import_module(submodule)
        return module

    def _at_or_below(self, top: str) -> list[str]:
        """The stand-ins of that name and below it, in the order of their imports."""
        with self._lock:
            return [name for name in self._names if f"{name}.".startswith(f"{top}.")]

    def _withdraw(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                if type(sys.modules.get(name)) is _StandIn:
                    del sys.modules[name]

    def close(self) -> None:
        """From now on, nothing waits that is imported anew."""
        self.is_open = False
        self._withdraw(self._names)
        for name in self._on_demand:
            parent, _, child = name.rpartition(".")
            if type(vars(sys.modules[parent]).get(child)) is _StandIn:
                delattr(sys.modules[parent], child)
