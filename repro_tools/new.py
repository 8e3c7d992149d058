"""`repro new`: a project that is green from its first minute, with the wheel of these tools in it.

Needs no project and no engine.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130
"""Exit codes of `repro.errors`, which this command goes without."""

PACKAGE = Path(__file__).parent
TEMPLATE = PACKAGE / "template" if (PACKAGE / "template").is_dir() else PACKAGE.parent
"""The folder with copier.yml: in an installed wheel the first, in a clone and in an installed skill the second."""

NEXT = """\
{project}: a project whose toy phases run through every command. Next:
    cd {project} && make setup && make test && make preflight
The order of work: AGENTS.md. What is still to fill in: .venv/bin/repro check"""


class Refused(Exception):
    """What was asked for cannot be rendered. One line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: repro new my-paper --data preset=generative --data 'experiments={moons: [2]}' --defaults"
    parser.add_argument("folder", type=Path, help="where the project is to be: a folder that is new or empty")
    parser.add_argument(
        "--data", action="append", default=[], metavar="KEY=VALUE", help="the answer to a question; may be repeated"
    )
    parser.add_argument("--data-file", type=Path, metavar="F", help="a YAML file of answers; --data goes before it")
    parser.add_argument("--defaults", action="store_true", help="ask nothing: what is not answered is the default")
    parser.add_argument("--json", action="store_true", help="print where the project and its tools are as JSON")


def command(options: argparse.Namespace) -> int:
    try:
        tools = made(options.folder, answers(options.data, options.data_file), defaults=options.defaults)
    except Refused as error:
        print(f"repro: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("repro: interrupted; nothing was written", file=sys.stderr)
        return EXIT_INTERRUPTED
    if options.json:
        print(json.dumps({"project": str(options.folder), "tools": str(tools)}))
    else:
        print(NEXT.format(project=options.folder))
    return EXIT_OK


def questions() -> dict[str, dict[str, Any]]:
    """The questions that copier.yml asks, by name."""
    import yaml

    found = yaml.safe_load((TEMPLATE / "copier.yml").read_text(encoding="utf-8"))
    return {name: one for name, one in found.items() if not name.startswith("_") and one.get("when") is not False}


def answers(given: list[str], file: Path | None) -> dict[str, Any]:
    """The answers of `--data` and of a file. Raises Refused for one to no question, and for one that cannot be read."""
    import yaml

    asked, found = questions(), {}
    if file is not None:
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise Refused(f"{file}: {_one_line(error)}; expected YAML") from None
        if not isinstance(found, Mapping):
            raise Refused(f"{file}: found no mapping, expected answers by name")
    for one in given:
        name, equals, text = one.partition("=")
        if not equals:
            raise Refused(f"--data: found '{one}', expected KEY=VALUE")
        found = {**found, name: _read(name, text, asked[name]["type"]) if name in asked else text}
    if unknown := [str(name) for name in found if name not in asked]:
        raise Refused(f"{unknown[0]}: found an answer to no question, expected one of {', '.join(asked)}")
    return dict(found)


def _read(name: str, text: str, kind: str) -> Any:
    import yaml

    if kind == "str":
        return text
    try:
        return float(text) if kind == "float" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        raise Refused(f"{name}: found '{text}', expected {'a number' if kind == 'float' else 'YAML'}") from None


def made(folder: Path, given: Mapping[str, Any], *, defaults: bool) -> Path:
    """Renders the project into `folder` and returns the path of the wheel in it. Raises Refused: nothing is written."""
    import copier
    from copier.errors import CopierAnswersInterrupt, CopierError, DirtyLocalWarning
    from plumbum import ProcessExecutionError

    from repro_tools.wheel import NotInstalled, packed

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder}: found files there, expected a folder that is new or empty")
    if not defaults and not sys.stdin.isatty() and (open_ones := [name for name in questions() if name not in given]):
        raise Refused(f"{open_ones[0]}: found no answer and no terminal to ask at, expected --data or --defaults")
    try:
        wheel = packed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DirtyLocalWarning)  # a clone is rendered as it lies there
            copier.run_copy(str(TEMPLATE), folder, dict(given), defaults=defaults, vcs_ref="HEAD", quiet=True)
        (folder / "tools").mkdir()
        (folder / "tools" / wheel.name).write_bytes(wheel.contents)
        line = f"./tools/{wheel.name} --hash=sha256:{wheel.sha256}\n"
        (folder / "tools/requirements.txt").write_text(line, encoding="utf-8")
    except CopierAnswersInterrupt:
        raise KeyboardInterrupt from None
    except (ValueError, CopierError, ProcessExecutionError, NotInstalled, OSError) as error:
        raise Refused(re.sub(r"^Validation error for question '(\w+)'", r"\1", _one_line(error))) from None
    return folder / "tools" / wheel.name


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
