"""Commands that know one network with one loss say of another loop that they did not measure it: no finding, no pass."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import toy_method
import toy_project
from own_loop_method import CONFIG
from toy_method import Line
from toy_project import SPEC, write_yaml

from repro.checkpoint import load
from repro.config import validate
from repro_tools.cli import main
from repro_tools.memory.fake import CannotRehearse, Rehearsal
from repro_tools.own_loop import EXIT_NOT_MEASURED, own_loops


@dataclass
class Checked:
    """What `repro check` would say of a complete specification."""

    findings: list


SETTINGS = [
    {"name": key, "experiments": "toy", "key": key, "value": value, "origin": "assumed", "where": "page 1", "alternatives": ["1"], "why": "for a test"}
    for key, value in (("phases.wgan.generator_iterations", 7), ("phases.ppo.rounds", 2))
]  # fmt: skip


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "project"
    write_yaml(root / "configs/toy.yaml", CONFIG)
    write_yaml(root / "spec.yaml", SPEC | {"settings": SETTINGS})
    (root / "pyproject.toml").write_text('[tool.repro]\nmethod = "own_loop_method:METHOD"\n')
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("command", [["memory", "toy", "--on", "T4"], ["diagnose", "toy"]])
def test_a_command_that_knows_one_loss_only_measures_nothing(project, capsys, command):
    assert main(command) == EXIT_NOT_MEASURED
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("repro: ")]
    assert lines == [f"repro: toy: phase {name}: not measured: own loop" for name in ("wgan", "ppo")]
    assert "finding" not in told.out


def test_preflight_tries_the_loop_and_says_what_it_cannot_look_at(project, capsys, monkeypatch):
    monkeypatch.setattr("repro_tools.check.command.check_project", lambda *_: Checked([]))
    assert main(["preflight", "--json"]) == EXIT_NOT_MEASURED
    found = json.loads(capsys.readouterr().out)
    status = {(row["check"], row["phase"]): row["status"] for row in found["rows"]}
    assert found["failed"] == 0
    for phase in ("wgan", "ppo"):
        assert {status[check, phase] for check in ("minibatch", "training", "checkpoint", "boundary", "resume")} == {
            "pass"
        }
        assert {status[check, phase] for check in ("overrides", "rehearsal", "gradients", "updates")} == {
            "not measured"
        }


def test_a_fault_of_another_loop_still_fails(project, capsys, monkeypatch):
    from methods.wgan_gp import WGAN

    sound = WGAN.train_step

    def remembers(self, state, batch, update):
        self.calls = getattr(self, "calls", 0) + 1
        sound(self, state, {name: self.calls * column for name, column in batch.items()}, update)

    monkeypatch.setattr(WGAN, "train_step", remembers)
    assert main(["preflight", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    failed = {(row["check"], row["phase"]) for row in rows if row["status"] == "fail"}
    assert failed - {("spec", None)} == {("resume", "wgan")}


def test_two_loops_run_are_listed_judged_and_have_their_curves(project, capsys):
    assert main(["run", "toy", "--seeds", "0"]) == 0
    record = json.loads((project / "runs/toy/seed-0/record.json").read_text())
    assert set(record["curves"]["wgan"]) == {"generator", "critic"}
    assert set(record["curves"]["ppo"]) == {"steps for each fall", "loss"}
    assert set(load(project / "runs/toy/seed-0/1-wgan/model.safetensors")["networks"]) == {"generator"}
    capsys.readouterr()
    assert main(["list"]) == 0
    assert "1 wgan (7 steps, 7 generator iterations, " in capsys.readouterr().out
    assert main(["report"]) == 0
    assert main(["evaluate", "toy"]) == 0
    assert "2 of 2 metrics as before" in capsys.readouterr().out


class OneLossOnRounds(Line):
    collect_every = 4


def test_one_loss_on_what_a_round_made_is_another_loop_too():
    config = validate(toy_method.Config, toy_project.CONFIG, "toy")
    assert own_loops([OneLossOnRounds(config), Line(config)]) == ["line"]
    with pytest.raises(CannotRehearse, match="phase line: not measured: own loop"):
        Rehearsal(OneLossOnRounds(config), {})
