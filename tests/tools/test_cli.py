import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch
import toy_method
import yaml
from toy_method import Config, Constant, Line
from toy_project import CONFIG, SPEC, python_path, write_yaml

from repro import run
from repro.__main__ import LINE
from repro.config import RunConfig, Section
from repro.errors import BadInput
from repro.method import find_project
from repro.run import execute, plan
from repro.runtime import Runtime
from repro_tools.cli import COMMANDS, main
from repro_tools.run import _line, add_arguments


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def record(root, seed=0):
    return json.loads((root / "runs" / "toy" / f"seed-{seed}" / "record.json").read_text())


def refused(project, capsys, *arguments):
    """Runs a command that must be refused in one line, with exit code 2 and nothing written."""
    before = files(project)
    assert main(list(arguments)) == 2
    output = capsys.readouterr()
    assert files(project) == before and output.out == ""
    (line,) = output.err.strip().splitlines()
    assert line.startswith("repro: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert f"example: repro {command}" in told and "--json" in told


def test_help_and_misspelt_commands_do_not_wait_for_pytorch():
    look = "import sys; from repro_tools.cli import main\ntry: main({})\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    for arguments, code in ((["--help"], 0), (["chekc"], 2)):
        done = subprocess.run([sys.executable, "-c", look.format(arguments)], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == f"{code} False", done.stderr


def test_what_a_method_prints_when_it_is_imported_is_no_data(project):
    (project / "chatty.py").write_text("print('Warning: no CUDA')\nfrom toy_method import METHOD\n")
    (project / "pyproject.toml").write_text('[tool.repro]\nmethod = "chatty:METHOD"\n')
    environment = os.environ | {"PYTHONPATH": python_path()}
    arguments = [sys.executable, "-m", "repro_tools", "list", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == {"toy": {"line": 12, "constant": 9}} and "no CUDA" in done.stderr


def test_list_shows_experiments_and_phases(project, capsys):
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "toy: 1 line (12 steps), 2 constant (9 steps)\n"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"toy": {"line": 12, "constant": 9}}


def test_a_run_leaves_a_record_of_where_it_came_from(project, capsys):
    assert main(["run", "toy", "--seeds", "3"]) == 0
    assert capsys.readouterr().out.strip() == "runs/toy/seed-3"
    found = record(project, 3)
    assert found["experiment"] == "toy" and found["seed"] == 3 and found["departures"] == []
    assert found["config"] == CONFIG and len(found["config_hash"]) == 12
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["cores"] >= 1
    assert found["commit"] == "none"
    assert found["parameters"] == {"line": 25, "constant": 2}
    assert found["planned_seeds"] == [0, 1]
    assert set(found["claims"]) == {"constant"} and set(found["metrics"]) == {"line.error", "constant.value"}
    assert [step for step, _ in found["curves"]["line"]["loss"]] == [3, 6, 9, 12]


def test_train_iters_reaches_every_phase_and_says_so(project, capsys):
    assert main(["run", "toy", "--train-iters", "2"]) == 0
    changes = ["phases.constant.iterations: 9 -> 2", "phases.line.iterations: 12 -> 2"]
    told = capsys.readouterr().err.splitlines()
    assert sorted(told[:2]) == [f"toy: {change}" for change in changes]
    assert record(project)["departures"] == changes


def test_an_override_back_to_the_shipped_value_is_no_departure(project):
    assert main(["run", "toy", "--set", "phases.line.iterations=12"]) == 0
    assert record(project)["departures"] == []


def test_a_dry_run_prints_the_resolved_configuration_and_writes_nothing(project, capsys):
    before = files(project)
    assert main(["run", "toy", "--set", "pool_size=7", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"toy": {**CONFIG, "pool_size": 7}}
    assert files(project) == before


def test_an_existing_run_is_not_overwritten(project, capsys):
    assert main(["run", "toy"]) == 0
    capsys.readouterr()
    assert "found a run, expected none; continue it with --resume" in refused(project, capsys, "run", "toy")


def test_resume_of_a_finished_run_changes_nothing(project, capsys):
    assert main(["run", "toy"]) == 0
    before = record(project)
    assert main(["run", "toy", "--resume"]) == 0
    assert record(project) == before


def test_resume_with_another_configuration_is_refused_with_the_difference(project, capsys):
    assert main(["run", "toy"]) == 0
    capsys.readouterr()
    write_yaml(
        project / "configs" / "toy.yaml",
        {**CONFIG, "phases": {**CONFIG["phases"], "line": {**CONFIG["phases"]["line"], "batch_size": 9}}},
    )
    found = refused(project, capsys, "run", "toy", "--resume")
    assert "phases.line.batch_size: found 8, expected 9 as configured now; repeat the options of the run" in found


def test_the_pace_may_change_between_sessions_and_costs_no_verdict(project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", "toy"]) == 130
    assert main(["run", "toy", "--resume", "--set", "pace.checkpoint_every=2"]) == 0
    assert record(project)["departures"] == []


def test_a_resume_says_where_it_goes_on(project, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "loss", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", "toy"]) == 130
    capsys.readouterr()
    assert main(["run", "toy", "--resume"]) == 0
    assert capsys.readouterr().err.startswith("runs/toy/seed-0: goes on at phase 2 constant, from its beginning\n")


def test_a_later_phase_is_given_the_earlier_networks_frozen(project, monkeypatch):
    given = {}
    monkeypatch.setattr(Constant, "prepare", lambda self, seed, scratch, earlier: given.update(earlier))
    assert main(["run", "toy"]) == 0
    assert list(given) == ["line"] and not given["line"].training
    assert not any(parameter.requires_grad for parameter in given["line"].parameters())


def test_a_claim_whose_metric_was_not_measured_is_named_with_the_likely_one(project, capsys):
    spec = {**SPEC, "claims": [{**SPEC["claims"][0], "metric": "constant.valu"}]}
    write_yaml(project / "spec.yaml", spec)
    assert main(["run", "toy"]) == 0
    assert (
        "claim constant: found metric 'constant.valu', which no evaluation gave; did you mean 'constant.value'?"
        in capsys.readouterr().err
    )


def test_the_method_is_told_what_the_machine_is(project, monkeypatch):
    method, given = toy_method.METHOD, []
    watched = replace(
        method,
        phases=lambda config, runtime: given.append(runtime) or method.phases(config, runtime),
        evaluate=lambda *arguments: given.append(arguments[-1]) or method.evaluate(*arguments),
    )
    monkeypatch.setattr(toy_method, "METHOD", watched)
    options = ["--data-root", "sets", "--determinism", "warn", "--micro-batches", "line=2", "--workers", "1"]
    assert main(["run", "toy", "--device", "cpu", *options]) == 0
    asked = {"determinism": "warn", "micro_batches": {"line": 2}, "workers": 1}
    assert given == 2 * [Runtime(torch.device("cpu"), Path("sets"), **asked)]


def test_what_a_phase_says_of_the_machine_is_told_once_with_its_number(project, capsys, monkeypatch):
    monkeypatch.setattr(Constant, "check", lambda self, folder: [f"lies in {folder}"])
    assert main(["run", "toy"]) == 0
    told = "runs/toy/seed-0: 2 constant: lies in runs/toy/seed-0/2-constant"
    assert [line for line in capsys.readouterr().err.splitlines() if "lies in" in line] == [told]


def lacking(self, folder):
    raise BadInput("phases.x: found no memory, expected some")


def test_a_machine_without_what_the_last_phase_needs_is_refused_before_the_first(project, capsys, monkeypatch):
    monkeypatch.setattr(Constant, "check", lacking)
    assert refused(project, capsys, "run", "toy") == "repro: phases.x: found no memory, expected some"


def test_a_finished_phase_asks_for_nothing(project, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "minibatch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["run", "toy"]) == 130
    monkeypatch.setattr(Line, "check", lacking)
    assert main(["run", "toy", "--resume"]) == 0


def with_classes(monkeypatch, classes):
    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, config=classes))


def test_the_first_pattern_that_matches_gives_the_configuration(project, monkeypatch):
    other = type("Other", (RunConfig,), {})
    with_classes(monkeypatch, {"toy": Config, "t*": other, "*": RunConfig})
    classes = [find_project(project).config_class(name) for name in ("toy", "toy-2", "digits")]
    assert classes == [Config, other, RunConfig]
    assert main(["run", "toy"]) == 0


@pytest.mark.parametrize("command", [["list"], ["run", "toy"]])
def test_an_experiment_without_a_configuration_class_is_refused(project, capsys, monkeypatch, command):
    with_classes(monkeypatch, {"2d-*": Config})
    expected = "configs: found experiment 'toy', expected a name like 2d-*, for which toy has a configuration"
    assert expected in refused(project, capsys, *command)


@pytest.mark.parametrize("classes", [Section, {"toy": Config, "*": Section}])
def test_a_configuration_class_of_another_kind_is_refused(project, capsys, monkeypatch, classes):
    with_classes(monkeypatch, classes)
    expected = "found the configuration Section, expected a subclass of repro.config.RunConfig"
    assert expected in refused(project, capsys, "list")


def test_another_kit_than_the_one_beside_the_method_is_refused(project, capsys):
    (project / "repro").mkdir()
    (project / "repro" / "__init__.py").write_text("")
    found = refused(project, capsys, "run", "toy")
    assert "found the kit of" in found and f"expected {project / 'repro'}" in found


def test_a_configuration_without_a_pace_is_refused_before_anything_is_written(project, capsys):
    write_yaml(project / "configs" / "toy.yaml", {key: value for key, value in CONFIG.items() if key != "pace"})
    assert "pace: found nothing, expected a value" in refused(project, capsys, "run", "toy")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_refused(project, capsys, name):
    (project / "file").write_text("")
    assert "expected a folder that can be made" in refused(project, capsys, "run", "toy", "--runs", name)


def test_a_report_of_runs_that_are_not_there_is_refused(project, capsys):
    assert "--runs: found no folder nowhere" in refused(project, capsys, "report", "--runs", "nowhere")


def test_resume_after_a_kill_in_the_second_phase_gives_the_same_run(project, monkeypatch, capsys):
    assert main(["run", "toy", "--runs", "whole"]) == 0
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(Constant, "loss", killed)
        assert main(["run", "toy", "--runs", "killed"]) == 130
        assert "--resume" in capsys.readouterr().err
    assert main(["run", "toy", "--runs", "killed", "--resume"]) == 0
    whole, killed = (
        json.loads((project / name / "toy" / "seed-0" / "record.json").read_text()) for name in ("whole", "killed")
    )
    for key in ("metrics", "curves", "config_hash", "parameters"):
        assert whole[key] == killed[key]


def test_resume_phase_starts_that_phase_over_and_keeps_the_old_one(project):
    assert main(["run", "toy"]) == 0
    before = record(project)
    assert main(["run", "toy", "--resume-phase", "2"]) == 0
    folder = project / "runs" / "toy" / "seed-0"
    assert record(project)["metrics"] == before["metrics"]
    assert files(folder / "superseded-1") == [
        "2-constant/log.jsonl",
        "2-constant/model.safetensors",
        "record.json",
        "tensors.safetensors",
    ]


def test_resume_phase_needs_the_phases_before_it(project, capsys):
    assert "expected phase 1 (line) to be finished" in refused(project, capsys, "run", "toy", "--resume-phase", "2")
    assert "--resume-phase: found 3, expected one of: 1 line, 2 constant" in refused(
        project, capsys, "run", "toy", "--resume-phase", "3"
    )


def test_a_run_in_micro_batches_is_judged_anew_and_reported_with_what_is_known_of_its_parts(project, capsys):
    assert main(["run", "toy", "--seeds", "0", "--micro-batches", "2"]) == 0
    assert main(["evaluate", "toy"]) == 0
    assert record(project)["micro_batches"] == {"line": 2, "constant": 2}
    assert main(["report"]) == 0
    page = (project / "reports" / "README.md").read_text()
    assert "cores, line in 2 micro-batches, constant in 2 micro-batches |" in page
    told = "the gradient of the whole; what a step draws at random is equal in distribution only"
    assert f"\n- R1: line, 2 micro-batches: {told}\n" in page
    assert "\n- R1: constant, 2 micro-batches: the gradient of the whole\n" in page


def test_a_seed_that_is_named_twice_is_one_run(project, monkeypatch):
    started = []
    monkeypatch.setattr("repro_tools.run.execute_many", lambda plans, seeds, *rest: started.append(seeds) or [])
    main(["run", "toy", "--seeds", "1", "0", "1", "--jobs", "2"])
    assert started == [[1, 0]]


def test_processes_are_given_what_the_command_was_given(project, monkeypatch):
    given = []
    monkeypatch.setattr("repro_tools.run.execute_many", lambda *arguments: given.extend(arguments[4]) or [])
    options = ["--micro-batches", "2", "line=3", "--workers", "4", "--determinism", "warn"]
    main(["run", "toy", "--seeds", "0", "1", "--jobs", "2", *options])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    found = parser.parse_args(["toy", *given])
    assert (found.micro_batches, found.workers, found.determinism) == ({"*": 2, "line": 3}, 4, "warn")


def test_several_seeds_run_in_processes_and_failures_are_named(project, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forked.Command)
    machine = ["--device", "cpu", "--data-root", "sets", "--determinism", "warn"]
    machine += ["--micro-batches", "line=2"]
    assert main(["run", "toy", "--seeds", "0", "1", "--jobs", "2", *machine]) == 0
    assert all(record(project, seed)["micro_batches"] == {"line": 2, "constant": 1} for seed in (0, 1))
    assert record(project, 0)["metrics"] != record(project, 1)["metrics"]
    assert "--seeds 1" in record(project, 1)["command"]
    assert all(" ".join(machine) in record(project, seed)["command"] for seed in (0, 1))

    broken = project / "runs" / "toy" / "seed-1" / "2-constant" / "model.safetensors"
    broken.write_bytes(b"broken")
    (project / "runs" / "toy" / "seed-1" / "record.json").unlink()
    capfd.readouterr()
    assert main(["run", "toy", "--seeds", "0", "1", "--resume"]) == 1
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 2 and errors[0].startswith("toy seed 0: was finished, ")
    assert errors[1].startswith("repro: toy seed 1: exit code 2") and "no sound checkpoint" in errors[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "tyo"], "found no experiment 'tyo', expected one of: toy"),
        (["run", "toy", "--set", "phases.*.iteration=3"], "found no field 'phases.*.iteration'"),
        (["run", "toy", "--set", "pool_size=many"], 'pool_size: found "many", expected a valid integer'),
        (["run", "toy", "--set", "experiment=other"], "experiment: found 'other', expected 'toy'"),
        (["run", "toy", "--device", "cuda:77"], "--device: found 'cuda:77', expected cpu"),
        (["run", "toy", "--device", "abacus"], "--device: found 'abacus'"),
    ],
)
def test_bad_options_are_refused_in_one_line(project, capsys, arguments, expected):
    assert expected in refused(project, capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["fly"],
        [],
        ["run", "toy", "--train-iters", "0"],
        ["run", "toy", "--seeds", "-1"],
        ["run", "toy", "--jobs", "x"],
        ["run", "toy", "--determinism", "never"],
    ],
)
def test_bad_usage_exits_with_2(project, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and "--help" in line and "_positive" not in line


def test_a_config_that_contradicts_the_spec_is_refused(project, capsys):
    write_yaml(project / "configs" / "toy.yaml", {**CONFIG, "pool_size": 65})
    assert "configs/toy.yaml: pool_size: found 65, expected 64" in refused(project, capsys, "run", "toy")


def test_a_config_under_another_name_is_refused(project, capsys):
    write_yaml(project / "configs" / "other.yaml", CONFIG)
    assert "other.yaml: experiment: found 'toy', expected 'other'" in refused(project, capsys, "run", "other")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("spec.yaml", None, "spec.yaml: found no such file"),
        ("spec.yaml", "[", "spec.yaml, line"),
        ("configs/toy.yaml", "experiment: toy\nexperiment: toy\n", "found the key 'experiment' twice"),
        ("pyproject.toml", None, "found no pyproject.toml with a [tool.repro] table"),
        ("pyproject.toml", "[tool.repro]\n", "tool.repro.method: found None"),
        ("pyproject.toml", '[tool.repro]\nmethod = "toy_method"\n', "expected 'package.module:OBJECT'"),
        ("pyproject.toml", '[tool.repro]\nmethod = "absent:METHOD"\n', "No module named 'absent'"),
        ("pyproject.toml", '[tool.repro]\nmethod = "toy_method:Config"\n', "expected a repro.method.Method"),
        ("pyproject.toml", "[", "no TOML"),
    ],
)
def test_a_missing_or_broken_file_is_named(project, capsys, name, text, expected):
    (project / name).unlink()
    if text is not None:
        (project / name).write_text(text)
    assert expected in refused(project, capsys, "run", "toy")


