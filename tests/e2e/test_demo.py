"""The demo as a user runs it, what it says when something is wrong, and that nothing of it is left behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import until

from extproc.demo.answer import Answer, Pick
from extproc.demo.spread import spread, use_of_ranks
from extproc.demo.stack import Stack, StackError
from extproc.demo.verify import EngineRecords, verify
from extproc.demo.workload import KINDS, make_requests
from extproc.request import Endpoint

TIMEOUT_S = 180
"""For a whole run, on a busy machine. Alone it takes about 15 s."""


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-u", "-m", "extproc.demo", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def demo():
    """Starts the demo; whatever happens, it is gone afterwards."""
    started = []

    def run(*arguments: str) -> subprocess.Popen:
        started.append(start(*arguments))
        return started[-1]

    yield run
    for process in started:
        process.terminate()  # it stops its children in order
        process.communicate(timeout=TIMEOUT_S)


def read_until(process: subprocess.Popen, pattern: str) -> list[str]:
    """The lines up to and with the first that matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"no {pattern!r} in the output:\n{''.join(lines)}")


def pids_in(lines: list[str]) -> dict[str, int]:
    """Label (`P1`, …, `gateway`) → process id, from the table of processes."""
    found = {}
    for line in lines:
        if match := re.match(r"(?:([PD]\d) |  ).*(?:engine|gateway).* http://\S+ +(\d+)\s*$", line):
            found[match[1] or "gateway"] = int(match[2])
    return found


