"""Imports one module as soon as another has been imported, and not before.

`import quantkit` promises that transformers knows its format, and must not import transformers for it, which takes
seconds. So a finder stands in front of Python's: it lets the others find the module that is waited for, has it
executed as always, and then imports the module that reacts to it. To all other imports it says nothing.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, reaction: str) -> None:
    """Imports the module `reaction` once the module `name` is imported: now, if it is already.

    A reaction that fails is a warning: the import of `name` is somebody else's and succeeds.
    """
    if name in sys.modules:
        _react(name, reaction)
    else:
        sys.meta_path.insert(0, _Finder(name, reaction))


def _react(name: str, reaction: str) -> None:
    try:
        import_module(reaction)
    except Exception as error:
        warnings.warn(f"{reaction}, which completes {name}, fails: {type(error).__name__}: {error}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Stays on the path when it is done: another thread may be walking along it."""

    def __init__(self, name: str, reaction: str) -> None:
        self.name, self.reaction, self.done = name, reaction, False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.done or fullname != self.name or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:  # those before have been asked
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """A module's own loader, and the reaction to its import; gone from the module before it is executed."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # get_source and the like, for whoever only looks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if not self.finder.done:
            self.finder.done = True
            _react(self.finder.name, self.finder.reaction)
