"""What the service says of itself: Prometheus metrics, and one log line for each attempt.

Never prompts, bodies or credentials: only what `Finished` holds. Gauges are read off the load table when asked for.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from extproc.circuit import CircuitState
from extproc.counters import Counted, Counts, Histogram
from extproc.events import Finished, Outcome
from extproc.load import LoadTable
from extproc.model import Pick

logger = logging.getLogger("extproc.request")

DECISION_BUCKETS_S = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3)
"""Around the tens of microseconds that a decision costs, up to what a 64 MiB body takes."""

LEG_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Time to first token of production LLMs lies between tens of milliseconds and a minute."""


ESTIMATE_BUCKETS_RATIO = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 4)
"""From four times too short to four times too long; below 0 a histogram could have no sum, hence ratio, not error."""


CIRCUIT_LEVELS = {CircuitState.CLOSED: 0.0, CircuitState.HALF_OPEN: 0.5, CircuitState.OPEN: 1.0}


KEPT_DECISIONS = 64
"""Attempts that `/debug/decisions` remembers: a few screens, and at most 200 KB with explanations (2 KB each)."""

UNPLACED = frozenset({Outcome.NO_WORKER, Outcome.OVERLOADED})
"""Decisions that came to no placement. Bad requests are none: they never got to the scheduler."""


