"""docs/reference.md and docs/cli.md are what the code says."""

import re
import subprocess
import sys
from pathlib import Path

from extproc.cli.main import COMMANDS
from extproc.config import Config, WorkerConfig

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def test_the_committed_pages_are_current() -> None:
    asked = [sys.executable, str(ROOT / "tools" / "docs_reference.py"), "--check"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_key_has_a_section() -> None:
    headings = re.findall(r"^### (?:worker: )?`(\w+)`$", REFERENCE, re.MULTILINE)
    assert sorted(headings) == sorted((*Config.__struct_fields__, *WorkerConfig.__struct_fields__))


def test_a_section_has_flag_type_default_and_meaning() -> None:
    _, _, section = REFERENCE.partition("### `worker_load_check_interval`\n")
    section = section.partition("\n### ")[0]
    assert "`--worker-load-check-interval SECONDS`" in section
    assert "seconds, above 0 · default `10`" in section
    assert "Time between scrapes" in section


def test_every_command_has_a_section() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## extproc (\w+)$", page, re.MULTILINE) == list(COMMANDS)
