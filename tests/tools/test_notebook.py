"""The notebook of a session: what it says, and two sessions of it, run as a platform runs it."""

import ast
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import torch
from forked import LONGEST_S
from nbclient import NotebookClient

from repro import checkpoint
from repro.errors import BadInput, RunFailed
from repro.method import find_project
from repro.run import plan
from repro.runtime import Runtime
from repro_tools.cli import main
from repro_tools.notebook import carry, session
from repro_tools.notebook.cells import cells, notebook
from repro_tools.notebook.command import plan_session
from repro_tools.notebook.platforms import PLATFORMS
from repro_tools.notebook.sizing import EVALUATION, Timing, schedule, timings

TESTS = Path(__file__).parents[1]
ENGINE = TESTS.parent / "templates" / "reproduction" / "repro"
REFERENCE = TESTS.parent / "reference_impl"

WAITS = '''

import os as _os, signal as _signal
_minibatch = Line.minibatch


def _waits(self, step, draws):
    """In step 7 of the first session: until it is asked to end, as a long run is."""
    if step == 7 and _os.environ.get("TOY_WAITS"):
        Path(_os.environ["TOY_WAITS"]).touch()
        _signal.pause()
    return _minibatch(self, step, draws)


Line.minibatch = _waits
'''
TIMEOUT = """# In place of coreutils' timeout: its time is over when the run waits.
import os, signal, subprocess, sys, time
assert sys.argv[1:3] == ["--signal=TERM", "--kill-after=600"] and int(sys.argv[3]) > 0
process = subprocess.Popen(sys.argv[4:])
waits = os.environ.get("TOY_WAITS")
while process.poll() is None and not (waits and os.path.exists(waits)):
    time.sleep(0.02)
if process.poll() is None:
    process.send_signal(signal.SIGTERM)
    process.wait()
    sys.exit(124)
sys.exit(process.returncode)
"""


# --- two sessions ------------------------------------------------------------------------------------------------


class World:
    """A platform in a folder: what is attached, what outlives a session, and a notebook for it."""

    def __init__(self, root, project):
        self.root, self.inputs, self.output, self.work = root, root / "input", root / "output", root / "work"
        self.platform = replace(
            PLATFORMS["kaggle"], work=self.work, output=self.output, inputs=(self.inputs,), metadata={}
        )
        copy = root / "copy"
        shutil.copytree(project, copy)
        shutil.copytree(ENGINE, copy / "repro", ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "toy_method.py").write_text((TESTS / "toy_method.py").read_text() + WAITS)
        (self.inputs / "uploaded").mkdir(parents=True)
        shutil.make_archive(str(self.inputs / "uploaded" / "toy"), "zip", copy)
        self.made = notebook(
            plan_session(find_project(project), "toy", self.platform, seeds=[0], device="cpu", source="toy.zip")
        )

    def session(self):
        """Runs every cell in a fresh kernel, on a fresh machine. Returns what each printed and showed, by its name."""
        shutil.rmtree(self.work, ignore_errors=True)
        ran = nbformat.reads(nbformat.writes(self.made), as_version=4)
        NotebookClient(
            ran, timeout=LONGEST_S, kernel_name="python3", resources={"metadata": {"path": str(self.root)}}
        ).execute()
        return {cell["id"]: said(cell) for cell in ran.cells if cell.cell_type == "code"}

    def carry_over(self):
        """What the user does between two sessions."""
        shutil.copytree(self.output, self.inputs / "notebooks" / "me" / "toy", dirs_exist_ok=True)
        shutil.rmtree(self.output)


def said(cell):
    return "".join(
        output.get("text", "") or "".join(output.get("data", {}).get("text/markdown", "")) for output in cell.outputs
    )


def states(runs):
    return {
        path.parent.name: {
            name: weight.numpy().tobytes() for name, weight in checkpoint.load(path)["networks"]["model"].items()
        }
        for path in sorted(runs.glob("toy/seed-0/*/model.safetensors"))
    }


@pytest.fixture
def world(project, tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "timeout.py").write_text(TIMEOUT)
    # The first line of a script can name no interpreter whose path has a space, or more than 127 characters.
    (tools / "timeout").write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(tools / "timeout.py")])} "$@"\n')
    (tools / "timeout").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return World(tmp_path / "platform", project)


