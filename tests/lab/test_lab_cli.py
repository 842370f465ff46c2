"""`extproc lab` as a person or a script calls it."""

import argparse
import json
import sys

import pytest

from extproc.errors import ConfigError
from extproc.lab import cli, plot
from extproc.lab.traces import read_trace
from extproc.load_model import LOAD_MODELS

POLICIES = ",".join(["round_robin", "scraped", *(["live"] if "live" in LOAD_MODELS else []), "clairvoyant"])
MOONCAKE = [
    f'{{"timestamp": {number // 12 * 3000}, "input_length": {700 + 997 * number % 23_000}, '
    f'"output_length": {1 + 31 * number % 700}, "hash_ids": [0, {number}]}}'
    for number in range(600)
]


def run(*flags):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(flag) for flag in flags]))


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(MOONCAKE) + "\n")
    return path


def test_the_example(trace, tmp_path, capsys):
    out = tmp_path / "out.json"
    status = run(
        *("--trace", trace, "--requests", 300, "--prefill", "1x2", "--decode", "1x2", "--utilization", 0.7),
        *("--policies", POLICIES, "--seeds", 5, "--json", out),
    )
    assert status == 0
    shown = capsys.readouterr().out
    assert "against round_robin" in shown
    assert "93.8%" in shown
    found = json.loads(out.read_text())
    assert list(found["policies"]) == POLICIES.split(",")
    for figures in found["policies"].values():
        for name in ("ttft_s", "tpot_s"):
            assert set(figures[name]) == {"mean", "p50", "p99"}
            assert 0 < figures[name]["p50"] <= figures[name]["p99"]
        assert 1 <= figures["imbalance"] <= 2
        assert len(figures["per_seed"]) == 5
    against = found["policies"]["clairvoyant"]["against"]
    assert set(against) == {"round_robin", "scraped"}
    assert against["round_robin"]["ttft_mean"]["median"] < 0
    assert found["settings"]["prefill"] == "1x2"
    assert found["settings"]["load"]["utilization"] == 0.7


def test_json_on_standard_output_is_the_same_every_time(trace, capsys):
    flags = ("--trace", trace, "--requests", 100, "--policies", "scraped", "--json", "-", "--time-scale", 2)
    run(*flags)
    first = capsys.readouterr().out
    run(*flags, "--quiet")
    assert capsys.readouterr().out == first
    assert json.loads(first)["policies"]["scraped"]["ttft_s"]["mean"] > 0


def test_synthetic_load_with_everything_switched_on(capsys):
    status = run(
        *("--synthetic", "--requests", 200, "--prefill", "2x2", "--decode", "1x4", "--dp-attention", "--prefix-cache"),
        *("--prefill-attention", "--exact-tokens", "--replicas", 2, "--scrape-failures", 0.5),
        *("--scrape-page", "metrics", "--scrape-interval", 5, "--policies", "random+minimum_tokens+scraped"),
        *("--utilization", 0.5, "--utilization-of", "decode"),
    )
    assert status == 0
    assert "2 replicas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", ":601: JSON is malformed"),
        ('{"timestamp": 1, "input_length": 5}', ":601: .*output_length"),
        ('{"timestamp": 1e9, "input_length": 0, "output_length": 3}', ":601: expected at least 1 input token"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 3}', ":601: the timestamp is before"),
    ],
)
def test_a_bad_line_is_named_with_its_number(trace, line, message):
    trace.write_text(trace.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=message):
        run("--trace", trace)


def test_csv(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("timestamp,input_tokens,output_tokens\n10.5,100,7\n12,200,0\n")
    first, second = read_trace(path)
    assert (first.arrival_s, first.prompt_tokens, first.output_tokens) == (0.0, 100, 7)
    assert (second.arrival_s, second.output_tokens) == (1.5, 1)
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.680590,374,44\n")
    assert read_trace(path)[0].prompt_tokens == 374
    path.write_text("time,input_tokens,output_tokens\n1,100,7\n2,many,7\n")
    with pytest.raises(ConfigError, match=r"trace.csv:3: .*many"):
        read_trace(path)
    path.write_text("time,tokens\n1,100\n")
    with pytest.raises(ConfigError, match="no column for prompt_tokens"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_trace_without_requests(trace, content):
    trace.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trace\.jsonl"):
        run("--trace", trace)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prefill", "8"), "expected WORKERSxRANKS"),
        (("--policies", "best"), "'best' is not one of"),
        (("--policies", "scraped,scraped"), "named twice"),
        (("--policies", ","), "at least one"),
        (("--json", "/nowhere/out.json", "--policies", "random", "--requests", "20"), "No such file"),
        (("--trace", "/nowhere/trace.jsonl"), "No such file"),
    ],
)
def test_what_flags_cannot_mean(flags, message):
    with pytest.raises(ConfigError, match=message):
        run(*flags)


@pytest.mark.parametrize(
    "flags",
    [("--seeds", "0"), ("--utilization", "-1"), ("--scrape-failures", "2"), ("--scrape-interval", "x")],
)
def test_wrong_values(flags, capsys):
    with pytest.raises(SystemExit):
        run(*flags)
    assert "expected a" in capsys.readouterr().err


def test_plot(trace, tmp_path):
    pytest.importorskip("matplotlib")
    run("--trace", trace, "--requests", 200, "--policies", "round_robin,clairvoyant", "--plot", tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"extproc\[lab\]"):
        run("--plot", "out.png")


def test_a_line_over_time():
    assert plot.sampled([(1.0, 2_000), (3.0, 5_000)], [0.5, 1.0, 2.9, 3.0]) == [0.0, 2.0, 2.0, 5.0]
