"""The committed `envoy/`: the same as what is printed, and accepted by Envoy."""

import asyncio
import re
from pathlib import Path

import pytest
from update_snippets import files

from extproc.cli.main import main
from extproc.config import Config
from extproc.envoy_config import bootstrap, from_yaml, to_yaml
from extproc.envoy_config.comments import COMMENTS
from extproc.envoy_config.snippets import SNIPPETS
from extproc.envoy_process import validate

ENVOY = Path(__file__).parents[2] / "envoy"
SETTINGS = Config(port=8080)
"""The settings that `envoy.yaml` states at its top."""
ADMIN = "127.0.0.1:9901"
ATTACHED = {
    "disabled",
    "typed_per_filter_config",
    "cluster_header",
    "early_header_mutation_extensions",
    "pd_gateway",
    "llm",
}
"""What envoy.yaml has not, or not in the same words: parts for somebody else's configuration."""


def test_envoy_yaml_is_what_is_printed_for_its_settings() -> None:
    assert to_yaml(from_yaml((ENVOY / "envoy.yaml").read_text())) == to_yaml(bootstrap(SETTINGS, admin=ADMIN))


def test_snippets_and_examples_hold_what_is_printed() -> None:
    """`make snippets` writes them."""
    expected = dict(files())
    assert {path.name for path in (ENVOY / "filters").iterdir()} == {f"{snippet.name}.yaml" for snippet in SNIPPETS}
    for path, text in expected.items():
        assert path.read_text() == text, f"{path.name}: run make snippets"
        assert path.parent.name == "filters" or "# -- extproc envoy" in text


def test_snippets_say_what_envoy_yaml_says() -> None:
    said = re.sub(r"\s*\n\s*# ", " ", (ENVOY / "envoy.yaml").read_text())
    for path, words in COMMENTS.items():
        if not ATTACHED & set(path):
            assert words in said, path


def test_every_comment_has_its_place() -> None:
    text = re.sub(r"\s*\n\s*# ", " ", "".join(path.read_text() for path in (ENVOY / "filters").iterdir()))
    for words in filter(None, COMMENTS.values()):
        assert words in text


def test_snippets_are_listed_and_a_wrong_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envoy", "--list-snippets"]) == 0
    listed = capsys.readouterr().out
    for snippet in SNIPPETS:
        assert f"{snippet.name}\n" in listed
    assert main(["envoy", "--snippet", "nonsense"]) == 2
    assert "nonsense: there is none of that name, but bootstrap, clusters, listeners" in capsys.readouterr().err


def test_a_snippet_follows_settings(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prefill-timeout-secs", "7", "--access-log", "/dev/stdout", "--grpc-target", "unix:/run/x.sock"]
    assert main(["envoy", "--snippet", "listeners", *flags]) == 0
    printed = capsys.readouterr().out
    assert "max_message_timeout: 12s" in printed
    assert "path: /dev/stdout" in printed
    assert main(["envoy", "--snippet", "clusters", *flags]) == 0
    printed = capsys.readouterr().out
    assert "max_stream_duration: 12s" in printed
    assert "path: /run/x.sock" in printed
    assert main(["envoy", "--snippet", "route", "--prefix", "/llm/"]) == 0
    assert "prefix: /llm/" in capsys.readouterr().out


@pytest.mark.envoy
@pytest.mark.parametrize(
    "path", [ENVOY / "envoy.yaml", *sorted((ENVOY / "examples").iterdir())], ids=lambda path: path.stem
)
def test_envoy_accepts(path: Path) -> None:
    asyncio.run(validate(path.read_text()))


@pytest.mark.envoy
def test_envoy_accepts_a_route_in_somebodys_virtual_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envoy", "--snippet", "route"]) == 0
    _, _, route = capsys.readouterr().out.partition("\n\n")
    text = (ENVOY / "examples" / "handwritten.yaml").read_text()
    indent = " " * 24
    mark = indent + "- match: {prefix: /}\n"
    assert text.count(mark) == 1
    asyncio.run(validate(text.replace(mark, "".join(indent + line for line in route.splitlines(True)) + mark)))