@pytest.mark.slow
def test_two_sessions_end_in_the_bits_of_one_run(world, project, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("TOY_WAITS", str(tmp_path / "waits"))
        first = world.session()
    assert "this is the first session" in first["restore"]
    assert "exit code 124: not finished; the state is saved, run the next session" in first["run"]
    assert "toy seed-0  1-line: step 6 of 12" in first["progress"] and "every checksum held" in first["pack"]
    assert first["results"].startswith("not finished - next: add the output of this version as input")
    world.carry_over()
    second = world.session()
    assert "restored " in second["restore"]
    assert "goes on at phase 1 line, from its last saved state" in second["run"]
    assert "exit code 0: finished" in second["run"] and re.search(
        r"^toy seed 0\n  line.error [\d.e-]+\n  constant.value [\d.]+\n", second["results"]
    )
    assert main(["run", "toy", "--device", "cpu"]) == 0
    carry.restore("toy-runs.tar", [world.output], tmp_path / "carried")
    assert states(tmp_path / "carried") == states(project / "runs") and len(states(project / "runs")) == 2


def test_the_real_timeout_ends_a_command_as_the_notebook_expects():
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); signal.pause()"
    ended = subprocess.run(["timeout", "--signal=TERM", "--kill-after=600", "1", sys.executable, "-c", code])
    assert session.outcome(ended.returncode)[0] == session.NOT_FINISHED


# --- what the notebook says --------------------------------------------------------------------------------------


def planned(project, **changes):
    given = {"seeds": [0, 1], "seconds_per_step": {"line": 1000.0, "constant": 10.0}} | changes
    return plan_session(find_project(project), "toy", PLATFORMS[given.pop("platform", "kaggle")], **given)


def text_of(planned_session):
    return {name: text for name, _, text in cells(planned_session)}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_code_cell_is_python_and_the_run_has_every_option(project, platform):
    made = text_of(
        planned(project, platform=platform, overrides=["phases.*.iterations=3"], source="https://x.org/y.git#abc")
    )
    code = {name: text for name, text in made.items() if name not in ("about", "before", "run-note")}
    for text in code.values():
        ast.parse(text)
    words = re.search(r"^command \+= \[(.*)\]$", code["run"], re.MULTILINE)[1]
    assert words == (
        "sys.executable, '-m', 'repro', 'run', 'toy', '--seeds', '0', '1', '--set=phases.*.iterations=3', '--resume', "
        "'--device', 'cuda', '--data-root', DATA, '--runs', RUNS"
    )
    assert "'https://x.org/y.git'" in code["code"] and "'abc'" in code["code"]
    assert not re.search(r"^\s*[!%]", "\n".join(code.values()), re.MULTILINE)


def test_micro_batches_reach_the_run_and_are_told(project):
    made = text_of(planned(project, micro_batches={"line": 4, "constant": 2}, seconds_per_step={}))
    assert "'--micro-batches', 'line=4', 'constant=2', '--resume'" in made["run"]
    assert "`--micro-batches line=4 constant=2`: the same result" in made["about"]
    assert "of whole minibatches, in parts it takes longer" in made["about"]
    alone = text_of(planned(project))
    assert "--micro-batches" not in alone["run"] + alone["about"]
    assert "with the `--micro-batches` that the latter names: the same result." in alone["before"]
    with pytest.raises(BadInput, match="--micro-batches: found the phase 'circle', expected one of: constant, line"):
        planned(project, micro_batches={"circle": 2})


def test_an_option_is_a_word_and_never_code(project):
    """A quote in an option must not end the text that holds it."""
    made = text_of(planned(project, source="a'b\"c.zip", device='x"); import os; ("'))
    for name in ("code", "run"):
        assert "os" not in {
            alias.name
            for node in ast.walk(ast.parse(made[name]))
            if isinstance(node, ast.Import)
            for alias in node.names
        }


def test_the_same_notebook_has_the_same_bytes(project):
    one, other = (nbformat.writes(notebook(planned(project))) for _ in range(2))
    assert one == other


