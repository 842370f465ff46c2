"""Writes docs/reference.md (every key of the configuration) and docs/cli.md (every command) from the code.

    python tools/docs_reference.py            # write them
    python tools/docs_reference.py --check    # exit status 1 if they are not what would be written

Types and defaults are msgspec's, flags argparse's, meanings the flags' help and the docstrings in extproc/config.py.
"""

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import inspect as types

from extproc.cli.main import COMMANDS, make_parser
from extproc.config import Config, WorkerConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTE = "\n<!-- Written by tools/docs_reference.py (make docs-reference): do not edit. -->\n"
CONFIGURED = ("up", "serve", "envoy", "check")
"""The commands that take the whole configuration."""
ONLY_IN_THE_FILE = "only in the file"
WORKERS = "workers"
ESCAPED_BAR = r"\|"
"""A bar would end a cell of a table."""
URL_OF_DOCS = re.compile(r"docs/([\w-]+\.md)")

REFERENCE_HEAD = """# Configuration reference

Every key of the YAML file; [configuration](configuration.md) has an example and the limits. A flag is the key with
dashes and beats the file; `extproc up`, `serve`, `envoy` and `check` take all of them. An unknown key, or a value of
the wrong type, is refused before anything starts, with the key's name. Default *none*: not set.
"""

CLI_HEAD = """# Command line

`extproc COMMAND --help` prints the same. `up`, `serve`, `envoy` and `check` take `--config FILE` and, as flags, the
keys of the [configuration](reference.md); below are the flags that are no keys. Shells
[complete](install.md#shell-completion) all of them.

Exit status: 0 done, or stopped by SIGTERM or SIGINT; 1 it could not be done (a worker has a problem, Envoy did not
start); 2 a wrong flag or configuration; 130 interrupted.
"""


@dataclass(frozen=True)
class Key:
    """One key of the configuration, ready to print."""

    name: str
    flags: str
    kind: str
    default: str
    meaning: str


def main() -> int:
    """Exit status: 1 with `--check` where a file is not current."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args().check
    stale = 0
    for path, text in ((DOCS / "reference.md", reference()), (DOCS / "cli.md", command_line())):
        if not only_check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.stderr.write(f"docs/{path.name} is not what the code says: make docs-reference\n")
            stale = 1
    return stale


def reference() -> str:
    """docs/reference.md."""
    flags = {action.dest: action for action in _actions("serve")}
    titles = {action.dest: title for title, actions in _groups("serve") for action in actions}
    keys = list(_keys(Config, flags))
    sections = dict.fromkeys([*titles.values(), ONLY_IN_THE_FILE])
    parts = [REFERENCE_HEAD + NOTE]
    for title in sections:
        members = [key for key in keys if titles.get(key.name, ONLY_IN_THE_FILE) == title]
        if members:
            parts.append(f"## {title[0].upper()}{title[1:]}\n")
            parts += [_section(key) for key in members]
            if title == WORKERS:
                parts.append(f"## Keys of a worker\n\nOf each entry of `prefill` and `decode`. {_doc(WorkerConfig)}\n")
                parts += [_section(key, prefix="worker: ") for key in _keys(WorkerConfig, {})]
    return "\n".join(parts)


def _section(key: Key, prefix: str = "") -> str:
    meaning = f"\n{key.meaning}\n" if key.meaning else ""
    facts = " · ".join(filter(None, (key.flags, key.kind, key.default)))
    return f"### {prefix}`{key.name}`\n\n{facts}\n{meaning}"


def _keys(struct: type[msgspec.Struct], flags: dict[str, argparse.Action]) -> Iterator[Key]:
    said = _docstrings(struct)
    for field in types.type_info(struct).fields:
        action = flags.get(field.name)
        help_text = _sentence(re.sub(r" \(default: [^)]*\)$", "", action.help or "")) if action else ""
        choices = list(action.choices) if action and action.choices else None
        default = "required" if field.required else f"default {_default(field.default)}"
        meaning = _together(help_text, said.get(field.name, ""))
        yield Key(field.name, _spellings(action), _kind(field.name, field.type, choices), default, meaning)


def _together(help_text: str, docstring: str) -> str:
    """Both, but the docstring alone where it says all that the help says: it is the longer one then."""
    words = set(re.findall(r"\w+", help_text.lower()))
    if docstring and len(words - set(re.findall(r"\w+", docstring.lower()))) <= SAME * len(words):
        return docstring
    return f"{help_text} {docstring}".strip()


def _spellings(action: argparse.Action | None) -> str:
    if action is None:
        return ""
    words = [f"{option}{_operands(action)}" for option in action.option_strings if not option.startswith("--no-")]
    words += [option for option in action.option_strings if option.startswith("--no-")]
    return ", ".join(f"`{word}`" for word in words)


def _operands(action: argparse.Action) -> str:
    """What stands behind a flag, as usage has it; choices are listed elsewhere."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) or action.choices:
        return ""
    if isinstance(action.metavar, tuple):
        return " {} [{}]".format(*action.metavar)
    return f" {action.metavar}" if action.metavar else " TEXT" if action.type in {str, None} else " N"


SAME = 0.3
"""A help text of which at most this share of words is not in the docstring repeats it."""

