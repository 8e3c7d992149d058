"""`repro new`: what copier gives, with the tools that rendered it; what is refused leaves nothing behind."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from rendering import ROOT, render

from repro_tools.cli import main
from repro_tools.wheel import packed

LOOK = """
import sys
from repro_tools.cli import main
print(main(sys.argv[1:]), {"torch", "repro"} & {*sys.modules})
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answered(project: Path) -> dict:
    return yaml.safe_load((project / ".copier-answers.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder as pip makes it: the tools without a clone around them."""
    folder = tmp_path_factory.mktemp("site")
    wheel = packed()
    (folder / wheel.name).write_bytes(wheel.contents)
    with zipfile.ZipFile(folder / wheel.name) as archive:
        archive.extractall(folder)
    return folder


def by_itself(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The installed tools in a process of their own: outside of every project, without git."""
    environment = {"PYTHONPATH": str(installed), "PATH": "", "HOME": str(cwd)}
    command = [sys.executable, "-c", LOOK, "new", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_it_is_what_copier_gives_and_the_tools(template, tmp_path, capsys):
    assert main(["new", str(tmp_path / "new"), "--defaults", "--data", "preset=generative"]) == 0
    told = capsys.readouterr()
    assert "make setup" in told.out and len(told.out.splitlines()) == 3 and told.err == ""
    copied = contents(render(template, tmp_path / "copied", preset="generative"))
    made = contents(tmp_path / "new")
    assert {name for name in made if name.startswith("tools/")} == made.keys() - copied.keys()
    of_the_place = {".copier-answers.yml", "Makefile"}
    assert [name for name in copied if made[name] != copied[name] and name not in of_the_place] == []


def test_the_wheel_in_it_is_named_with_its_hash(tmp_path, capsys):
    assert main(["new", str(tmp_path / "new"), "--defaults", "--json"]) == 0
    wheel = Path(json.loads(capsys.readouterr().out)["tools"])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (wheel.parent / "requirements.txt").read_text() == f"./tools/{wheel.name} --hash=sha256:{digest}\n"


def test_outside_of_every_project_without_git_and_without_the_engine(installed, tmp_path):
    done = by_itself(installed, tmp_path, "my-paper", "--defaults", "--data", "title=A paper")
    assert done.stdout.splitlines()[-1] == "0 set()", done.stderr
    assert answered(tmp_path / "my-paper")["title"] == "A paper"
    makefile = (tmp_path / "my-paper/Makefile").read_text()
    assert "\nTOOLS ?=\n" in makefile  # a folder that nothing can be built from


def test_an_installed_command_gives_the_same_wheel_as_a_clone(installed, tmp_path):
    done = by_itself(installed, tmp_path, "my-paper", "--defaults")
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "my-paper/tools").glob("*.whl")
    assert wheel.read_bytes() == packed().contents


def test_answers_come_from_the_file_and_before_it_from_data(tmp_path):
    file = tmp_path / "answers.yaml"
    file.write_text("title: Of the file\npackage: of_the_file\nexperiments: {mnist: [1, 28, 28]}\n")
    given = ["--data-file", str(file), "--data", "title=a=b", "--data", "value=7"]
    assert main(["new", str(tmp_path / "new"), "--defaults", *given]) == 0
    found = answered(tmp_path / "new")
    assert (found["title"], found["package"], found["value"]) == ("a=b", "of_the_file", 7.0)
    assert found["experiments"] == {"mnist": [1, 28, 28]}


REFUSED = [
    (["--data", "titel=x"], "titel: found an answer to no question, expected one of title, arxiv, package"),
    (["--data", "kind=equal"], "kind: found an answer to no question"),
    (["--data", "_tasks=x"], "_tasks: found an answer to no question"),
    (["--data", "title"], "--data: found 'title', expected KEY=VALUE"),
    (["--data", "value=much"], "value: found 'much', expected a number"),
    (["--data", "experiments={a: "], "experiments: found '{a: ', expected YAML"),
    (["--data", "package=import"], "package: found 'import', a word of Python itself"),
    (["--data", "preset=other"], "Invalid choice for 'preset'"),
    (["--data-file", "absent.yaml"], "absent.yaml: "),
    (["--data-file", "list.yaml"], "list.yaml: found no mapping"),
    (["--data-file", "odd.yaml"], "odd.yaml: "),
]


@pytest.mark.parametrize("given, reason", REFUSED, ids=[" ".join(given) for given, _ in REFUSED])
def test_what_is_refused_is_told_in_a_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, given, reason):
    monkeypatch.chdir(tmp_path)
    Path("list.yaml").write_text("- title\n")
    Path("odd.yaml").write_text("title: [\n")
    before = contents(tmp_path)
    assert main(["new", "my-paper", "--defaults", *given]) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("repro: ") and reason in line and told.out == ""
    assert contents(tmp_path) == before and not Path("my-paper").exists()


@pytest.mark.parametrize("there", ["my-paper/notes.md", "my-paper"])
def test_a_folder_with_files_and_a_file_are_left_alone(tmp_path, monkeypatch, capsys, there):
    monkeypatch.chdir(tmp_path)
    Path(there).parent.mkdir(exist_ok=True)
    Path(there).write_text("mine")
    assert main(["new", "my-paper", "--defaults"]) == 2
    assert "expected a folder that is new or empty" in capsys.readouterr().err
    assert contents(tmp_path) == {there: b"mine"}


def test_where_nobody_can_answer_it_asks_nothing_and_says_how(tmp_path):
    command = [sys.executable, "-m", "repro_tools", "new", str(tmp_path / "new")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 2 and "title: found no answer" in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert not (tmp_path / "new").exists()
