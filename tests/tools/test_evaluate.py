"""`repro evaluate`: the same networks give the same numbers, nothing is lost, and no later evaluation makes a run count that did not."""

import copy
import json
import shutil
import sys
from dataclasses import replace

import pytest
import toy_protocol
import yaml
from toy_project import CONFIG, SPEC, write_yaml

from repro import run
from repro.method import Evaluation
from repro_tools.cli import main
from repro_tools.report.results import collect


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project with seeds 0 and 1 of its experiment trained."""
    root = tmp_path_factory.mktemp("trained") / "project"
    write_yaml(root / "configs" / "toy.yaml", CONFIG | {"evaluation": {"points": 11}})
    write_yaml(root / "spec.yaml", SPEC)
    (root / "pyproject.toml").write_text('[tool.repro]\nmethod = "toy_protocol:METHOD"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed in ("0", "1"):
            assert main(["run", "toy", "--seeds", seed]) == 0
    return root


@pytest.fixture
def project(trained, tmp_path, monkeypatch, capsys):
    """A copy of the trained project; the working directory is inside it."""
    root = tmp_path / "project"
    shutil.copytree(trained, root)
    monkeypatch.chdir(root)
    capsys.readouterr()
    return root


def folder(root, seed=0):
    return root / "runs" / "toy" / f"seed-{seed}"


def record(root, seed=0):
    return json.loads((folder(root, seed) / "record.json").read_text())


def verdict():
    """The verdict on the toy's claim, as `repro report` gives it."""
    assert main(["report"]) == 0
    with open("reports/results.json") as file:
        (claim,) = json.load(file)["claims"]
    return claim["verdict"], claim["reason"]


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(root, capsys, *arguments):
    """The lines of a command that must be refused with exit code 2 and nothing written."""
    before = contents(root)
    assert main(["evaluate", *arguments]) == 2
    output = capsys.readouterr()
    assert contents(root) == before and output.out == ""
    return output.err.strip().splitlines()


def test_the_same_networks_give_the_same_numbers(project, capsys):
    before = record(project)
    tensors = (folder(project) / "tensors.safetensors").read_bytes()
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert record(project)["metrics"] == before["metrics"]
    assert (folder(project) / "tensors.safetensors").read_bytes() == tensors
    assert "2 of 2 metrics as before; the old record is in superseded-1" in capsys.readouterr().out


def test_an_evaluation_that_is_not_seeded_is_seen(project, capsys, monkeypatch):
    """The fault that the test above would miss if it compared nothing."""
    monkeypatch.setattr(run, "seed_global_generators", lambda *_: None)
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    told = capsys.readouterr().out
    assert "0 of 2 metrics as before" in told and "constant.value  " in told and " -> " in told


def test_the_old_record_is_kept_and_the_new_one_says_when_and_by_what(project):
    before = record(project)
    old = (folder(project) / "record.json").read_bytes()
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert (folder(project) / "superseded-1" / "record.json").read_bytes() == old
    assert (folder(project) / "superseded-1" / "tensors.safetensors").exists()
    after = record(project)
    later = after.pop("evaluated_later")
    assert later["supersedes"] == "superseded-1" and later["changed"] == []
    assert {"command", "commit", "versions", "machine", "started"} <= later.keys()
    for facts in (before, after):
        facts["wall_s"].pop("evaluate")
    assert after == before  # what the training was stays as it was


