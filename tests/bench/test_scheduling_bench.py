"""The scheduling benchmark works: every request is answered and every figure is there. Says nothing about speed."""

import json
from pathlib import Path

import pytest
import scheduling
from bench_report import Results, as_json
from bench_run import RunFigures
from bench_workload import BYTES_PER_TOKEN, Plan, shots

from extproc.lab.settings import Shape
from extproc.lab.stats import Latency

PLAN = Plan(Shape(1, 2), Shape(1, 2), 30, time_scale=10.0, utilization=0.7, output_ratio=0.5, trace=None)


@pytest.mark.envoy
def test_a_short_run_answers_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMG_PYTHON", raising=False)
    out = tmp_path / "out.json"
    assert scheduling.main(["--quick", "--contenders", "live,room", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["settings"]["repeats"] == 1
    assert list(written["contenders"]) == ["live", "room"]
    for name, named in (("live", 1.0), ("room", 0.0)):
        figures = written["contenders"][name]
        assert figures["failures"] == 0
        assert 0 < figures["ttft_s"]["p50"] <= figures["ttft_s"]["p99"]
        assert figures["tpot_s"]["mean"] > 0
        [run] = figures["runs"]
        assert run["explicit_ranks"] == named
        assert len(run["prefill_tokens"]) == len(run["decode_tokens"]) == 2
        assert sum(run["prefill_tokens"]) > 0
        assert run["outside_s"]["mean"] > 0
        assert figures["ttft_predicted_s"][0]["mean"] > 0
    assert written["contenders"]["live"]["ttft_over"]["room"]["mean"][0] > 0


def test_every_prompt_has_its_number_and_the_right_length() -> None:
    arrivals = PLAN.arrivals(seed=1)
    made = shots(arrivals, PLAN.time_scale, seed=1)
    assert [shot.at_s for shot in made] == sorted(shot.at_s for shot in made)
    for number, (shot, request) in enumerate(zip(made, arrivals, strict=True)):
        prompt = json.loads(shot.body)["prompt"]
        assert prompt.startswith(f"#{number:05d} "[: len(prompt)])
        assert len(prompt) == BYTES_PER_TOKEN * request.prompt_tokens


def test_ratios_are_taken_seed_by_seed() -> None:
    results = Results(
        PLAN,
        runs={"live": [figures("live", 1, 0.5), figures("live", 2, 3.0)], "room": [figures("room", 1, 1.0)] * 2},
        predicted={"live": [Latency(0.4, 0.4, 0.4), Latency(2.0, 2.0, 2.0)]},
    )
    written = as_json(results)["contenders"]["live"]
    assert written["ttft_over"]["room"]["mean"] == [0.5, 3.0]
    assert written["ttft_s"]["mean"] == 1.75
    assert results.over_prediction("live") == pytest.approx(1.375)
    assert results.failures == 0


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert scheduling.main(["--contenders", "live,other"]) == scheduling.EXIT_CANNOT_RUN
    assert "'other' is not one of live" in capsys.readouterr().out


def figures(contender: str, seed: int, ttft_s: float) -> RunFigures:
    latency = Latency(ttft_s, ttft_s, ttft_s)
    return RunFigures(
        contender=contender,
        seed=seed,
        ttft_s=latency,
        tpot_s=latency,
        failures=0,
        errors=(),
        prefill_tokens=(1, 3),
        decode_tokens=(2, 2),
        explicit_ranks=1.0,
        outside_s=latency,
        late_p99_s=0.0,
        cpu_idle=None,
        gateway_cpu_s=None,
        client_cpu_s=None,
        seconds=1.0,
    )