class Telemetry:
    """Counts, logs and remembers finished attempts, and counts scrapes."""

    def __init__(self, table: LoadTable, clock: Callable[[], float], open_exchanges: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.decisions: deque[Finished] = deque(maxlen=KEPT_DECISIONS)
        """The scheduler's last decisions whose attempts are over, in the order of their ends."""
        self._attempts = Counts(
            "extproc_attempts",
            "Attempts at requests that ended, by outcome. A retried request has several.",
            ["endpoint", "outcome", "status"],
        )
        self._legs = Counts(
            "extproc_legs_ended",
            "Legs of attempts that ended, by how. Of an attempt, only the leg that failed is `failed`.",
            ["role", "worker", "end"],
        )
        self._retries = Counts(
            "extproc_retries",
            "Attempts beyond the first at a request, by their outcome.",
            ["outcome"],
        )
        self._decision = Histogram(
            "extproc_decision_seconds",
            "From a request's body to its placement and new bodies.",
            [],
            DECISION_BUCKETS_S,
        )
        self._estimate = Histogram(
            "extproc_prompt_estimate_ratio",
            "Prompt tokens as estimated, over those that the engine counted; 1 is right. A sample of all prompts.",
            ["endpoint"],
            ESTIMATE_BUCKETS_RATIO,
        )
        self._response_headers = Histogram(
            "extproc_response_headers_seconds",
            "From a request's headers to the decode worker's response headers.",
            ["endpoint"],
            LEG_BUCKETS_S,
        )
        self._prefill = Histogram(
            "extproc_prefill_leg_seconds",
            "From dispatch to the end of the prefill leg.",
            ["worker"],
            LEG_BUCKETS_S,
        )
        self._scrapes = Histogram(
            "extproc_scrape_seconds",
            "Time a scrape of a worker's loads took.",
            ["worker"],
            LEG_BUCKETS_S,
        )
        self._scrape_failures = Counts("extproc_scrape_failures", "Scrapes that gave no loads.", ["worker"])
        registry.register(
            Counted(
                *(self._attempts, self._legs, self._retries, self._decision, self._estimate),
                *(self._response_headers, self._prefill, self._scrapes, self._scrape_failures),
            )
        )
        registry.register(_Gauges(table, clock, open_exchanges))

    def finished(self, record: Finished) -> None:
        """An attempt is over."""
        if record.placement or record.outcome in UNPLACED:
            self.decisions.append(record)
        self._attempts[record.endpoint, record.outcome, record.status] += 1
        if record.attempt > 1:
            self._retries[record.outcome,] += 1
        if record.placement and record.prefill_end and record.decode_end:
            self._legs["prefill", record.placement.prefill.worker.name, record.prefill_end] += 1
            self._legs["decode", record.placement.decode.worker.name, record.decode_end] += 1
        if record.decision_s is not None:
            self._decision[()].observe(record.decision_s)
        if record.counted_tokens:
            self._estimate[record.endpoint,].observe(record.prompt_tokens / record.counted_tokens)
        if record.response_headers_s is not None and record.outcome is Outcome.OK:
            self._response_headers[record.endpoint,].observe(record.response_headers_s)
        if record.prefill_s is not None and record.placement:
            self._prefill[record.placement.prefill.worker.name,].observe(record.prefill_s)
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", log_line(record))

    def scraped(self, worker_name: str, duration_s: float, failed: bool) -> None:
        """A scrape is over."""
        self._scrapes[worker_name,].observe(duration_s)
        if failed:
            self._scrape_failures[worker_name,] += 1


def log_line(record: Finished) -> str:
    """One attempt as `key=value` pairs, in a fixed order."""
    placement, explanation = record.placement, record.explanation
    said = [
        f"outcome={record.outcome} status={record.status} endpoint={record.endpoint}",
        f"request_id={record.request_id or '-'} attempt={record.attempt}",
    ]
    if placement:
        said += (
            f"prefill={_pick(placement.prefill)} decode={_pick(placement.decode)} room={placement.room}",
            f"prompts={record.batch_size} tokens={round(record.prompt_tokens)}",
        )
    elif record.direct_worker:
        said.append(f"decode={record.direct_worker}")
    if record.counted_tokens:
        said.append(f"counted={record.counted_tokens}")
    if placement:
        said.append(f"prefill_end={record.prefill_end} decode_end={record.decode_end}")
    if record.response_headers_s is not None:
        said.append(f"response_headers_ms={record.response_headers_s * 1e3:.1f}")
    if record.prefill_s is not None:
        said.append(f"prefill_ms={record.prefill_s * 1e3:.1f}")
    said.append(f"duration_ms={record.duration_s * 1e3:.1f}")
    if explanation:
        said.append(f'prefill_loads="{explanation.prefill}" decode_loads="{explanation.decode}"')
    if record.reason:
        said.append(f'reason="{record.reason}"')
    return " ".join(said)


def _pick(pick: Pick) -> str:
    return f"{pick.worker.name}/{'-' if pick.dp_rank is None else pick.dp_rank}"


class _Gauges(Collector):
    """The load table and open exchanges as gauges."""

    def __init__(self, table: LoadTable, clock: Callable[[], float], open_exchanges: Callable[[], int]) -> None:
        self._table = table
        self._clock = clock
        self._open_exchanges = open_exchanges

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """All gauges, as they are now. A figure that is not known has no sample."""
        by_worker, by_rank = ["role", "worker"], ["role", "worker", "dp_rank"]
        healthy = GaugeMetricFamily("extproc_worker_healthy", "1: its health checks pass.", labels=by_worker)
        draining = GaugeMetricFamily("extproc_worker_draining", "1: gets no new requests.", labels=by_worker)
        circuit = GaugeMetricFamily("extproc_circuit_open", "0: closed, 0.5: half open, 1: open.", labels=by_worker)
        legs = GaugeMetricFamily("extproc_legs_in_flight", "Legs that have not ended.", labels=by_worker)
        age = GaugeMetricFamily("extproc_scrape_age_seconds", "Age of a rank's last figures.", labels=by_rank)
        scraped = GaugeMetricFamily("extproc_scraped_tokens", "Tokens in use, as the engine said.", labels=by_rank)
        charged = GaugeMetricFamily("extproc_charged_tokens", "Prompt tokens sent since.", labels=by_rank)
        ledger = GaugeMetricFamily("extproc_outstanding_tokens", "Tokens of legs that have not ended.", labels=by_rank)
        now_s = self._clock()
        for state in self._table.states:
            worker = [state.worker.role, state.worker.name]
            healthy.add_metric(worker, float(state.healthy))
            draining.add_metric(worker, float(state.draining))
            legs.add_metric(worker, state.in_flight)
            circuit.add_metric(worker, CIRCUIT_LEVELS[state.circuit.state])
            for rank in state.ranks:
                labels = [*worker, str(rank.dp_rank)]
                charged.add_metric(labels, rank.charged_tokens)
                ledger.add_metric(labels, rank.outstanding_tokens)
                if rank.scraped and rank.scraped.used_tokens is not None:
                    scraped.add_metric(labels, rank.scraped.used_tokens)
                if rank.scraped_at_s is not None:
                    age.add_metric(labels, now_s - rank.scraped_at_s)
        yield from (healthy, draining, circuit, legs, age, scraped, charged, ledger)
        exchanges = GaugeMetricFamily("extproc_open_exchanges", "Placed requests that have not ended.")
        exchanges.add_metric([], self._open_exchanges())
        yield exchanges