UNITS = {"_secs": "seconds", "_interval": "seconds", "_timeout": "seconds", "_bytes": "bytes", "_size": "bytes"}


def _kind(name: str, kind: types.Type, choices: list[str] | None) -> str:
    if isinstance(kind, types.UnionType):
        kind = next(part for part in kind.types if not isinstance(part, types.NoneType))
    if choices:
        return "one of " + ", ".join(f"`{choice}`" for choice in choices)
    if isinstance(kind, types.LiteralType):
        return "one of " + ", ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, types.BoolType):
        return "yes or no"
    if isinstance(kind, types.StrType):
        return "text"
    if isinstance(kind, types.VarTupleType):
        return "list of workers" if isinstance(kind.item_type, types.StructType) else "list of texts"
    if not isinstance(kind, types.IntType | types.FloatType):
        raise TypeError(f"{name}: a key of a type that this script does not know: {kind}")
    unit = next((unit for suffix, unit in UNITS.items() if name.endswith(suffix) and name != "dp_size"), "")
    what = unit or ("whole number" if isinstance(kind, types.IntType) else "number")
    if kind.ge is not None and kind.le is not None:
        return f"{what}, {kind.ge:g} to {kind.le:g}"
    if kind.ge is not None:
        return f"{what}, at least {kind.ge:g}"
    return f"{what}, above {kind.gt:g}" if kind.gt is not None else what


def _default(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value) if value else "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _docstrings(struct: type) -> dict[str, str]:
    """The texts below the fields, each for the related ones directly above it."""
    source = inspect.getsource(struct)
    lines = source.splitlines()
    found: dict[str, str] = {}
    waiting: list[str] = []
    (definition,) = ast.parse(source).body
    for node in definition.body:
        if isinstance(node, ast.AnnAssign):
            name = node.target.id
            if waiting and (not lines[node.lineno - 2].strip() or not _related(name, waiting[-1])):
                waiting = []
            waiting.append(name)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= dict.fromkeys(waiting, _readable(node.value.value))
            waiting = []
        else:
            waiting = []
    return found


def _related(one: str, other: str) -> bool:
    """Whether two keys are for the same thing: `grpc_tls_cert` and `_key`, `prefill_rank_policy` and `decode_…`."""
    pairs = ((one.rpartition("_")[0], other.rpartition("_")[0]), (one.partition("_")[2], other.partition("_")[2]))
    return any(left == right != "" for left, right in pairs)


def _doc(struct: type) -> str:
    return _readable((struct.__doc__ or "").partition("\n\n")[0])


def _readable(text: str) -> str:
    """A docstring as Markdown: one paragraph, and links to pages by their name."""
    text = " ".join(inspect.cleandoc(text).split())
    text = text.replace("`Config.", "`").replace("`policy/`", "`extproc/policy/`")
    return URL_OF_DOCS.sub(lambda match: f"[{match[1].removesuffix('.md')}]({match[1]})", text)


def _sentence(text: str) -> str:
    text = URL_OF_DOCS.sub(lambda match: f"[{match[1].removesuffix('.md')}]({match[1]})", " ".join(text.split()))
    name_first = re.match(r"\w+(_\w+|:)", text)  # a policy, say: not to be written with a capital
    return f"{text if name_first else text[:1].upper() + text[1:]}.".replace("..", ".") if text else ""


def command_line() -> str:
    """docs/cli.md."""
    parts = [CLI_HEAD + NOTE]
    for name, command in COMMANDS.items():
        keys = Config.__struct_fields__ if name in CONFIGURED else ()
        own = [action for action in _actions(name) if action.dest not in {*keys, "help"}]
        summary = f"{command.summary[0].upper()}{command.summary[1:]}."
        parts.append(f"## extproc {name}\n\n{summary}\n")
        if name in CONFIGURED:
            parts.append("Takes the [configuration](reference.md), as a file and as flags.\n")
        rows = [f"| {_row(action)} |" for action in own if action.help != argparse.SUPPRESS]
        if rows:
            parts.append("| | |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(action: argparse.Action) -> str:
    flags = _spellings(action) if action.option_strings else f"`{action.metavar or action.dest.upper()}`"
    text = " ".join(((action.help or "") % {**vars(action), "prog": "extproc"}).split())
    if action.choices:
        text = f"{', '.join(f'`{choice}`' for choice in action.choices)}. {text}"
    return f"{flags.replace('|', ESCAPED_BAR)} | {_linked(text)}"


def _linked(text: str) -> str:
    text = text.replace("|", ESCAPED_BAR).replace("<", "&lt;").replace("*", r"\*")
    return URL_OF_DOCS.sub(lambda match: f"[{match[1].removesuffix('.md')}]({match[1]})", text)


def _command(name: str) -> argparse.ArgumentParser:
    parser = make_parser([name])
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    found: argparse.ArgumentParser = commands.choices[name]
    return found


def _actions(name: str) -> list[argparse.Action]:
    return _command(name)._actions


def _groups(name: str) -> list[tuple[str, list[argparse.Action]]]:
    return [(group.title or "", group._group_actions) for group in _command(name)._action_groups]


if __name__ == "__main__":
    sys.exit(main())