def test_sessions_are_cut_by_the_times_that_are_known(project):
    found = planned(project, session_hours=2.0, seeds=[0])
    assert found.run_s == 2 * 3600 - 720
    assert [(part.session, part.phase, part.first, part.last) for part in found.parts] == [
        (1, "line", 0, 6), (2, "line", 6, 12), (2, "constant", 0, 9), (2, EVALUATION, 0, 0),
    ]  # fmt: skip
    about = text_of(found)["about"]
    assert (
        "2 sessions of 2 hours" in about
        and "| 1 | 0 | line | 0 to 6 |" in about
        and "| line | 0.28 h |  | given |" in about
    )


def test_what_is_built_again_counts_in_each_session():
    timing = {"a": Timing(1.0, 50.0, ""), EVALUATION: Timing(0.0, 0.0, "")}
    parts = schedule([("a", 100)], timing, [0], 100.0)
    assert [(part.session, part.first, part.last, part.seconds) for part in parts[:2]] == [
        (1, 0, 50, 100),
        (2, 50, 100, 100),
    ]


@pytest.mark.parametrize(
    ("timing", "reason"),
    [
        ({"a": Timing(None, 0.0, "unknown: no data"), EVALUATION: Timing(0.0, 0.0, "")}, "a: unknown: no data"),
        (
            {"a": Timing(1.0, 3600.0, ""), EVALUATION: Timing(0.0, 0.0, "")},
            "a: found 1 h that cannot be cut, expected at most 0.5 h",
        ),
        (
            {"a": Timing(1.0, 0.0, ""), EVALUATION: Timing(0.0, 7200.0, "")},
            "evaluation: found 2 h that cannot be cut",
        ),
    ],
)
def test_what_cannot_be_cut_into_sessions_is_said(timing, reason):
    with pytest.raises(BadInput, match=reason):
        schedule([("a", 10)], timing, [0], 1800.0)


def test_an_unknown_time_is_said_with_the_command_that_measures_it(project, monkeypatch):
    monkeypatch.setattr("repro_tools.notebook.sizing._estimated", lambda *_: Timing(None, 0.0, "unknown: needs data"))
    about = text_of(planned(project, seconds_per_step={}, overrides=["pool_size=7"]))["about"]
    assert "How many sessions: **unknown** (line: unknown: needs data)" in about
    assert "`python -m repro run toy --set pool_size=7 --train-iters 100 --runs runs/timing --device cuda`" in about


def on_a_t4(project, **config):
    """A finished run of the toy, as if it had been on a T4 with steps of two seconds."""
    assert main(["run", "toy", *[f"--set={key}={value}" for key, value in config.items()]]) == 0
    path = project / "runs/toy/seed-0/record.json"
    record = json.loads(path.read_text())
    iterations = record["config"]["phases"]["line"]["iterations"]
    record["machine"]["device"], record["wall_s"]["line"], record["prepare_s"]["line"] = (
        "Tesla T4",
        2.0 * iterations + 5,
        5.0,
    )
    path.write_text(json.dumps(record))


def test_times_measured_on_the_device_come_first(project):
    on_a_t4(project)
    found = planned(project, seconds_per_step={}, seeds=[0]).timing["line"]
    assert (found.step_s, found.prepare_s, found.origin) == (2.0, 5.0, "measured on T4, 1 run")


def test_a_run_of_too_few_steps_is_passed_over_aloud(project):
    on_a_t4(project, **{"phases.line.iterations": 10})
    origin = planned(project, seconds_per_step={}, seeds=[0]).timing["line"].origin
    assert "estimated for T4" in origin and origin.endswith("; 1 run of fewer than 100 steps passed over")


