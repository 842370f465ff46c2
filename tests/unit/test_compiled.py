"""The core compiled (`setup.py`), in a copy of the tree: what type checks and the other tests cannot see.

`make test-compiled` runs the whole suite that way.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import extproc

ROOT = Path(__file__).parents[2]
COMPILER = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
HEADER = Path(sysconfig.get_path("include"), "Python.h")

pytestmark = [
    pytest.mark.skipif(extproc.is_compiled(), reason="compiled already: all tests are of that"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C compiler ({COMPILER})"),
    pytest.mark.skipif(not HEADER.exists(), reason=f"no headers of Python ({HEADER})"),
    pytest.mark.skipif(importlib.util.find_spec("mypyc") is None, reason="no mypyc: the extra [dev] has it"),
]

SOURCES = ("extproc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")
TESTS = (
    *("test_exchange", "test_mutation", "test_wire", "test_schedule", "test_load", "test_load_model", "test_circuit"),
    *("test_delays", "test_rooms", "test_trace_context", "test_explain", "test_request", "test_estimate"),
    *("test_policies", "test_policy_cache_aware", "test_policy_manual", "test_policy_prefix_tree"),
    *("test_policy_ring", "test_policy_scenarios"),
)
TIMEOUT_S = 600
"""Of the build (some 40 s) and of the tests, on a busy machine."""

STRUCTS = """
import importlib, json, sys
import msgspec

OPTIONS = ("array_like", "cache_hash", "dict", "eq", "forbid_unknown_fields", "frozen", "gc", "omit_defaults", "order",
           "repr_omit_defaults", "tag", "tag_field", "weakref")

def is_struct(value, module):
    return isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__

print(json.dumps({
    f"{name}.{value.__qualname__}": {
        "options": {option: getattr(value.__struct_config__, option) for option in OPTIONS},
        "fields": value.__struct_fields__,
        "defaults": repr(value.__struct_defaults__),
    }
    for name in sys.argv[1:]
    for module in [importlib.import_module(name)]
    for value in vars(module).values()
    if is_struct(value, module)
}))
"""
"""Prints what the structs of some modules are like."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with extension modules in place. Not the tree itself: they would hide the .py files there."""
    folder = tmp_path_factory.mktemp("compiled")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    python(folder, "setup.py", "--quiet", "build_ext", "--inplace", EXTPROC_COMPILE="1")
    return folder


def python(folder: Path, *arguments: str, **environment: str) -> str:
    """Run Python on the tree in a folder; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def extension_modules(folder: Path) -> list[str]:
    """Names of the modules that are compiled there."""
    paths = [path.relative_to(folder) for path in folder.glob("extproc/**/*.so")]
    names = [".".join((*path.parent.parts, path.name.partition(".")[0])) for path in paths]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_the_version_says_so(compiled: Path) -> None:
    arguments = ("-c", "from extproc.cli import main; main(['--version'])")
    assert python(compiled, *arguments) == f"extproc {extproc.__version__} (compiled)\n"
    assert python(ROOT, *arguments) == f"extproc {extproc.__version__} (pure Python)\n"


def test_structs_are_as_in_pure_python(compiled: Path) -> None:
    """A compiled class statement drops keywords, without a word."""
    modules = extension_modules(compiled)
    structs = json.loads(python(compiled, "-c", STRUCTS, *modules))
    assert {"extproc.load.Lease", "extproc.mutation.Mutation", "extproc.schedule.Scheduled"} <= structs.keys()
    assert structs == json.loads(python(ROOT, "-c", STRUCTS, *modules))


def test_what_is_compiled_passes_its_tests(compiled: Path) -> None:
    files = [f"tests/unit/{name}.py" for name in TESTS]
    python(compiled, "-m", "pytest", "-q", *files, "tests/lean")
