"""`/metrics` and `/v1/loads` against what the real engine's own code wrote."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sim_pair import PATIENCE_S

from extproc.sim import Engine, EngineConfig, Role

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden (real engine output)")
MODEL = "deepseek-ai/DeepSeek-R1"
CASES = [
    ("sglang-0.5.23-metrics-decode-dp1.prom", Role.DECODE, 1),
    ("sglang-0.5.23-metrics-decode-dp2.prom", Role.DECODE, 2),
    ("sglang-0.5.23-metrics-prefill-dp2.prom", Role.PREFILL, 2),
]
MUST_HAVE = {
    "num_used_tokens",
    "num_running_reqs",
    "num_queue_reqs",
    "token_usage",
    "kv_available_tokens",
    "kv_evictable_tokens",
    "gen_throughput",
    "num_prefill_bootstrap_queue_reqs",
    "num_prefill_inflight_queue_reqs",
    "num_decode_prealloc_queue_reqs",
    "num_decode_transfer_queue_reqs",
}


def get(role: Role, dp_size: int, *paths: str) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        config = EngineConfig(role=role, dp_size=dp_size, model=MODEL)
        async with Engine(config) as engine, httpx.AsyncClient(timeout=PATIENCE_S) as http:
            return [await http.get(engine.url + path) for path in paths]

    return asyncio.run(run())


def samples(text: str) -> dict[str, set[tuple[tuple[str, str], ...]]]:
    """Each sample name with its label sets, process ids left out of the comparison."""
    found: dict[str, set[tuple[tuple[str, str], ...]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: "any" if name == "pid" else value for name, value in sample.labels.items()}
            found.setdefault(sample.name, set()).add(tuple(sorted(labels.items())))
    return found


@golden
@pytest.mark.parametrize(("name", "role", "dp_size"), CASES)
def test_metrics_have_the_real_names_labels_and_types(name: str, role: Role, dp_size: int) -> None:
    [response] = get(role, dp_size, "/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    golden_text = (GOLDEN / name).read_text()
    ours, real = samples(response.text), samples(golden_text)
    assert {f"sglang:{name}" for name in MUST_HAVE} <= ours.keys()
    assert ours == {name: real[name] for name in ours}
    types = {line for line in response.text.splitlines() if line.startswith("# TYPE")}
    assert types <= set(golden_text.splitlines())


@golden
def test_label_order_is_the_real_one() -> None:
    [response] = get(Role.DECODE, 2, "/metrics")
    ours = {line.rsplit(" ", 1)[0] for line in response.text.splitlines() if line.startswith("sglang:num_used_tokens")}
    text = (GOLDEN / "sglang-0.5.23-metrics-decode-dp2.prom").read_text()
    real = {line.rsplit(" ", 1)[0] for line in text.splitlines() if line.startswith("sglang:num_used_tokens")}
    assert ours == real
    assert len(real) == 2


def shape(value: Any) -> Any:
    """A JSON value with its leaves replaced by their types; whole floats and integers are the same in JSON."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items() if name != "decode_moments"}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


@golden
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_loads_have_the_real_shape(role: Role) -> None:
    plain, prometheus = get(role, 2, "/v1/loads", "/v1/loads?format=prometheus")
    real = json.loads((GOLDEN / f"sglang-0.5.23-v1-loads-{role.value}-dp2.json").read_text())
    assert shape(plain.json()) == shape(real)
    assert [load["dp_rank"] for load in plain.json()["loads"]] == [0, 1]
    assert {load["disaggregation"]["mode"] for load in plain.json()["loads"]} == {role.value}
    text = (GOLDEN / f"sglang-0.5.23-v1-loads-{role.value}-dp2.prom").read_text()
    assert samples(prometheus.text) == samples(text)
    assert [line for line in prometheus.text.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]


def test_loads_can_be_asked_for_in_part() -> None:
    core, one = get(Role.PREFILL, 2, "/v1/loads?include=core", "/v1/loads?dp_rank=1&include=core,queues")
    assert all("memory" not in load and "queues" not in load for load in core.json()["loads"])
    assert [load["dp_rank"] for load in one.json()["loads"]] == [1]
    assert "queues" in one.json()["loads"][0]


def test_figures_agree_across_the_three_pages() -> None:
    """One engine, one request held in the cache: used tokens are the same wherever one reads them."""

    async def run() -> None:
        config = EngineConfig(role=Role.NULL, dp_size=2, model=MODEL, time_scale=1000.0, chat_output_tokens=64)
        async with Engine(config) as engine, httpx.AsyncClient(timeout=PATIENCE_S) as http:
            body = {"messages": [{"role": "user", "content": "x" * 4000}], "max_tokens": 4}
            assert (await http.post(engine.url + "/v1/chat/completions", json=body)).status_code == 200
            metrics = (await http.get(engine.url + "/metrics")).text
            used = {
                sample.labels["dp_rank"]: sample.value
                for family in text_string_to_metric_families(metrics)
                for sample in family.samples
                if sample.name == "sglang:num_used_tokens"
            }
            # The gauges were last written at the end of the prefill batch, with the prompt and its first token.
            assert used in ({"0": 1001.0, "1": 0.0}, {"0": 0.0, "1": 0.0})
            loads = (await http.get(engine.url + "/v1/loads")).json()["loads"]
            assert [load["total_prefill_uncached_tokens"] for load in loads] == [1000, 0]
            assert loads[0]["total_prefill_busy_us"] == math.floor(config.gpu.prefill_s(1000) / 1000 * 1e6 + 0.5)
            assert loads[0]["timestamp"] > 1.6e9

    asyncio.run(run())
