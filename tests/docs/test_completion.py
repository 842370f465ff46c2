"""`extproc completion`, as shells use it; and what the command line imports to answer quickly."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from extproc.cli.completion import SHELLS
from extproc.cli.main import COMMANDS
from extproc.cli.main import main as command_line
from extproc.policy import WORKER_POLICIES

ASK_BASH = """
source "$1"; shift
function=$(complete -p extproc | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*"
COMP_POINT=${#COMP_LINE}
"$function" extproc "${@: -1}" "${@: -2:1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""

HEAVY = ("grpc", "aiohttp", "httpx", "uvloop", "rich", "msgspec", "yaml", "prometheus_client", "google.protobuf")


@pytest.fixture
def bash_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert command_line(["completion", "bash"]) == 0
    path = tmp_path / "extproc.bash"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    return path


def completed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers behind `extproc WORDS`, for the last of them."""
    done = subprocess.run(
        ["bash", "-c", ASK_BASH, "ask", str(script), "extproc", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=cwd,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
class TestBash:
    def test_commands(self, bash_script: Path) -> None:
        assert completed(bash_script, "") == list(COMMANDS)
        assert completed(bash_script, "se") == ["serve"]

    def test_flags_of_the_command(self, bash_script: Path) -> None:
        assert completed(bash_script, "up", "--envoy") == [
            *("--envoy-tls-ca", "--envoy-tls-cert", "--envoy-tls-key", "--envoy-tls-server-name"),
            *("--envoy-max-heap-bytes", "--envoy", "--envoy-concurrency"),
        ]
        assert completed(bash_script, "drain", "--po") == []

    def test_choices(self, bash_script: Path) -> None:
        assert completed(bash_script, "serve", "--policy", "") == list(WORKER_POLICIES)
        assert completed(bash_script, "completion", "") == list(SHELLS)

    def test_a_flag_behind_one_with_several_values(self, bash_script: Path) -> None:
        assert "--decode" in completed(bash_script, "up", "--prefill", "http://h:1", "8998", "--dec")

    def test_files_and_folders(self, bash_script: Path, tmp_path: Path) -> None:
        (tmp_path / "wanted.yaml").touch()
        (tmp_path / "wanted.d").mkdir()
        assert set(completed(bash_script, "up", "--config", "wan", cwd=tmp_path)) == {"wanted.yaml", "wanted.d"}
        assert completed(bash_script, "envoy", "--secrets", "wan", cwd=tmp_path) == ["wanted.d"]


@pytest.mark.parametrize(("shell", "flags"), [("zsh", ["-n"]), ("fish", ["--no-execute"])])
def test_others_can_read_their_script(
    shell: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "dp-minimum-tokens-scheduler" in script
    if not shutil.which(shell):
        pytest.skip(f"needs {shell}")
    path = tmp_path / "script"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run([shell, *flags, str(path)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["no-such-command"]])
def test_a_look_at_the_command_line_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom extproc.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit:\n    pass\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
