"""The dashboard shows what the service really exports: its queries against a live /metrics page and in Prometheus."""

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from extproc.demo.stack import Stack, free_port

COMPOSE = Path(__file__).parents[2] / "compose"
DASHBOARD = json.loads((COMPOSE / "grafana/dashboards/extproc.json").read_text())
PANELS = DASHBOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
INTERVAL = "1m"
"""What Grafana would put for `$__rate_interval`."""
FAILURES_ONLY = {"Legs by how they ended", "Scrapes that gave no loads"}
"""Panels that are empty while all is well."""
MORE_LABELS = {"job", "instance"}
"""Which Prometheus adds to every sample."""
WAIT_S = 60.0
REQUESTS = 8


def until(condition, what: str):
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.05)
    return value


def parsed(query: str) -> promql_parser.Expr:
    return promql_parser.parse(query.replace("$__rate_interval", INTERVAL))


def used_by(query: str) -> tuple[list[promql_parser.VectorSelector], set[str]]:
    """The series that a query selects, and the labels that it groups by."""
    selectors, labels = [], set()

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            selectors.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            selectors.append(node.vector_selector)
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier:
            labels.update(node.modifier.labels)

    promql_parser.walk(parsed(query), visit)
    return selectors, labels


@pytest.fixture(scope="module")
def gateway():
    """A real gateway that has served some requests, one of them a bad one."""
    with Stack(prefill=2, decode=2, dp_size=2, engine_flags=["--time-scale", "20"]) as stack:
        send(stack)
        # The end of a prefill leg may be told after its answer.
        until(lambda: metric(stack, "extproc_prefill_leg_seconds_count") >= REQUESTS, "all are counted")
        yield stack


def metric(stack: Stack, name: str) -> float:
    families = text_string_to_metric_families(httpx.get(stack.status_url + "/metrics").text)
    return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def send(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=60) as client:
        for number in range(REQUESTS):
            body = {"text": "hello " * (1 + 50 * number), "sampling_params": {"max_new_tokens": 4}}
            assert client.post("/generate", json=body).status_code == 200
        assert client.post("/generate", content=b"{").status_code == 400


@pytest.mark.envoy
@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_a_query_uses_metrics_and_labels_that_there_are(gateway, title, query):
    names, labels = set(), {}
    for family in text_string_to_metric_families(httpx.get(gateway.status_url + "/metrics").text):
        # A counter's family is there before its first sample.
        names |= {family.name + "_total"} if family.type == "counter" else {family.name}
        for sample in family.samples:
            names.add(sample.name)
            labels.setdefault(sample.name, set()).update(sample.labels)
    selectors, grouped = used_by(query)
    assert selectors
    for selector in selectors:
        assert selector.name in names
        wanted = grouped | {matcher.name for matcher in selector.matchers.matchers}
        if selector.name in labels:
            assert wanted <= labels[selector.name] | MORE_LABELS
        else:
            assert title in FAILURES_ONLY | {"Outcomes"}, f"{selector.name} has no sample"


def test_legends_name_labels_that_the_query_keeps():
    for panel in PANELS:
        for target in panel["targets"]:
            named = {part.split("}}")[0].strip() for part in target["legendFormat"].split("{{")[1:]}
            node = parsed(target["expr"])
            if isinstance(node, promql_parser.AggregateExpr):
                assert named <= set(node.modifier.labels if node.modifier else ()), panel["title"]


def test_panels_have_their_place_and_the_provisioned_datasource():
    [datasource] = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = set()
    for panel in PANELS:
        assert panel["datasource"] == {"type": datasource["type"], "uid": datasource["uid"]}
        place = panel["gridPos"]
        covered = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert all(0 <= x < 24 for x, _ in covered)
        assert not cells & covered, f"{panel['title']} overlaps another panel"
        cells |= covered
    refs = [[target["refId"] for target in panel["targets"]] for panel in PANELS]
    assert all(len(set(ids)) == len(ids) for ids in refs)


def test_grafana_finds_what_is_provisioned():
    services = yaml.safe_load((COMPOSE / "docker-compose.yaml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    [provider] = yaml.safe_load((COMPOSE / "grafana/provisioning/dashboards/extproc.yaml").read_text())["providers"]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (COMPOSE / "grafana/dashboards" / Path(home).relative_to(provider["options"]["path"])).is_file()
    [datasource] = yaml.safe_load((COMPOSE / "grafana/provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    host, _, port = datasource["url"].removeprefix("http://").partition(":")
    assert services[host]["ports"][0].endswith(f":{port}")


@pytest.fixture
def prometheus(gateway, tmp_path):
    """A Prometheus with compose/prometheus.yml, in which only the target is another; its URL."""
    binary = shutil.which("prometheus")
    if not binary:
        pytest.skip("no `prometheus` on this machine (Debian: apt install prometheus)")
    config = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["extproc:29000"]}]
    job["static_configs"] = [{"targets": [gateway.status_url.removeprefix("http://")]}]
    config["global"]["scrape_interval"] = "1s"
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [binary, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            url = f"http://{address}"
            until(lambda: ready(url, process, tmp_path / "log"), "Prometheus is ready")
            yield url
        finally:
            process.terminate()
            process.wait(WAIT_S)


def ready(url: str, process: subprocess.Popen, log: Path) -> bool:
    assert process.poll() is None, log.read_text()[-2000:]
    try:
        return httpx.get(url + "/-/ready").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.envoy
def test_prometheus_answers_every_query_of_the_dashboard(gateway, prometheus):
    def ask(query: str) -> list:
        answer = httpx.get(prometheus + "/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    over = threading.Event()

    def traffic():
        while not over.is_set():
            send(gateway)

    sender = threading.Thread(target=traffic)
    sender.start()
    try:
        until(lambda: ask("up") and ask("up")[0]["value"][1] == "1", "the service is scraped")
        # A rate needs two scrapes with the series in them; imbalance a moment with a request in flight at one of them.
        for title, query in QUERIES:
            if title in FAILURES_ONLY or "extproc_retries" in query:
                ask(query.replace("$__rate_interval", INTERVAL))
            else:
                until(lambda query=query: known(ask(query.replace("$__rate_interval", INTERVAL))), query)
        assert {series["metric"]["outcome"] for series in ask("sum by (outcome) (extproc_attempts_total)")} > {"ok"}
    finally:
        over.set()
        sender.join(WAIT_S)


def known(result: list) -> list:
    """Its series without those that are NaN: a quantile of nothing, as of an endpoint that was asked once."""
    return [series for series in result if series["value"][1] != "NaN"]


def test_prometheus_accepts_the_configuration():
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("no `promtool` on this machine (Debian: apt install prometheus)")
    done = subprocess.run(
        [promtool, "check", "config", str(COMPOSE / "prometheus.yml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
