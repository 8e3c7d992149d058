"""Two hundred bad inputs, drawn from seeds: each ends in a short refusal, changes nothing that was there, and leaves nothing behind.

50 specs, 50 configurations, 50 overrides, 50 saved runs. Not every change makes an input bad: what still holds is done as ever, and a
run that goes on from a damaged folder must end in the bits of one that was never damaged. At least so many are refused, or the changes
would be too tame to test anything.
"""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import yaml
from toy_method import Line
from toy_project import CONFIG, SPEC

from repro import checkpoint, run
from repro_tools.cli import main

CASES = 50
LONGEST_LINE = 1200
MOST_LINES = 40

WRONG = [
    None, True, -1, 0, 0.5, 10**30, -(10**400), 1e308, "", "text", "1e-4x", [], {}, [[]], {"a": {"b": {}}}, ["x", None], "\u2028\x85",
    "x" * 5000,
]  # fmt: skip
"""Values of another type or size than any key expects."""

LITERAL = [
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "9" * 5000,
    "0x1F",
    "12:30:45",
    "2026-01-01",
    "~",
    "'open",
    '"\\q"',
    "@x",
    "`x`",
    "%x",
    "*x",
]
"""Text in the place of a value that YAML may read as something else, or not at all."""

HOSTILE = [
    '!!python/object/apply:os.mkdir ["executed"]',
    "!!python/name:os.system",
    '!!python/object/new:os.system ["mkdir executed"]',
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!timestamp 2026-01-01",
    "!custom {a: 1}",
    "[" * 2000 + "]" * 2000,
    "{a: " * 200 + "1" + "}" * 200,
    "&a [*a, *a]",
    "&a {b: *a}",
]
LAUGHS = "bomb:\n" + "".join(
    f"  - &l{level} [{', '.join([f'*l{level - 1}'] * 9) if level else 'lol'}]\n" for level in range(12)
)
"""A billion laughs: twelve lines that stand for 9**11 words."""


# --- what must hold ----------------------------------------------------------------------------------------------


def everything(root: Path) -> dict:
    """Every file below `root` with its bytes, or where it may not be read its time, every link with its target, every folder."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if "__pycache__" in name:
            continue
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes() if os.access(path, os.R_OK) else path.stat().st_mtime_ns
    return found


def called(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code and standard error of a command. Whatever is raised is a failure of the test."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


def assert_refused_well(error: str, what: str) -> None:
    lines = [line for line in error.split("\n") if line]
    spoken = [line for line in lines if line.startswith("repro")]
    assert spoken and "Traceback" not in error, f"{what}: {error[:2000]!r}"
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= LONGEST_LINE, f"{what}: {error[:2000]!r}"
    assert all(line.startswith(("repro", "toy: ", "runs/")) for line in lines), f"{what}: {error[:2000]!r}"


def refused(capsys, root: Path, what: str, *arguments: str, allowed=(0, 2)) -> bool:
    """Whether a command refused its input, and as it must; one that does not change anything either way."""
    before = everything(root)
    code, error = called(capsys, *arguments)
    assert code in allowed, f"{what}: {arguments}: exit code {code}: {error[:2000]!r}"
    assert everything(root) == before, f"{what}: {arguments}"
    assert not (root / "executed").exists()
    if code == 2:
        assert_refused_well(error, f"{what}: {arguments}")
    return code == 2


# --- specs and configurations ------------------------------------------------------------------------------------


def places(data, path=()):
    """The path of every key and item."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data, stream: random.Random) -> tuple[str, bytes]:
    """What was done to the data of a YAML file, and the file's bytes."""
    data = copy.deepcopy(data)
    path = stream.choice(list(places(data)))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    key, where = path[-1], ".".join(map(str, path))
    kind = stream.choice(
        ["remove", "rename", "wrong", "wrong", "literal", "hostile", "twice", "bytes", "bytes", "bomb"]
    )
    if kind == "remove":
        del parent[key]
    elif kind == "rename":
        if isinstance(parent, dict):
            parent[stream.choice([f"{key}s", "", "x y", "\u00e9", str(key).upper()])] = parent.pop(key)
        else:
            parent.insert(0, parent[key])
    elif kind in ("wrong", "literal", "hostile"):
        mark = "REPLACED"
        value = stream.choice({"wrong": WRONG, "literal": LITERAL, "hostile": HOSTILE}[kind])
        parent[key] = value if kind == "wrong" else mark
        text = yaml.safe_dump(data, sort_keys=False)
        shown = repr(value)[:40]
        return f"{kind} {where}: {shown}", (text if kind == "wrong" else text.replace(mark, value, 1)).encode()
    text = yaml.safe_dump(data, sort_keys=False)
    if kind == "twice":
        lines = text.splitlines(keepends=True)
        index = stream.randrange(len(lines))
        return f"line {index} twice", "".join(lines[: index + 1] + lines[index:]).encode()
    if kind == "bomb":
        return "a billion laughs", (text + LAUGHS).encode()
    if kind == "bytes":
        return bytes_changed(text.encode(), stream)
    return f"{kind} {where}", text.encode()


