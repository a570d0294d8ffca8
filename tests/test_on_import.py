"""What waits for a library: run once, whoever comes first, and the library's import is as if nobody had looked on."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Every child starts with this; `library` may be imported, and notes down when it has been.
PROLOGUE = """
import importlib, importlib.util, sys, threading, warnings
from florence_fast.on_import import after_import
calls = []
def call():
    calls.append(sys.modules["library"].DONE)
"""


@pytest.fixture
def child(tmp_path):
    """Run code in a process of its own that finds ``library`` in a folder, and fail with what it says."""
    package = tmp_path / "library"
    package.mkdir()
    (package / "__init__.py").write_text("import os\nif os.path.exists(os.environ['BREAK']): 1 / 0\nDONE = True\n")
    (package / "part.py").write_text("HERE = 1\n")
    (package / "data.txt").write_text("words")

    def run(code):
        environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "BREAK": str(tmp_path / "broken"), "FOLDER": str(tmp_path)}
        code = PROLOGUE + textwrap.dedent(code)
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    return run


@pytest.mark.parametrize("first", ["after_import('library', call)", "import library"], ids=["waits", "is-there"])
def test_runs_once_whoever_comes_first(child, first):
    child(f"""
        {first}
        assert not calls
        import library, library.part
        after_import("library", call) if "{first}" == "import library" else None
        assert calls == [True], calls
        import library
        assert importlib.reload(library).DONE and calls == [True]
    """)


def test_a_module_of_a_package_is_waited_for_alone(child):
    child("""
        after_import("library.part", call)
        import library
        assert not calls
        from library.part import HERE
        assert calls == [True]
    """)


def test_the_library_keeps_no_trace(child):
    child("""
        import importlib.resources, inspect, pkgutil
        import json as plain
        after_import("library", call)
        found = importlib.util.find_spec("library")
        assert found.origin.endswith("__init__.py") and found.loader.is_package("library") and not calls
        import library
        assert calls == [True]
        assert type(library.__loader__) is type(library.__spec__.loader) is type(plain.__loader__)
        assert library.__spec__.loader is library.__loader__
        assert "DONE" in inspect.getsource(library)
        assert importlib.resources.files("library").joinpath("data.txt").read_text() == "words"
        assert [m.name for m in pkgutil.iter_modules(library.__path__)] == ["part"]
    """)


def test_an_import_that_fails_fails_as_ever_and_the_next_one_counts(child):
    child("""
        import os
        after_import("library", call)
        open(os.environ["BREAK"], "w").close()
        try:
            import library
        except ZeroDivisionError as error:
            assert "library" not in sys.modules and not calls
        else:
            raise AssertionError("the library's own error must come through")
        os.remove(os.environ["BREAK"])
        import library
        assert calls == [True]
    """)


def test_what_is_not_there_is_missed_by_its_own_name(child):
    child("""
        after_import("no_such_library", call)
        try:
            import no_such_library
        except ModuleNotFoundError as error:
            assert error.name == "no_such_library" and error.__cause__ is None
        else:
            raise AssertionError
        assert importlib.util.find_spec("no_such_library") is None and not calls
    """)


def test_a_folder_without_code_is_not_the_library(child):
    child("""
        import os
        os.mkdir(os.path.join(os.environ["FOLDER"], "hollow"))
        after_import("hollow", call)
        import hollow
        assert hollow.__file__ is None and not calls
    """)


@pytest.mark.parametrize("first", [True, False], ids=["waits", "is-there"])
def test_an_error_of_ours_is_a_warning_and_not_the_librarys(child, first):
    child(f"""
        def fail():
            raise KeyError("old version")
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            if {first}:
                after_import("library", fail)
            import library
            after_import("library", fail) if not {first} else None
        assert library.DONE
        (warning,) = warned
        assert "after the import of library failed: KeyError: 'old version'" in str(warning.message)
    """)


def test_a_later_function_replaces_one_that_waits(child):
    child("""
        after_import("library", lambda: calls.append("old"))
        after_import("library", call)
        import library
        assert calls == [True]
        from florence_fast import on_import
        assert len([finder for finder in sys.meta_path if isinstance(finder, on_import._Finder)]) == 1
    """)


def test_other_finders_work_as_before(child):
    child("""
        from importlib.machinery import ModuleSpec
        class Memory:
            asked = []
            def find_spec(self, name, path=None, target=None):
                self.asked.append(name)
                return ModuleSpec(name, self) if name == "memory" else None
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                module.DONE = "made in memory"
        class Old:
            pass  # from the days of find_module; the import system itself would warn of it
        def call():
            calls.append(sys.modules["memory"].DONE)
        after_import("memory", call)
        finder = Memory()
        sys.meta_path[1:1] = [Old(), finder]
        import memory
        del sys.meta_path[1]
        import library
        assert calls == ["made in memory"] and memory.__loader__ is finder
        assert finder.asked.count("memory") == 1 and finder.asked.count("library") == 1
    """)


def test_a_lazy_import_counts_when_it_happens(child):
    child("""
        after_import("library", call)
        spec = importlib.util.find_spec("library")
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules["library"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert not calls
        assert module.DONE and calls == [True]
    """)


def test_a_zipped_library(child):
    child("""
        import os, zipfile
        archive = os.path.join(os.environ["FOLDER"], "archive.zip")
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("zipped/__init__.py", "DONE = 2")
        sys.path.insert(0, archive)
        after_import("zipped", lambda: calls.append(sys.modules["zipped"].DONE))
        import zipped
        assert calls == [2] and type(zipped.__loader__).__name__ == "zipimporter"
    """)


def test_threads_that_import_together_run_it_once(child):
    child("""
        import os, time
        with open(os.path.join(os.environ["FOLDER"], "library", "__init__.py"), "a") as file:
            file.write("import time; time.sleep(0.05); LAST = 1")
        start = threading.Barrier(8)
        seen = []
        def one():
            start.wait()
            import library
            seen.append(library.LAST)
        after_import("library", call)
        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert seen == [1] * 8 and calls == [True]
    """)
