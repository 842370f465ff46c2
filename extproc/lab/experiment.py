"""Runs policies over seeds, on one or several processes. Results do not depend on the number of processes."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from extproc.errors import ConfigError
from extproc.lab.cluster import Cluster, RunResult
from extproc.lab.request import TraceRequest
from extproc.lab.settings import Settings
from extproc.lab.stats import Estimate, Summary, difference
from extproc.lab.synthetic import synthetic
from extproc.lab.traces import read_trace
from extproc.lab.workload import check_fits, scaled, spread, time_scale_for
from extproc.model import Role


@dataclass(frozen=True, slots=True)
class Load:
    """Where requests come from and how fast."""

    trace: Path | None = None
    """None: synthetic."""
    requests: int | None = None
    """The first of the trace, or how many to make; None: all of the trace."""
    utilization: float | None = None
    """Target, of `utilization_of`; None: `time_scale`."""
    utilization_of: Role = Role.PREFILL
    time_scale: float = 1.0

    def arrivals(self, settings: Settings, seed: int) -> list[TraceRequest]:
        """The workload of one seed. Raises ConfigError for a bad trace."""
        if self.trace is None:
            requests = synthetic(self.requests or DEFAULT_SYNTHETIC, random.Random(f"{seed}/synthetic"))
        else:
            requests = _read_once(self.trace, self.requests)
        check_fits(requests, settings.gpu)
        requests = spread(requests, random.Random(f"{seed}/arrivals"))
        if self.utilization is None:
            return scaled(requests, self.time_scale)
        return scaled(requests, time_scale_for(requests, settings, self.utilization_of, self.utilization))


DEFAULT_SYNTHETIC = 6_000
_traces: dict[tuple[Path, int | None], list[TraceRequest]] = {}


def _read_once(path: Path, limit: int | None) -> list[TraceRequest]:
    key = path, limit
    if key not in _traces:
        _traces[key] = read_trace(path, limit)
    return _traces[key]


@dataclass(frozen=True, slots=True)
class Case:
    """One run's whole input."""

    policy: str
    seed: int
    settings: Settings
    load: Load


def run_case(case: Case) -> Summary:
    """One run. Pure but for reading the trace."""
    return Summary.of(simulate(case))


def simulate(case: Case, record: bool = False) -> RunResult:
    """One run with everything that came out of it. `record`: each rank's load over time too."""
    arrivals = case.load.arrivals(case.settings, case.seed)
    return Cluster(case.policy, case.settings, case.seed, arrivals, record).run()


def run_cases(cases: Sequence[Case], jobs: int = 1, done: Callable[[Case], None] = lambda _: None) -> list[Summary]:
    """All cases, in their order. `done` is called after each, in any order."""
    if jobs == 1 or len(cases) == 1:
        summaries = []
        for case in cases:
            summaries.append(run_case(case))
            done(case)
        return summaries
    # Not forked: the progress bar has a thread.
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_case, case): case for case in cases}
        for future in as_completed(futures):
            future.result()
            done(futures[future])
        return [future.result() for future in futures]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Policies on the same load, with the same seeds."""

    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: dict[str, list[Summary]]
    """By policy, one for each seed."""

    def estimate(self, policy: str, figure: str) -> Estimate:
        """A figure over the seeds."""
        return Estimate.of([summary.figures()[figure] for summary in self.runs[policy]])

    def against(self, policy: str, base: str, figure: str) -> Estimate:
        """The relative difference to another policy, seed by seed, since the seeds' loads differ more than policies."""
        pairs = zip(self.runs[policy], self.runs[base], strict=True)
        return Estimate.of([difference(one.figures()[figure], other.figures()[figure]) for one, other in pairs])


def compare(
    policies: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    load: Load,
    *,
    jobs: int = 1,
    done: Callable[[Case], None] = lambda _: None,
) -> Comparison:
    """Run every policy with every seed. Raises ConfigError when a policy is named twice."""
    if len(set(policies)) < len(policies):
        raise ConfigError("policies: one is named twice")
    cases = [Case(policy, seed, settings, load) for policy in policies for seed in seeds]
    summaries = iter(run_cases(cases, jobs, done))
    runs = {policy: [next(summaries) for _ in seeds] for policy in policies}
    return Comparison(tuple(policies), tuple(seeds), runs)