@pytest.mark.parametrize("experiment", ["toy", "2d-moons"])
def test_the_notebook_and_the_estimate_of_memory_say_the_same_time(project, experiment, capsys, monkeypatch):
    """Steps, work beside them, saving and evaluation: of a toy, and of phases with pools and an evaluation."""
    if experiment != "toy":
        monkeypatch.chdir(REFERENCE.parent)
    main(["memory", experiment, "--on", "T4", "--json"])
    told = json.loads(re.sub(r"\A\[KeOps\].*\n", "", capsys.readouterr().out))["time"]["devices"]["T4"][experiment]
    found = plan_session(find_project(Path.cwd()), experiment, PLATFORMS["kaggle"], seeds=[0], runs=Path("/nowhere"))
    for name, phase in told["phases"].items():
        parts, timing = phase["parts"], found.timing[name]
        if name != EVALUATION:
            step = parts.pop(0)
            assert timing.step_s == pytest.approx(step["seconds"][1])
        assert timing.prepare_s == pytest.approx(sum(part["seconds"][1] * part["times"] for part in parts))
        low, likely, high = phase["hours"]
        assert (timing.low, timing.high) == pytest.approx((low / likely, high / likely))
    assert {part.session for part in found.parts} == {1}
    assert sum(part.seconds for part in found.parts) / 3600 == pytest.approx(told["hours_of_a_seed"][1])


def test_short_times_are_not_hours_and_one_of_a_thing_has_no_s(project):
    about = text_of(planned(project, session_hours=1.0, seeds=[0], seconds_per_step={"line": 1.0, "constant": 0.001}))
    assert "1 session of 1 hour, 12 s of runs" in about["about"]
    assert "| 1 | 0 | line | 0 to 12 | 12 s |" in about["about"] and "| constant | 1 ms |" in about["about"]


@pytest.mark.parametrize("changes", [{"phases.line.batch_size": 4}, {"pool_size": 7}])
def test_times_of_another_setting_do_not_count(project, changes):
    on_a_t4(project, **changes)
    assert "estimated for T4" in planned(project, seconds_per_step={}, seeds=[0]).timing["line"].origin


def test_times_in_parts_count_for_as_many_micro_batches_alone(project):
    on_a_t4(project)
    path = project / "runs/toy/seed-0/record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"micro_batches": {"line": 4}}))
    origins = [
        planned(project, seconds_per_step={}, seeds=[0], micro_batches=divided).timing["line"].origin
        for divided in ({"line": 4}, {}, {"line": 2})
    ]
    assert origins[0] == "measured on T4, 1 run" and all("estimated for T4" in one for one in origins[1:])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 2}))
    assert (
        "estimated" in planned(project, seconds_per_step={}, seeds=[0], micro_batches={"line": 4}).timing["line"].origin
    )


def test_times_of_another_machine_do_not_count(project):
    assert main(["run", "toy", "--device", "cpu"]) == 0
    assert "estimated for T4" in planned(project, seconds_per_step={}, seeds=[0]).timing["line"].origin


def test_a_data_cell_may_use_the_names_of_the_notebook_and_have_its_own(project):
    (project / "data.py").write_text("import shutil\n\nMINE = INPUTS[0]\nshutil.copy(MINE, DATA)\n%time 1\n")
    assert planned(project, data_cell=project / "data.py").data_cell.startswith("import shutil")
    (project / "data.py").write_text("MINE = INPUTS[0]\nDATA.mkdir(exist_ok=True)\n")
    assert planned(project, data_cell=project / "data.py").data_cell