def bytes_changed(data: bytes, stream: random.Random) -> tuple[str, bytes]:
    place = stream.randrange(len(data) + 1)
    ways = {
        "empty": b"",
        "cut": data[:place],
        "random bytes": stream.randbytes(200),
        "another encoding": data.decode().encode("utf-16"),
        "no UTF-8": data[:place] + b"\xff\xfe\xe9" + data[place:],
        "a zero": data[:place] + b"\0" + data[place:],
        "a mark of the byte order": b"\xef\xbb\xbf" + data,
        "carriage returns": data.replace(b"\n", b"\r\n"),
        "tabs": data.replace(b"  ", b"\t"),
        "a control character": data[:place] + b"\x1b[31m" + data[place:],
        "two documents": data + b"---\n" + data,
        "a list": b"- " + data.replace(b"\n", b"\n  "),
        "a number": b"7",
        "a flipped bit": data[: max(0, place - 1)]
        + bytes([data[max(0, place - 1)] ^ 1 << stream.randrange(8)])
        + data[max(1, place) :],
    }
    name = stream.choice(list(ways))
    return f"{name} at {place}", ways[name]


def put(path: Path, stream: random.Random, made: tuple[str, bytes]) -> str:
    """Writes the file, or in one of ten cases something in its place that is none."""
    what, data = made
    path.unlink()
    kind = stream.randrange(20)
    if kind == 0:
        path.mkdir()
        return "a folder"
    if kind == 1:
        path.symlink_to(path.name)
        return "a link to itself"
    if kind == 2 and os.geteuid():
        path.write_bytes(data)
        path.chmod(0)
        return "unreadable"
    path.write_bytes(data)
    return what


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, "configs/toy.yaml: no YAML: found more than 1,000,000 values, each alias counted, expected fewer"),
        ("a: &a {b: *a}", "configs/toy.yaml"),
        ("a: !!binary aGVsbG8=", "no YAML: found a value of type bytes, expected text, numbers, lists and mappings"),
        ("a: !!timestamp 2026-01-01", "no YAML: found a value of type date"),
        ("a: !!set {b, c}", "no YAML: found a value of type set"),
    ],
    ids=["a billion laughs", "an endless alias", "bytes", "a date", "a set"],
)
def test_yaml_that_is_more_than_plain_data_is_refused(project, capsys, text, expected):
    (project / "configs/toy.yaml").write_text(text)
    assert refused(capsys, project, text[:20], "list") and expected in called(capsys, "list")[1]