def test_the_report_holds_every_claim_with_its_origin(project, capsys, monkeypatch):
    for seed in (0, 1):
        assert main(["run", "toy", "--seeds", str(seed), "--set", "phases.constant.iterations=9"]) == 0
    capsys.readouterr()
    assert main(["report", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)
    (claim,) = json.loads((project / "reports" / "results.json").read_text())["claims"]
    assert verdicts == {"constant": claim["verdict"]}
    for key in (
        "id",
        "metric",
        "reported",
        "reproduced",
        "floor",
        "tolerance",
        "verdict",
        "commit",
        "config_hash",
        "machine",
        "seeds",
    ):
        assert key in claim
    assert claim["seeds"] == [0, 1] and len(claim["reproduced"]["values"]) == 2
    page = (project / "reports" / "README.md").read_text()
    assert "The constant is three." in page and f"| {claim['verdict']} |" in page


def test_a_report_comes_out_the_same_from_the_stored_records(project, capsys):
    assert main(["run", "toy"]) == 0
    assert main(["report"]) == 0
    first = (project / "reports" / "results.json").read_bytes()
    (project / "runs").rename(project / "elsewhere")
    assert main(["report"]) == 0
    assert (project / "reports" / "results.json").read_bytes() == first


def test_a_shortened_run_is_labelled_on_the_page(project):
    assert main(["run", "toy", "--train-iters", "1"]) == 0
    assert main(["report"]) == 0
    assert "Shortened runs" in (project / "reports" / "README.md").read_text()


def test_off_a_terminal_no_bar_is_drawn_and_no_source_tree_is_needed(project):
    """Run as a user does, in a process of its own: data on standard output, what happened on standard error."""
    write_yaml(project / "spec.yaml", SPEC)
    environment = {"PYTHONPATH": python_path(), "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-m", "repro_tools", "run", "toy"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=project,
    )
    assert (result.returncode, result.stdout) == (0, "runs/toy/seed-0\n")
    assert re.fullmatch(r"toy seed 0: [\d.]+ s, constant.value [\d.]+\nnext: repro report\n", result.stderr)
    assert yaml.safe_load((project / "runs/toy/seed-0/config.yaml").read_text()) == CONFIG


def test_every_finished_run_is_told_in_a_line_and_then_what_comes_next(project, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", forked.Command)
    assert main(["run", "toy", "--seeds", "0", "1", "--jobs", "2", "--runs", "my runs", "--device", "cpu"]) == 0
    told = capfd.readouterr()
    *lines, last = told.err.splitlines()
    assert told.out == "my runs\n" and last == "next: repro report --runs 'my runs'"
    assert [re.sub(r"[\d.]+ s,.*", "T", line) for line in sorted(lines)] == ["toy seed 0: T", "toy seed 1: T"]
    value = json.loads((project / "my runs/toy/seed-1/record.json").read_text())["metrics"]["constant.value"]
    assert sorted(lines)[1].endswith(f"s, constant.value {value:.2f}")


def test_both_metrics_of_a_difference_are_told(project, capsys):
    claim = SPEC["claims"][0] | {"minus": "line.error"}
    write_yaml(project / "spec.yaml", SPEC | {"claims": [claim]})
    assert main(["run", "toy"]) == 0
    assert re.search(r" s, constant.value [\d.]+, line.error [\d.]+\n", capsys.readouterr().err)


@pytest.mark.parametrize("part", ["divided_by", "minus", "floor"])
def test_a_second_metric_that_no_evaluation_gave_is_named(project, capsys, part):
    write_yaml(project / "spec.yaml", SPEC | {"claims": [SPEC["claims"][0] | {part: "line.eror"}]})
    assert main(["run", "toy"]) == 0
    told = "claim constant: found metric 'line.eror', which no evaluation gave; did you mean 'line.error'?"
    assert told in capsys.readouterr().err


def test_a_run_that_was_finished_before_is_told_as_such(project, capsys):
    assert main(["run", "toy"]) == 0
    assert "was finished" not in capsys.readouterr().err
    assert main(["run", "toy", "--resume"]) == 0
    assert capsys.readouterr().err.startswith("toy seed 0: was finished, ")


def test_a_damaged_record_of_a_finished_run_is_named_and_stops_nothing(project, capsys):
    assert main(["run", "toy"]) == 0
    (project / "runs/toy/seed-0/record.json").write_text("{")
    capsys.readouterr()
    assert main(["run", "toy", "--resume"]) == 0
    assert capsys.readouterr().err.startswith("repro: warning: runs/toy/seed-0/record.json: found no run record")


def test_many_claims_still_make_one_line(project):
    claims = [SPEC["claims"][0] | {"id": f"c{n}", "metric": f"metric.number.{n}"} for n in range(40)]
    write_yaml(project / "spec.yaml", SPEC | {"claims": claims})
    record = {"wall_s": {"line": 90.4}, "metrics": {f"metric.number.{n}": 98.0 for n in range(40)}}
    line = _line(plan(find_project(project), "toy", []), 7, record, was_there=False)
    assert line.startswith("toy seed 7: 90 s, metric.number.0 98.0, ") and len(line) <= LINE
    shown, more = re.fullmatch(r"(.*) and (\d+) more", line).groups()
    assert shown.count("metric.number") + int(more) == 40


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--json"]])
def test_a_reader_that_leaves_early_gets_no_traceback(project, arguments):
    command = [sys.executable, "-m", "repro_tools", *arguments]
    environment = {"PYTHONPATH": python_path(), "PATH": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=project
    ) as process:
        process.stdout.close()  # before anything is written: the interpreter takes longer to start
        assert process.stderr.read() == b"" and process.wait() == 141


def test_two_seeds_of_one_process_name_one_commit_though_somebody_commits_between_them(project, monkeypatch):
    commits = iter(["as read", "committed since"])
    monkeypatch.setattr(run, "git_commit", lambda root: next(commits))
    planned, runtime = plan(find_project(project), "toy", []), Runtime(torch.device("cpu"))
    for seed in (0, 1):
        folder = execute(planned, seed, project / "runs", runtime, resume=False, resume_phase=None)
        assert json.loads((folder / "record.json").read_text())["commit"] == "as read"


class KilledJob:
    """In place of subprocess.Popen: a child that the system kills, behind a line about something else."""

    def __init__(self, command, stdout, stderr, env):
        stdout.write(b"main: pool_size: 64 -> 32\n")

    def wait(self):
        return -9


def test_a_job_that_was_killed_is_told_as_that_and_how_to_go_on(project, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", KilledJob)
    assert main(["run", "toy", "--seeds", "0", "1", "--device", "cpu"]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if "seed" in line]
    assert len(lines) == 2
    assert lines[0].startswith("repro: toy seed 0: killed by SIGKILL; the same command with --resume goes on (see ")