def test_every_limit_has_a_source_and_a_date():
    for platform in PLATFORMS.values():
        assert platform.facts and all(fact.source and fact.date for fact in platform.facts)
        assert f"{platform.hours:g} hours" in " ".join(fact.value for fact in platform.facts)


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command_writes_one_file_and_says_what_it_planned(project, capsys):
    arguments = ["notebook", "toy", "--platform", "colab", "--seconds-per-step", "line=1000", "constant=1", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sessions"] == 1 and told["seconds_per_step"]["line"]["origin"] == "given"
    assert told["notebook"] == str(project / "notebooks" / "toy-colab.ipynb")
    nbformat.validate(nbformat.read(told["notebook"], as_version=4))
    assert [path.name for path in (project / "notebooks").iterdir()] == ["toy-colab.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tyo"], "found no experiment 'tyo', expected one of: toy"),
        (["toy", "--seconds-per-step", "lin=3"], "--seconds-per-step: found lin, expected one of: line, constant"),
        (["toy", "--data-cell", "absent.py"], "--data-cell: found absent.py, expected a file of Python text"),
        (
            ["toy", "--data-cell", "takes_names.py"],
            "--data-cell: takes_names.py: found ARCHIVE, RUNS assigned, expected other names: the notebook has a use for them",
        ),
        (["toy", "--out", "spec.yaml/x.ipynb"], "--out: found spec.yaml/x.ipynb, expected a file that can be written"),
        (["toy", "--set", "x=1"], "--set x=1: found no field 'x'"),
    ],
)
def test_bad_options_are_refused_in_one_line(project, capsys, arguments, expected):
    (project / "takes_names.py").write_text(
        "def f():\n    CODE = 1\nARCHIVE, kept = 'a.tar.xz', [RUNS for RUNS in 'ab']\nfor RUNS in 'ab':\n    pass\n"
    )
    before = sorted(project.rglob("*"))
    assert main(["notebook", *arguments, "--platform", "kaggle"]) == 2
    assert expected in capsys.readouterr().err and sorted(project.rglob("*")) == before


@pytest.mark.parametrize(
    "option", [["--session-hours", "0"], ["--session-hours", "nan"], ["--seconds-per-step", "line"]]
)
def test_bad_numbers_are_refused(project, capsys, option):
    with pytest.raises(SystemExit) as caught:
        main(["notebook", "toy", "--platform", "kaggle", *option])
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err


def test_without_nbformat_one_line_says_so(project, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    assert main(["notebook", "toy", "--platform", "kaggle"]) == 2
    assert (
        capsys.readouterr().err
        == "repro: nbformat: found no such package, expected it installed: pip install nbformat\n"
    )


# --- carrying runs -----------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """Runs in the middle: a finished phase, one that runs, and what stays behind."""
    folder = tmp_path / "runs"
    for name, size in {
        "toy/seed-0/config.yaml": 10, "toy/seed-0/1-line/model.safetensors": 3_000_000,
        "toy/seed-0/2-constant/running.safetensors": 100, "toy/seed-0/2-constant/running.previous.safetensors": 100,
        "toy/seed-0/2-constant/running.damaged.safetensors": 100, "toy/seed-0/2-constant/running.safetensors.partial": 7,
        "toy/seed-0/2-constant/.tmpAbCd": 7, "toy/seed-0/2-constant/scratch/pool.safetensors": 100,
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_packed_comes_back_and_what_can_be_built_again_stays_behind(runs, tmp_path):
    carry.pack(runs, tmp_path / "out" / "runs.tar")
    carry.verify(tmp_path / "out" / "runs.tar")
    carry.restore("runs.tar", [tmp_path / "out"], tmp_path / "back")
    expected = {
        name: data for name, data in files(runs).items() if not re.search(r"scratch|damaged|partial|\.tmp", name)
    }
    assert files(tmp_path / "back") == expected and len(expected) == 4


def test_an_archive_that_a_platform_has_unpacked_comes_back_too(runs, tmp_path):
    carry.pack(runs, tmp_path / "runs.tar")
    with tarfile.open(tmp_path / "runs.tar") as tar:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # before Python 3.11.4 there is none
        tar.extractall(tmp_path / "input" / "a" / "b", **safe)
    carry.restore("runs.tar", [tmp_path / "input"], tmp_path / "back")
    assert len(files(tmp_path / "back")) == 4


def test_the_newest_sound_archive_is_taken_and_a_damaged_one_named(runs, tmp_path, capsys, monkeypatch):
    for number, name in enumerate(["old", "new", "damaged"]):
        monkeypatch.setattr(carry, "datetime", Clock(number))
        (runs / "toy/seed-0/config.yaml").write_text(name)
        carry.pack(runs, tmp_path / "input" / name / "runs.tar")
    damage(tmp_path / "input" / "damaged" / "runs.tar")
    assert "new/runs.tar" in carry.restore("runs.tar", [tmp_path / "input"], tmp_path / "back")
    assert (tmp_path / "back/toy/seed-0/config.yaml").read_text() == "new"
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("repro: warning: ") and "damaged/runs.tar: no sound archive of runs: toy/seed-0/1-line" in line
    )


class Clock:
    def __init__(self, number):
        self.number = number

    def now(self, zone):
        return self

    def isoformat(self, timespec):
        return f"2026-01-0{self.number + 1}T00:00:00+00:00"


def damage(archive):
    data = bytearray(archive.read_bytes())
    data[len(data) // 2] ^= 1
    archive.write_bytes(data)


def test_where_no_archive_is_sound_nothing_is_restored(runs, tmp_path):
    carry.pack(runs, tmp_path / "runs.tar")
    damage(tmp_path / "runs.tar")
    with pytest.raises(BadInput, match="no sound archive of runs: .*other contents than its checksum says"):
        carry.restore("runs.tar", [tmp_path], tmp_path / "back")
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.restoring").exists()
    with pytest.raises(BadInput, match="no sound archive"):
        carry.verify(tmp_path / "runs.tar")


def test_runs_that_are_there_are_kept(runs, tmp_path):
    carry.pack(runs, tmp_path / "runs.tar")
    before = files(runs)
    assert "nothing restored" in carry.restore("runs.tar", [tmp_path], runs)
    assert files(runs) == before


def hostile(path, name, **entry):
    """An archive by a stranger: a manifest that names `name`, and a member of that name."""
    data = b"data"
    listed = {
        "format": carry.FORMAT,
        "packed": "2026",
        "files": {name: {"bytes": 4, "sha256": carry.hashlib.sha256(data).hexdigest()}},
    }
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 4
        for key, value in entry.items():
            setattr(member, key, value)
        tar.addfile(member, None if entry else io.BytesIO(data))
        text = json.dumps(listed).encode()
        manifest = tarfile.TarInfo(carry.MANIFEST)
        manifest.size = len(text)
        tar.addfile(manifest, io.BytesIO(text))


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("../escaped", {}), ("/tmp/escaped-runs", {}), ("a/../../escaped", {}), ("a\\..\\escaped", {}), ("", {}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}),
        ("pipe", {"type": tarfile.FIFOTYPE, "size": 0}),
    ],
)  # fmt: skip
def test_a_hostile_archive_writes_nothing(tmp_path, name, entry):
    (tmp_path / "in").mkdir()
    hostile(tmp_path / "in" / "runs.tar", name, **entry)
    with pytest.raises(BadInput, match="no sound archive of runs"):
        carry.restore("runs.tar", [tmp_path / "in"], tmp_path / "deep" / "back")
    assert sorted(path.name for path in tmp_path.rglob("*")) in (["in", "runs.tar"], ["deep", "in", "runs.tar"])