def test_the_record_names_the_version_of_what_only_the_evaluation_imports(project, tmp_path, monkeypatch):
    """A metric's library is often imported where it is used, after the run began."""
    info = tmp_path / "lazy_metric-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lazy-metric\nVersion: 1.2.3\n")
    (info / "top_level.txt").write_text("lazy_metric\n")
    (tmp_path / "lazy_metric.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    real = toy_protocol.METHOD.evaluate

    def evaluate(*arguments):
        __import__("lazy_metric")
        return real(*arguments)

    monkeypatch.setattr(toy_protocol, "METHOD", replace(toy_protocol.METHOD, evaluate=evaluate))
    for command in (["run", "toy", "--seeds", "2"], ["evaluate", "toy", "--seeds", "0"]):
        monkeypatch.delitem(sys.modules, "lazy_metric", raising=False)
        assert main(command) == 0
    versions = record(project, 2)["versions"], record(project)["evaluated_later"]["versions"]
    assert [found["lazy-metric"] for found in versions] == ["1.2.3", "1.2.3"]
    assert all("torch" in found and "python" in found for found in versions)


def test_each_evaluation_is_kept(project):
    for _ in range(2):
        assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    kept = json.loads((folder(project) / "superseded-2" / "record.json").read_text())
    assert kept["evaluated_later"]["supersedes"] == "superseded-1"
    assert "evaluated_later" not in json.loads((folder(project) / "superseded-1" / "record.json").read_text())


def test_all_runs_are_judged_unless_seeds_are_named(project, capsys):
    assert main(["evaluate", "toy", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["run"] for one in told] == ["runs/toy/seed-0", "runs/toy/seed-1"]
    assert all(one["moved"] == {} and one["metrics"] == 2 for one in told)


def test_metrics_that_moved_came_or_went_are_shown(project, capsys, monkeypatch):
    value = record(project)["metrics"]["constant.value"]
    monkeypatch.setattr(toy_protocol, "evaluate", lambda *_: Evaluation({"constant.value": value + 1, "new": 2.0}))
    assert main(["evaluate", "toy", "--seeds", "0", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["moved"]["constant.value"] == {"before": value, "after": value + 1}
    assert told["moved"]["new"] == {"before": None, "after": 2.0} and told["moved"]["line.error"]["after"] is None


def test_a_metric_that_is_no_number_is_the_same_as_before(project, capsys, monkeypatch):
    monkeypatch.setattr(toy_protocol, "evaluate", lambda *_: Evaluation({"constant.value": float("nan")}))
    assert main(["evaluate", "toy", "--seeds", "0"]) == main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert "1 of 1 metrics as before" in capsys.readouterr().out.splitlines()[-1]


def test_another_protocol_is_a_departure_and_the_shipped_one_is_none(project):
    assert verdict()[0] == "reproduced"
    assert main(["evaluate", "toy", "--seeds", "0", "--set", "evaluation.points=7"]) == 0
    changed = record(project)
    assert changed["departures"] == changed["evaluated_later"]["changed"] == ["evaluation.points: 11 -> 7"]
    assert changed["config"]["evaluation"]["points"] == 7
    assert main(["report"]) == 2  # it does not take the place of the full one
    assert main(["report", "--out", "other"]) == 0
    with open("other/results.json") as file:
        assert json.load(file)["claims"][0]["verdict"] == "inconclusive"
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert record(project)["departures"] == [] and verdict()[0] == "reproduced"


def test_a_protocol_that_the_shipped_configuration_changed_is_shown(project):
    write_yaml(project / "configs" / "toy.yaml", CONFIG | {"evaluation": {"points": 5}})
    assert main(["evaluate", "toy"]) == 0
    assert record(project)["departures"] == []
    assert verdict()[0] == "reproduced"
    assert "with evaluation.points: 11 -> 5" in (project / "reports" / "README.md").read_text()


def test_a_later_evaluation_fixes_no_tolerance_after_the_run(project):
    """Were the hashes of the claims written anew, a widened tolerance would count."""
    spec = copy.deepcopy(SPEC)
    spec["tolerances"]["wide"]["reproduced"] = 0.9
    write_yaml(project / "spec.yaml", spec)
    assert main(["evaluate", "toy"]) == 0
    assert verdict() == ("inconclusive", "the claim or its tolerance was changed after the run")


def test_a_shortened_run_stays_one_although_the_shipped_configuration_became_as_short(project):
    shortened = ["--runs", "short"]
    for seed in ("0", "1"):
        assert main(["run", "toy", "--train-iters", "3", "--seeds", seed, *shortened]) == 0
    config = copy.deepcopy(CONFIG) | {"evaluation": {"points": 11}}
    for phase in config["phases"].values():
        phase["iterations"] = 3
    write_yaml(project / "configs" / "toy.yaml", config)
    assert main(["evaluate", "toy", *shortened]) == 0
    assert {one["departures"][0] for one in collect(project / "short", project / "reports")} == {
        "phases.constant.iterations: 9 -> 3"
    }


def test_a_superseded_record_is_not_counted(project):
    assert main(["evaluate", "toy"]) == 0
    old = folder(project) / "superseded-1" / "record.json"
    planted = json.loads(old.read_text())
    planted["metrics"]["constant.value"] = 1e6
    old.write_text(json.dumps(planted))
    records = collect(project / "runs", project / "reports")
    assert [one["seed"] for one in records] == [0, 1] and max(one["metrics"]["constant.value"] for one in records) < 10


def test_a_kill_in_between_leaves_the_old_record(project, monkeypatch, capsys):
    before = (folder(project) / "record.json").read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("repro_tools.evaluate.write_record", killed)
        assert main(["evaluate", "toy", "--seeds", "0"]) == 130
    assert (folder(project) / "record.json").read_bytes() == before
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert record(project)["evaluated_later"]["supersedes"] == "superseded-2"


def test_an_evaluation_that_fails_writes_nothing(project, monkeypatch):
    def fails(*_):
        raise ValueError("no data")

    before = contents(project)
    monkeypatch.setattr(toy_protocol, "evaluate", fails)
    with pytest.raises(ValueError, match="no data"):
        main(["evaluate", "toy", "--seeds", "0"])
    assert contents(project) == before


def test_the_threads_are_those_of_the_run(project):
    path = folder(project) / "record.json"
    before = json.loads(path.read_text())
    before["machine"]["threads"] = 3
    path.write_text(json.dumps(before))
    assert main(["evaluate", "toy", "--seeds", "0"]) == 0
    assert record(project)["evaluated_later"]["machine"]["threads"] == 3


def test_an_unfinished_run_is_refused(project, capsys):
    (folder(project, 1) / "record.json").unlink()
    (line,) = refused(project, capsys, "toy")
    assert (
        "seed-1: found no record.json, expected a finished run; finish it with `repro run toy --seeds 1 --resume`"
        in line
    )


def test_a_phase_without_a_network_is_refused(project, capsys):
    (folder(project) / "2-constant" / "model.safetensors").unlink()
    (line,) = refused(project, capsys, "toy", "--seeds", "0")
    assert "2-constant: found no model.safetensors, expected phase constant to be finished" in line


def test_a_damaged_network_is_refused(project, capsys):
    path = folder(project) / "1-line" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    (line,) = refused(project, capsys, "toy", "--seeds", "0")
    assert "1-line/model.safetensors: no sound checkpoint" in line


def test_the_network_of_another_seed_is_refused(project, capsys):
    shutil.copyfile(
        folder(project, 1) / "1-line" / "model.safetensors", folder(project) / "1-line" / "model.safetensors"
    )
    (line,) = refused(project, capsys, "toy", "--seeds", "0")
    assert "seed: found a state of 1, expected 0" in line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--train-iters", "3"], "found another configuration, phases.constant.iterations: 9 -> 3; phases.line"),
        (
            ["--set", "pool_size=32", "--set", "evaluation.points=3"],
            "found another configuration, pool_size: 64 -> 32, expected",
        ),
        (["--seeds", "7"], "seed-7: found no run, expected one that `repro run toy --seeds 7` wrote"),
        (["--runs", "nowhere"], "nowhere/toy: found no run"),
        (["--set", "evaluation.point=3"], "did you mean 'evaluation.points'?"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(project, capsys, arguments, expected):
    seeds = [] if "--seeds" in arguments or "--runs" in arguments else ["--seeds", "0"]
    (line,) = refused(project, capsys, "toy", *arguments, *seeds)
    assert expected in line


def test_a_run_of_another_configuration_is_refused(project, capsys):
    path = folder(project) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["pool_size"] = 65
    path.write_text(yaml.safe_dump(config))
    (line,) = refused(project, capsys, "toy", "--seeds", "0")
    assert "pool_size: 65 -> 64, expected that of the run in all but evaluation.*" in line


def test_several_processes_are_refused(project, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = refused(project, capsys, "toy")
    assert "found 2 processes, expected one" in line
