"""A simulated SGLang server in prefill/decode mode: real HTTP, modelled GPU.

`Engine` is the whole thing, for tests and demos; `EngineModel` is the part without I/O or clocks. Imports nothing from
the rest of the package.
"""

from extproc.sim.config import EngineConfig
from extproc.sim.engine import Engine
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role
from extproc.sim.model import EngineModel
from extproc.sim.records import Record

__all__ = ["Engine", "EngineConfig", "EngineModel", "GpuModel", "Record", "Role"]