def test_a_full_disk_while_packing_leaves_the_archive_of_before(runs, tmp_path, monkeypatch):
    carry.pack(runs, tmp_path / "runs.tar")
    before = (tmp_path / "runs.tar").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(
        RunFailed, match=r"runs.tar: cannot be written \(No space left on device\): found .* bytes free"
    ):
        carry.pack(runs, tmp_path / "runs.tar")
    assert (tmp_path / "runs.tar").read_bytes() == before and not (tmp_path / "runs.tar.partial").exists()


def test_a_state_that_is_renamed_while_it_is_packed_is_packed_again(runs, tmp_path, monkeypatch):
    listed, real = [], carry._files

    def files_then_gone(folder):
        found = real(folder)
        if not listed:
            listed.append(1)
            os.replace(
                runs / "toy/seed-0/2-constant/running.safetensors", runs / "toy/seed-0/2-constant/model.safetensors"
            )
        return found

    monkeypatch.setattr(carry, "_files", files_then_gone)
    manifest = carry.pack(runs, tmp_path / "runs.tar")
    assert "toy/seed-0/2-constant/model.safetensors" in manifest["files"]
    assert "toy/seed-0/2-constant/running.safetensors" not in manifest["files"]
    carry.verify(tmp_path / "runs.tar")


def test_there_is_nothing_to_pack_without_runs(tmp_path):
    with pytest.raises(BadInput, match="found no runs"):
        carry.pack(tmp_path / "none", tmp_path / "runs.tar")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (124, "not finished"), (143, "not finished"), (130, "not finished"),
                                             (137, "not finished"), (1, "failed"), (2, "failed"), (77, "failed")])  # fmt: skip
