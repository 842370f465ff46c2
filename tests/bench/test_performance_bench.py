"""The performance benchmark works: load gets through, and every figure is there. Says nothing about speed."""

import json
import shutil
from pathlib import Path

import perf_stages
import performance
import pytest
from perf_decision import decide
from perf_flame import draw, own_shares, read, without_common_root
from perf_load import BODIES, Figures, body_of
from perf_markdown import BEGIN, END, write_into
from perf_report import Results, Verdict, as_json, rows, stage_rows

NATIVE = pytest.mark.skipif(
    not (shutil.which("gcc") and shutil.which("wrk")), reason="needs gcc and wrk: apt-get install gcc libc6-dev wrk"
)


@pytest.mark.envoy
@NATIVE
def test_a_short_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SMG_PYTHON", raising=False)
    out = tmp_path / "out.json"
    words = ["--quick", "--only", "gateways", "--cells", "2KB c16,SSE c16,2KB 50/s", "--json", str(out)]
    assert performance.main(words) == 0
    written = json.loads(out.read_text())
    assert written["failed"] == 0
    seen = {(figures["cell"], figures["contender"]) for figures in written["figures"]}
    assert {("2KB c16", name) for name in ("direct", "extproc", "floor")} <= seen
    assert {(cell, "extproc") for cell in ("SSE c16", "2KB 50/s")} <= seen
    for figures in written["figures"]:
        assert figures["requests"] > 0
        assert 0 < figures["p50_us"] <= figures["p99_us"]
        if figures["contender"] != "direct":
            assert set(figures["cpu"]) == {"python", "envoy"}
            assert figures["resident_bytes"] > 0
    verdicts = {bar["about"]: bar["verdict"] for bar in written["bars"]}
    assert verdicts["all of the service's CPU over the no-op floor, 2 KB, c16"] != Verdict.UNKNOWN
    assert verdicts["req/s over smg's, 2 KB, c16"] == Verdict.UNKNOWN


def test_a_decision_has_its_parts() -> None:
    decision = decide("cache_aware", 10, "2KB", batches=1)
    assert min(decision.parse_us, decision.place_us, decision.mutate_us) > 0
    assert decision.decision_us == decision.place_us + decision.mutate_us


def test_every_step_of_a_request_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_stages, "REQUESTS", 3)
    monkeypatch.setattr(perf_stages, "WARM_UP", 1)
    results = Results({}, {}, stages=perf_stages.stages())
    assert len(results.stages) == len({stage.name for stage in results.stages}) > 10
    assert all(stage.median_us > 0 for stage in results.stages)
    assert list(stage_rows(results))[-1][0] == "together"


@pytest.mark.parametrize("name", BODIES)
def test_bodies_are_as_long_as_they_say(name: str) -> None:
    size, streams = BODIES[name]
    body = body_of(name)
    assert len(body) == size
    assert json.loads(body).get("stream", False) is streams


def test_ratios_are_taken_repeat_by_repeat_and_judged() -> None:
    results = Results({}, {})
    for ours, theirs in ((50.0, 100.0), (30.0, 100.0), (90.0, 150.0)):
        results.figures += [figures("extproc", ours), figures("smg", theirs)]
    row = next(row for row in rows(results) if row.about == "req/s over smg's, 2 KB, c16")
    assert row.values == (0.5, 0.3, 0.6)
    assert (row.measured, row.verdict) == (0.5, Verdict.HELD)
    share = next(row for row in rows(results) if row.unit == "%")
    assert share.verdict is Verdict.GOOD
    assert share.measured == pytest.approx(0.25)
    assert as_json(results)["failed"] == 0


def test_a_missed_bar_is_named() -> None:
    results = Results({}, {}, figures=[figures("extproc", 10.0), figures("smg", 100.0)])
    row = next(row for row in rows(results) if row.about == "req/s over smg's, 2 KB, c16")
    assert row.verdict is Verdict.MISSED
    assert row.words()[-1] == "MISSED"


def test_a_flame_graph_is_as_wide_as_its_samples() -> None:
    root = without_common_root(read("main (a.py:1);work (b.py:2) 3\nmain (a.py:1);work (b.py:9);deep (c.py:1) 1\n"))
    assert root.samples == 4
    assert own_shares(root)[0] == ("work (b.py)", 0.75)
    picture = draw(root, "what <it> is")
    assert "what &lt;it&gt; is" in picture
    assert "deep (c.py) 25.0%" in picture


def test_tables_replace_what_stands_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{BEGIN}\nold figures\n{END}\nafter\n")
    results = Results({"cores": 2}, {}, figures=[figures("extproc", 10.0), figures("smg", 100.0)])
    write_into(document, results)
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "old figures" not in text
    assert "| 2KB c16 | smg | 100 (100 to 100) |" in text
    assert "| ≥0.40 | ≥0.60 | 0.10 | MISSED |" in text


def test_an_unknown_name_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["--contenders", "extproc,other"]) == performance.EXIT_CANNOT_RUN
    assert "'other' is not one of direct" in capsys.readouterr().out


def figures(contender: str, requests_per_s: float) -> Figures:
    return Figures(
        contender=contender,
        cell="2KB c16",
        requests=1000,
        failed=0,
        requests_per_s=requests_per_s,
        p50_us=1.0,
        p99_us=2.0,
        cpu={"python": 0.1, "envoy": 0.3},
        engines_cpu=0.0,
        generator_cpu=0.0,
        resident_bytes=1,
        seconds=1.0,
    )