def runs(pid: int) -> bool:
    """Whether a process lives. One that is over and waits for its parent (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.envoy
def test_a_small_run_is_right_and_readable(demo):
    process = demo("--requests", "28", "--concurrency", "8", "--time-scale", "10", "--seed", "3")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert output.count("All 28 answers are right") == 2  # with picked ranks, and without
    rows = re.findall(r"^ *\d+ (?:openai|httpx) .* [PD]\d/[01] +[PD]\d/[01] +\d+ +[\d,]+ +\d+ .*200 *$", output, re.M)
    assert len(rows) == 28
    for rank in ("P1/0", "P1/1", "P2/0", "P2/1", "D1/0", "D1/1", "D2/0", "D2/1"):
        assert re.search(rf"^{rank} +\d+ +[\d,]+", output, re.M)
    comparison = output[output.index("tokens on each rank") :]
    assert re.search(r"^mean of the workers +1\.\d{3} +1\.\d{3}", comparison, re.M)
    assert "minimum_tokens" in output
    assert "room % dp_size" in output
    assert max(map(len, output.splitlines())) <= 100
    assert "\x1b" not in output  # no colours in a pipe
    assert "…" not in output[output.index(" # request") :]  # nothing is cut off
    pids = pids_in(output.splitlines(keepends=True))
    assert len(pids) == 5
    assert not any(runs(pid) for pid in pids.values())


@pytest.mark.envoy
def test_an_engine_killed_in_the_middle_is_a_failure(demo):
    process = demo("--requests", "60", "--concurrency", "8", "--time-scale", "1")
    pids = pids_in(read_until(process, r"answered: \d+ of 60"))
    os.kill(pids["D1"], signal.SIGKILL)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    assert re.search(r"\d+ of 60 requests were not answered right", output)
    assert "engine D1 ended: SIGKILL" in output
    assert not any(runs(pid) for pid in pids.values())


@pytest.mark.envoy
def test_keep_leaves_it_running_until_ctrl_c(demo):
    process = demo("--requests", "1", "--time-scale", "10", "--keep")
    lines = read_until(process, r"Ctrl-C stops")
    pids = pids_in(lines)
    [curl] = [line for line in lines if line.startswith("curl ")]
    url = re.search(r"http://\S+?:\d+", curl)[0]
    body = re.search(r"-d '(.*)'", curl)[1]
    response = httpx.post(f"{url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert response.text.endswith("data: [DONE]\n\n")
    assert "dp_rank=" in response.headers["x-pd-prefill"]  # the gateway that picks ranks, not the one to compare with
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert not any(runs(pid) for pid in pids.values())


@pytest.mark.envoy
def test_children_do_not_survive_a_killed_demo(demo):
    process = demo("--requests", "100", "--time-scale", "1")
    lines = read_until(process, r"answered: ")
    pids = pids_in(lines)
    url = re.search(r"gateway .*(http://\S+)", "".join(lines))[1]
    process.kill()
    process.communicate()
    until(lambda: not any(runs(pid) for pid in pids.values()), "children gone")
    with pytest.raises(httpx.ConnectError):  # Envoy too
        until(lambda: httpx.get(url).status_code == 0, "Envoy gone")


def test_without_openai_it_says_what_to_install():
    code = "import sys, runpy; sys.modules['openai'] = None; runpy.run_module('extproc.demo', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install openai" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_that_does_not_start_is_shown_with_its_last_words():
    with pytest.raises(StackError, match=r"(?s)engine P1 ended before it was ready \(exit status 2\).*no-such-flag"):
        Stack(engine_flags=["--no-such-flag"]).__enter__()
    with pytest.raises(StackError, match=r"(?s)the gateway ended before it was ready.*no-such-flag"):
        Stack(prefill=1, decode=1, up_flags=["--no-such-flag"]).__enter__()


# The checks themselves: for each way to ask, a right answer, and what is said of a wrong one.


def right(request, *, picked=True):
    """A right answer to a request, and what the engines recorded."""
    count, room = len(request.prompt_tokens), 100 * request.number + 1
    ranks = [1] * count if picked else [(room + i) % 2 for i in range(count)]
    prefill, decode = ("127.0.0.1:1", "127.0.0.1:2")
    tokens = dict(enumerate(request.prompt_tokens)), dict.fromkeys(range(count), request.output_tokens)
    if request.kind.endpoint is not Endpoint.GENERATE:
        tokens = {0: sum(request.prompt_tokens)}, {0: count * request.output_tokens}
    answer = Answer(
        status=200,
        prefill=Pick(prefill, 1 if picked else None),
        decode=Pick(decode, 1 if picked else None),
        room=room,
        texts=dict.fromkeys(range(count), request.expected_text),
        finish_reasons=dict.fromkeys(range(count), "length"),
        prompt_tokens=tokens[0],
        output_tokens=tokens[1],
    )
    record = {
        "rooms": [room + i for i in range(count)],
        "ranks": ranks,
        "disagg_prefill_dp_rank": 1 if picked else None,
        "outcome": "finished",
        "status": 200,
        "error": "",
        "prompt_tokens": list(request.prompt_tokens),
        "output_tokens": [request.output_tokens] * count,
    }
    engines = [
        EngineRecords("P1", "prefill", prefill, 2, [dict(record)]),
        EngineRecords("D1", "decode", decode, 2, [dict(record)]),
    ]
    return answer, engines


def problems(request, answer, engines, *, picked=True) -> list[str]:
    [result] = verify([request], [answer], engines, ranks_picked=picked)
    return result.problems


@pytest.mark.parametrize("picked", [True, False])
@pytest.mark.parametrize("number", range(len(KINDS)))
def test_a_right_answer_has_no_problems(number, picked):
    request = make_requests(len(KINDS), seed=1)[number]
    answer, engines = right(request, picked=picked)
    assert problems(request, answer, engines, picked=picked) == []


def spoil_answer(**values):
    return lambda answer, _engines: [setattr(answer, name, value) for name, value in values.items()]


def spoil_record(engine, **values):
    return lambda _answer, engines: engines[engine].records[0].update(values)


WRONG = {
    "an error": (spoil_answer(status=503, error="no healthy prefill worker"), "503: no healthy prefill worker"),
    "no answer": (spoil_answer(status=None, error="ReadError"), "no answer: ReadError"),
    "a broken stream": (spoil_answer(error="the stream ended"), "the stream ended"),
    "another text": (spoil_answer(texts={0: "tok0 tok2"}), "wrong text for prompt 0"),
    "no text": (spoil_answer(texts={}), "0 texts for 1 prompts"),
    "cut short": (spoil_answer(finish_reasons={0: "abort"}), "finish reason 'abort'"),
    "prompt tokens": (spoil_answer(prompt_tokens={0: 1}), "prompt tokens {0: 1}"),
    "output tokens": (spoil_answer(output_tokens={}), "output tokens {}"),
    "no room": (spoil_answer(room=None), "no x-pd-room header"),
    "another room": (spoil_answer(room=7), "0 prefill engines recorded room 7"),
    "no prefill named": (spoil_answer(prefill=None), "no readable x-pd-prefill header"),
    "another worker named": (spoil_answer(decode=Pick("127.0.0.1:9", 1)), "the header says 127.0.0.1:9"),
    "no rank named": (spoil_answer(prefill=Pick("127.0.0.1:1", None)), "prefill rank in the header: None"),
    "prefill on another rank": (spoil_record(0, ranks=[0]), "prefill ran on ranks [0], expected [1]"),
    "decode on another rank": (spoil_record(1, ranks=[0]), "decode ran on ranks [0], expected [1]"),
    "decode told another rank": (spoil_record(1, disagg_prefill_dp_rank=0), "decode was told prefill rank 0"),
    "a failed leg": (spoil_record(0, outcome="failed", status=500), "prefill leg failed with status 500"),
    "another prompt": (spoil_record(0, prompt_tokens=[3]), "prefill has prompt tokens [3]"),
    "too few made": (spoil_record(1, output_tokens=[3]), "decode made tokens [3]"),
    "rooms": (spoil_record(1, rooms=[101, 102]), "decode has rooms [101, 102]"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what):
    spoil, expected = WRONG[what]
    request = next(request for request in make_requests(len(KINDS), seed=1) if len(request.prompt_tokens) == 1)
    answer, engines = right(request)
    if what == "rooms":
        answer.room = 101
        for engine in engines:
            engine.records[0]["rooms"] = [101]
    spoil(answer, engines)
    assert any(expected in problem for problem in problems(request, answer, engines))


def test_a_room_used_twice_is_found():
    requests = make_requests(2, seed=1)
    answers, engines = zip(*(right(request) for request in requests), strict=True)
    answers[1].room = answers[0].room
    results = verify(requests, answers, engines[0], ranks_picked=True)
    assert any("was used twice" in problem for problem in results[1].problems)


def test_requests_are_the_same_for_the_same_seed_only():
    assert make_requests(50, seed=4) == make_requests(50, seed=4)
    assert make_requests(50, seed=4) != make_requests(50, seed=5)
    assert {request.kind for request in make_requests(len(KINDS), seed=1)} == set(KINDS)


def test_use_and_spread_of_ranks():
    record = {"ranks": [0, 1, 1], "prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]}
    uses = use_of_ranks([EngineRecords("D1", "decode", "", 2, [record])])
    assert [(use.requests, use.prompt_tokens, use.output_tokens, use.tokens) for use in uses] == [
        (1, 10, 1, 11),
        (1, 50, 5, 55),
    ]
    assert spread([use.tokens for use in uses]) == pytest.approx(55 / 33)
    assert spread([5, 5, 5]) == 1
    assert spread([9, 0, 0]) == 3
    assert spread([0, 0]) is None