def test_aliases_of_a_sane_size_are_read(project, capsys):
    """The innocent variant: a section that two phases share."""
    section = "{iterations: 3, batch_size: 4, learning_rate: 1e-2}"
    text = f"experiment: toy\npool_size: 64\nphases: {{line: &same {section}, constant: *same}}\n"
    (project / "configs/toy.yaml").write_text(text + "pace: {log_every: 3, checkpoint_every: 5}\n")
    assert called(capsys, "run", "toy", "--dry-run") == (0, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tool = 3", "found no pyproject.toml with a [tool.repro] table"),
        ("[tool]\nrepro = 3", "pyproject.toml: tool.repro: found 3, expected a table"),
        ('[tool.repro]\nmethod = "toy_method:METHOD"\nroot = 5', "tool.repro.root: found no folder"),
        ('[tool.repro]\nmethod = ".:x"', "pyproject.toml: tool.repro.method: "),
    ],
)
def test_a_project_that_is_described_wrongly_is_refused(project, capsys, text, expected):
    (project / "pyproject.toml").write_text(text)
    assert refused(capsys, project, text, "list") and expected in called(capsys, "list")[1]


def test_a_message_is_one_line_whatever_it_is_about(project, capsys):
    _, error = called(capsys, "run", "toy", "--set=x\nrepro: all is well\x1b[2J=1")
    assert error.startswith("repro: --set x\\nrepro: all is well\\x1b[2J=1: found no field") and error.count("\n") == 1


@pytest.mark.parametrize(("name", "sound", "least"), [("spec.yaml", SPEC, 30), ("configs/toy.yaml", CONFIG, 30)])
def test_bad_files_are_refused(project, capsys, name, sound, least):
    count = 0
    for number in range(CASES):
        stream = random.Random(f"{name} {number}")
        before = (project / name).read_bytes()
        what = f"{name} {number}, {put(project / name, stream, changed(sound, stream))}"
        told = refused(capsys, project, what, "run", "toy", "--dry-run")
        if told:  # the other commands that read the file refuse it as well, or name it as a fault
            refused(capsys, project, what, "report" if name == "spec.yaml" else "list", allowed=(0, 2))
            refused(capsys, project, what, "check", allowed=(1, 2))
        count += told
        (project / name).rmdir() if (project / name).is_dir() else (project / name).unlink()
        (project / name).write_bytes(before)
    assert count >= least


# --- overrides ---------------------------------------------------------------------------------------------------

KEYS = [
    "", "*", "**", "phases", "phases.*", "phases.*.*", "phases.*.iterations", "phases.line.iteration", "phases..iterations", ".phases",
    "phases.", "pool_size", "experiment", "pace.log_every", "[", "[a", "[!]", "?", "phases.[a-", "x" * 3000, "\u00e9", "a b", "--set",
    "phases\n.line", "pool_size\r\nrepro: all is well",
]  # fmt: skip
VALUES = [
    "", "=", "==", "-1", "0", "1.5", "1e-4x", "null", "true", "[1, 2]", "{a: 1}", "text", "'", '"', "[", "{", "&a [*a]", "*a", "a: b: c",
    "\t", "1\n2", "\n", "x" * 3000, *LITERAL, *HOSTILE,
]  # fmt: skip


def test_bad_overrides_are_refused(project, capsys):
    count = 0
    for number in range(CASES):
        stream = random.Random(f"override {number}")
        override = f"{stream.choice(KEYS)}{stream.choice(['=', '=', '=', ''])}{stream.choice(VALUES)}"
        count += refused(
            capsys, project, f"override {number}, {override[:80]!r}", "run", "toy", f"--set={override}", "--dry-run"
        )
    assert count >= 45


# --- saved runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(project, monkeypatch):
    """A run that was killed in its first phase, another in its second, and the weights of one that was not."""
    monkeypatch.setattr(run, "imported_versions", dict)
    assert main(["run", "toy", "--runs", "whole", "--set", "pace.checkpoint_every=2"]) == 0
    with monkeypatch.context() as patch:
        original = Line.minibatch

        def minibatch(self, step, draws):
            if step == 9:
                raise KeyboardInterrupt
            return original(self, step, draws)

        patch.setattr(Line, "minibatch", minibatch)
        assert main(["run", "toy", "--runs", "killed", "--set", "pace.checkpoint_every=2"]) == 130
    shutil.copytree("whole", "judged")
    (project / "whole/toy/seed-0/record.json").unlink()
    return weights(project / "whole")


