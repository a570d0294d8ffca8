"""Run a function once a library has been imported, whoever imports it and whenever, without importing it.

A finder ahead of all others looks on: it asks those behind it for a library that is waited for, and gives what they
found a loader that runs the function when the library's own loader is done. All other imports pass it by.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from itertools import dropwhile
from types import ModuleType
from typing import Any, cast

_waiting: dict[str, Callable[[], object]] = {}


def after_import(library: str, function: Callable[[], object]) -> None:
    """Call ``function`` right after the next import of ``library`` that succeeds, or now if it is imported already.

    Args:
        library: name of a package or a module, as in ``sys.modules``.
        function: called once, without arguments, at the end of the import statement, in its thread. Of an exception
            a warning is made: the library is not at fault. A later call for the same library replaces a function
            that still waits.

    >>> after_import("timm", lambda: print("timm is here"))
    >>> import timm
    timm is here
    """
    _waiting[library] = function
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    # Looked at last, so that an import that ends meanwhile in another thread is not missed.
    if library in sys.modules:
        _call(library)


def _call(library: str) -> None:
    function = _waiting.pop(library, None)  # one thread alone gets it
    if function is None:
        return
    try:
        function()
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        warnings.warn(f"what florence_fast does after the import of {library} failed: {what}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds nothing by itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the finders behind this one find, with a loader that tells when it is done."""
        if name not in _waiting:
            return None
        for finder in [*dropwhile(lambda finder: finder is not self, sys.meta_path)][1:]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is None:
                continue
            # a folder without __init__.py, which has no loader that runs anything, is not the library
            if hasattr(spec.loader, "exec_module"):
                spec.loader = cast(Loader, _Loader(spec.loader))
            return spec
        return None


class _Loader:
    """A library's own loader in every respect but one: what waits for the library runs after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which keeps no trace of this class: sources and resources are asked of its own loader."""
        spec = cast(ModuleSpec, module.__spec__)
        spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _call(spec.name)


_FINDER = _Finder()
