"""Compiles the core with mypyc where EXTPROC_COMPILE=1 asks for it (docs/decisions.md); all else is in pyproject.toml.

    pip install --requirement requirements.lock --requirement requirements-compile.lock
    EXTPROC_COMPILE=1 pip install --no-build-isolation .

That needs a C compiler, and in the environment setuptools, mypy, types-PyYAML and the project's dependencies: what is
compiled is type-checked first.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

COMPILED = (
    "circuit.py",
    "delays.py",
    "direct.py",
    "events.py",
    "exchange.py",
    "gateway.py",
    "lean/fields.py",
    "lean/grpc.py",
    "lean/http2.py",
    "load.py",
    "load_model.py",
    "mutation.py",
    "number.py",
    "parse.py",
    "policy/*.py",
    "rooms.py",
    "schedule.py",
    "service.py",
    "trace_context.py",
    "transport/lean_streams.py",
    "wire.py",
)
"""What a request goes through. Together, as calls between them are then calls in C. Not: modules with structs that
msgspec decodes (a compiled class has no annotations), those of coroutines, and those that wait for others' code.
"""

extensions = []
if os.environ.get("EXTPROC_COMPILE") == "1":
    try:
        from mypyc.build import mypycify
    except ImportError:
        sys.exit("EXTPROC_COMPILE=1: no mypy in this environment: see setup.py")

    modules = sorted(str(path) for pattern in COMPILED for path in Path("extproc").glob(pattern))
    extensions = mypycify(modules, opt_level="3", debug_level="0", group_name="extproc")
    for extension in extensions:  # what another compiler warns of is no reason not to install
        extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]

setup(ext_modules=extensions)