def weights(runs: Path) -> dict:
    return {
        path.parent.name: {
            name: weight.numpy().tobytes() for name, weight in checkpoint.load(path)["networks"]["model"].items()
        }
        for path in sorted(runs.glob("toy/seed-0/*/model.safetensors"))
    }


def spoil(folder: Path, stream: random.Random) -> str:
    """Changes one file of a run, or two of its states."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jsonl", ".yaml")
    )
    states = [path for path in files if path.suffix == ".safetensors" and path.parent != folder]
    path = stream.choice(states * 2 + files)
    kind = stream.choice(["flip", "flip", "cut", "swap", "random", "header", "folder", "loop", "empty", "gone", "both"])
    data = path.read_bytes()
    what = f"{kind} {path.relative_to(folder)}"
    if kind == "swap" and len(states) > 1:
        one, other = stream.sample(states, 2)
        contents = one.read_bytes(), other.read_bytes()
        one.write_bytes(contents[1]), other.write_bytes(contents[0])
        return f"swap {one.relative_to(folder)} {other.relative_to(folder)}"
    if kind == "both":
        for state in states:
            state.write_bytes(flipped(state.read_bytes(), stream))
        return "flip every state"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind != "gone":
        ways = {"cut": data[: stream.randrange(len(data))], "random": stream.randbytes(500), "empty": b""}
        header = data.replace(b"float", b"int64", 1).replace(b'"F32"', b'"I32"', 1).replace(b"seed", b"seeb", 1)
        path.write_bytes(ways.get(kind, header if kind == "header" else flipped(data, stream)))
    return what


def flipped(data: bytes, stream: random.Random) -> bytes:
    changed = bytearray(data)
    changed[stream.randrange(len(changed))] ^= 1 << stream.randrange(8)
    return bytes(changed)


def test_damaged_runs_are_refused_or_go_on_to_the_same_bits(project, capsys, saved):
    ends = {0: 0, 1: 0, 2: 0}
    for number in range(CASES):
        stream = random.Random(f"run {number}")
        shutil.rmtree(project / "runs", ignore_errors=True)
        shutil.copytree(stream.choice(["whole", "killed", "killed"]), "runs")
        what = f"run {number}, {spoil(project / 'runs/toy/seed-0', stream)}"
        before = everything(project)
        code, error = called(capsys, "run", "toy", "--resume", "--set", "pace.checkpoint_every=2")
        assert code in ends, f"{what}: exit code {code}: {error[:2000]!r}"
        ends[code] += 1
        if code == 0:
            assert weights(project / "runs") == saved, what
        else:
            assert_refused_well(error, what)
            assert everything(project) == before, what
    assert ends[2] >= 8 and ends[0] >= 25, ends


def test_damaged_records_are_refused_by_the_report(project, capsys, saved):
    """Beside the 50 runs: the file that all verdicts come from."""
    path = project / "runs/toy/seed-0/record.json"
    for number in range(25):
        stream = random.Random(f"record {number}")
        shutil.rmtree(project / "runs", ignore_errors=True)
        shutil.rmtree(project / "reports", ignore_errors=True)
        shutil.copytree("judged", "runs")
        record = json.loads(path.read_text())
        key = stream.choice(list(record))
        kind = stream.choice(["remove", "wrong", "bytes"])
        if kind == "bytes":
            what, data = bytes_changed(path.read_bytes(), stream)
        else:
            what = f"{kind} {key}"
            record.pop(key) if kind == "remove" else record.update({key: stream.choice(WRONG)})
            data = json.dumps(record).encode()
        path.write_bytes(data)
        before = everything(project)
        code, error = called(capsys, "report")
        assert code in (0, 2), f"record {number}, {what}: exit code {code}: {error[:2000]!r}"
        if code == 2:
            assert_refused_well(error, f"record {number}, {what}")
            assert everything(project) == before, f"record {number}, {what}"