def test_what_an_exit_code_means(code, state):
    assert session.outcome(code)[0] == state


def test_what_is_missing_is_installed_and_pytorch_stays(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    commands = []
    monkeypatch.setattr(session, "do", lambda command, *_: commands.append([str(word) for word in command]) or 0)
    session.install_missing(["torch>=2", "pydantic>=2,<3"])
    assert commands == [] and "nothing to install" in capsys.readouterr().out
    session.install_missing(["torch>=2", "surely-not-there>=1"])
    assert commands[0][-3:] == ["--constraint", str(tmp_path / "constraints.txt"), "surely-not-there>=1"]
    assert f"torch=={metadata.version('torch')}\n" in (tmp_path / "constraints.txt").read_text()
    with pytest.raises(SystemExit, match="found another torch>=99 than expected"):
        session.install_missing(["torch>=99"])


def installed(project):
    return json.loads(re.search(r"install_missing\((.*)\)$", text_of(planned(project))["environment"], re.DOTALL)[1])


def test_the_project_s_dependencies_are_installed_beside_the_kit_s(project):
    declares = '[project]\nname = "toy"\ndependencies = ["NumPy>=1.26", "surely-not-there>=1"]\n'
    with (project / "pyproject.toml").open("a") as file:
        file.write(declares)
    (project / "own.py").write_text("import undeclared_library\n")
    assert installed(project)[:2] == ["NumPy>=1.26", "surely-not-there>=1"]
    assert set(installed(project)[2:]) == {"torch", "pydantic", "pyyaml", "safetensors", "tqdm"}
    assert "undeclared_library" not in text_of(planned(project))["before"]  # who declares is trusted


def test_without_declared_dependencies_foreign_imports_are_named(project):
    assert "imports" not in text_of(planned(project))["before"]
    (project / "own.py").write_text(
        "import json, yaml, torch.nn, toy_parts.one\nfrom . import two\nfrom repro import phases\n"
        "raise SystemExit('executed')\ndef late():\n    from surely.not_there import one\n"
    )
    (project / "toy_parts").mkdir()
    (project / "toy_parts" / "one.py").write_text("import also_missing.part\n")
    (project / "broken.py").write_text("import (\n")
    assert "the project imports `also_missing`, `surely`, and" in text_of(planned(project))["before"]


# --- the notebooks that are shipped ------------------------------------------------------------------------------

SHIPPED = [("mnist", "kaggle"), ("mnist", "colab"), ("cifar10", "kaggle")]


@cache
def timings_of(experiment):
    """Once for all platforms: they have the same GPU."""
    project, runtime = find_project(REFERENCE.parent), Runtime(torch.device("cpu"))
    config = plan(project, experiment, []).config
    return timings(project, experiment, config, runtime, "T4", Path("/nowhere"), {})


@pytest.mark.parametrize(("experiment", "platform"), SHIPPED)
def test_a_shipped_notebook_is_what_the_command_writes(experiment, platform, monkeypatch):
    assert PLATFORMS[platform].device == "T4"
    monkeypatch.setattr("repro_tools.notebook.command.timings", lambda *_: timings_of(experiment))
    made = notebook(
        plan_session(
            find_project(REFERENCE.parent), experiment, PLATFORMS[platform], seeds=[0, 1, 2], source="paper-reproduction.zip",
            data_cell=REFERENCE / "notebooks" / "data.py", runs=Path("/nowhere"),
        )
    )  # fmt: skip
    shipped = (REFERENCE / "notebooks" / f"{experiment}-{platform}.ipynb").read_text()
    assert shipped == nbformat.writes(made) + "\n"
    assert all(not cell.outputs for cell in nbformat.reads(shipped, as_version=4).cells if cell.cell_type == "code")


def test_the_shipped_data_cell_takes_the_weights_that_the_code_opens():
    from nsgf import inception

    cell = (REFERENCE / "notebooks" / "data.py").read_text()
    assert inception.WEIGHTS in cell and inception.URL.removesuffix(inception.WEIGHTS) in cell
