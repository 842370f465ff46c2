"""Metrics and the log line."""

import logging

from msgspec import structs
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from extproc.events import Finished, LegEnd, Outcome
from extproc.explain import Explanation
from extproc.load import LoadTable
from extproc.model import Pick, Placement, RankLoad, Role, Worker
from extproc.telemetry import Telemetry, log_line

P = Worker("p:1", Role.PREFILL, "http://p:1", "10.0.0.1:1", "p", 8998, 2)
D = Worker("d:1", Role.DECODE, "http://d:1", "10.0.0.2:1")
RECORD = Finished(
    outcome=Outcome.OK,
    status=200,
    reason="",
    endpoint="/generate",
    request_id="abc",
    attempt=1,
    placement=Placement(Pick(P, 1), Pick(D, None), room=7),
    direct_worker=None,
    batch_size=2,
    prompt_tokens=12.5,
    duration_s=1.5,
    decision_s=0.0001,
    response_headers_s=0.25,
    prefill_s=0.2,
    prefill_end=LegEnd.OK,
    decode_end=LegEnd.OK,
)


def samples(telemetry):
    text = generate_latest(telemetry.registry).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_one_log_line():
    assert log_line(RECORD) == (
        "outcome=ok status=200 endpoint=/generate request_id=abc attempt=1 prefill=p:1/1 decode=d:1/- room=7 "
        "prompts=2 tokens=12 prefill_end=ok decode_end=ok response_headers_ms=250.0 prefill_ms=200.0 duration_ms=1500.0"
    )


def test_what_the_engine_counted_and_what_the_pick_was_made_by_are_in_the_line():
    explained = structs.replace(RECORD, counted_tokens=10, explanation=Explanation("p:1/1*=5@0.1", "d:1/0*=7@-"))
    line = log_line(explained)
    assert " tokens=12 counted=10 " in line
    assert ' prefill_loads="p:1/1*=5@0.1" decode_loads="d:1/0*=7@-"' in line


def test_errors_of_estimates():
    telemetry = Telemetry(LoadTable([], lambda: 0.0), lambda: 0.0, lambda: 0)
    for counted in (10, 25, None):
        telemetry.finished(structs.replace(RECORD, counted_tokens=counted))
    found = samples(telemetry)
    name, endpoint = "extproc_prompt_estimate_ratio", ("endpoint", "/generate")
    assert found[f"{name}_count", endpoint] == 2
    assert found[f"{name}_sum", endpoint] == 12.5 / 10 + 12.5 / 25
    assert found[f"{name}_bucket", endpoint, ("le", "0.5")] == 1


def test_metrics_of_attempts_scrapes_and_the_table(caplog):
    table = LoadTable([P, D], lambda: 0.0)
    telemetry = Telemetry(table, lambda: 10.0, lambda: 3)
    table.worker_changed(P, True)
    table.observe("p:1", [RankLoad(1, used_tokens=43034)], at_s=4.0)
    table.charge(table.states[0], 1, 100, 20)
    with caplog.at_level(logging.INFO):
        telemetry.finished(RECORD)
    assert "room=7" in caplog.text
    telemetry.finished(structs.replace(RECORD, attempt=2, outcome=Outcome.DECODE_FAILED, decode_end=LegEnd.FAILED))
    telemetry.scraped("p:1", 0.01, failed=False)
    telemetry.scraped("d:1", 5.0, failed=True)
    found = samples(telemetry)

    def value(name, **labels):
        return found.get((name, *sorted(labels.items())))

    assert value("extproc_attempts_total", endpoint="/generate", outcome="ok", status="200") == 1
    assert value("extproc_retries_total", outcome="decode_failed") == 1
    assert value("extproc_legs_ended_total", role="prefill", worker="p:1", end="ok") == 2
    assert value("extproc_legs_ended_total", role="decode", worker="d:1", end="failed") == 1
    assert value("extproc_decision_seconds_count") == 2
    assert value("extproc_prefill_leg_seconds_sum", worker="p:1") == 0.4
    assert value("extproc_response_headers_seconds_count", endpoint="/generate") == 1
    assert value("extproc_scrape_failures_total", worker="d:1") == 1
    assert value("extproc_scrape_seconds_count", worker="p:1") == 1
    rank = {"role": "prefill", "worker": "p:1", "dp_rank": "1"}
    assert value("extproc_scraped_tokens", **rank) == 43034
    assert value("extproc_charged_tokens", **rank) == 100
    assert value("extproc_outstanding_tokens", **rank) == 120
    assert value("extproc_scrape_age_seconds", **rank) == 6
    # What is not known has no sample: no made-up zero.
    assert value("extproc_scraped_tokens", **rank | {"dp_rank": "0"}) is None
    assert value("extproc_worker_healthy", role="prefill", worker="p:1") == 1
    assert value("extproc_worker_healthy", role="decode", worker="d:1") == 0
    assert value("extproc_legs_in_flight", role="prefill", worker="p:1") == 1
    assert value("extproc_open_exchanges") == 3
