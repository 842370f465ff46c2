"""Asks one engine everything once: what `extproc check` shows."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from extproc.config import Config, WorkerConfig
from extproc.discovery.fetch import Client, FetchError
from extproc.discovery.info import WorkerInfo, merge, problems, role_conflict
from extproc.discovery.inquiry import ask_info, check_health
from extproc.discovery.resolve import Lookup, resolve, system_lookup
from extproc.model import RankLoad, Role, Worker
from extproc.scraper import read_loads, scrape_target


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """What was found at one worker."""

    worker: Worker
    """As it would be announced."""
    healthy: bool
    """Whether it would be: it answers, and for the role that it is configured for."""
    info: WorkerInfo
    """What the engine said about itself, without the configuration."""
    metrics_url: str | None
    """The first place that gave loads."""
    loads: tuple[RankLoad, ...]
    problems: tuple[str, ...]
    """In words that say what to do; each to be read after the worker's name. Empty: all is well."""


async def probe(
    config: Config,
    role: Role,
    entry: WorkerConfig,
    client: Client,
    *,
    headers: Mapping[str, str] | None = None,
    lookup: Lookup = system_lookup,
) -> ProbeReport:
    """Asks the worker of one configuration entry. Raises ConfigError for an unusable URL, nothing else."""
    worker = entry.to_worker(role)
    timeout_s = config.health_check_timeout_secs
    endpoint = await resolve(worker.url, None, lookup, timeout_s)
    if endpoint is None:
        unresolved = f"has a host name that cannot be resolved: check the url {entry.url}"
        return ProbeReport(worker, False, WorkerInfo(), None, (), (unresolved,))
    worker = replace(worker, endpoint=endpoint)
    down = await check_health(client, worker.url, config.health_check_endpoint, timeout_s, headers or {})
    if down is not None:
        return ProbeReport(worker, False, WorkerInfo(), None, (), (f"is not up: {down}",))
    info = await ask_info(client, worker.url, timeout_s, headers or {})
    found = problems(worker, entry, info)
    worker = merge(worker, entry, info)
    metrics_url, loads = None, tuple[RankLoad, ...]()
    try:
        scrape = await read_loads(
            client,
            scrape_target(worker, entry, config).urls,
            timeout_s=config.worker_load_check_timeout,
            worker=worker.name,
            headers=headers,
        )
    except FetchError as error:
        found += (f"gives no load figures ({error}): restart it with --enable-metrics, or set metrics_urls",)
    else:
        metrics_url, loads = scrape.url, scrape.loads
        found += tuple(_load_problems(worker, scrape.url, loads))
    return ProbeReport(worker, role_conflict(role, info) is None, info, metrics_url, loads, found)


def _load_problems(worker: Worker, url: str, loads: tuple[RankLoad, ...]) -> list[str]:
    found = []
    silent = [str(load.dp_rank) for load in loads if load.used_tokens is None]
    if silent:
        found.append(f"does not report num_used_tokens of DP rank {', '.join(silent)} at {url}")
    beyond = [str(load.dp_rank) for load in loads if worker.dp_size is not None and load.dp_rank >= worker.dp_size]
    if beyond:
        found.append(
            f"reports DP rank {', '.join(beyond)} at {url}, beyond its dp_size of {worker.dp_size}: correct dp_size"
        )
    return found
