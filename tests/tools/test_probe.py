"""`repro probe`: every call with the shapes of every experiment, once each, and what fails by name."""

import importlib
import json
from dataclasses import replace
from importlib import metadata

import pytest
import torch
import toy_method
from toy_project import CONFIG, write_yaml

from repro.method import Probe
from repro_tools.cli import main


def fine():
    assert torch.ones(2).sum() == 2


def wrong():
    raise AssertionError("found (3,), expected (2,)")


def declare(monkeypatch, *probes, fails=None):
    def made(config, runtime):
        if fails is not None:
            raise fails
        return probes

    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, probes=made))


def probed(capsys, *arguments):
    code = main(["probe", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)["probes"]


def test_what_is_fine_passes_with_the_version_of_its_library(project, monkeypatch, capsys):
    declare(monkeypatch, Probe("sum", "numpy", "(2,)", fine))
    code, (one,) = probed(capsys)
    assert code == 0
    assert one["version"] == metadata.version("numpy")
    assert (one["name"], one["shapes"], one["experiments"], one["error"]) == ("sum", "(2,)", ["toy"], None)


def test_a_wrong_answer_is_named_with_its_line_and_the_others_are_still_called(project, monkeypatch, capsys):
    declare(monkeypatch, Probe("rows", "torch", "(2, 3)", wrong), Probe("sum", "torch", "(2,)", fine))
    code, (first, second) = probed(capsys)
    assert code == 1
    line = wrong.__code__.co_firstlineno + 1
    assert first["error"].startswith("AssertionError: found (3,), expected (2,) (")
    assert first["error"].endswith(f"test_probe.py:{line})")
    assert second["error"] is None


def test_an_assertion_without_words_is_told_by_its_source(project, monkeypatch, capsys):
    own = project / "own_probes.py"  # pytest gives the assertions of its own files words
    own.write_text("import math\n\n\ndef call():\n    assert math.prod((2, 2)) == 5\n")
    monkeypatch.syspath_prepend(project)
    declare(monkeypatch, Probe("product", "torch", "(2,)", importlib.import_module("own_probes").call))
    _, (one,) = probed(capsys)
    assert one["error"] == "AssertionError: assert math.prod((2, 2)) == 5 (own_probes.py:5)"


def test_a_library_that_is_not_installed_is_named(project, monkeypatch, capsys):
    declare(monkeypatch, Probe("sum", "no-such-library", "(2,)", fine))
    code, (one,) = probed(capsys)
    assert code == 1 and one["version"] is None
    assert one["error"] == "found no distribution 'no-such-library', expected it installed; `pip list` has the names"


def test_probes_that_cannot_be_made_are_a_failed_row(project, monkeypatch, capsys):
    declare(monkeypatch, fails=KeyError("blur"))
    code, (one,) = probed(capsys)
    assert code == 1 and one["error"].startswith("KeyError: 'blur' (")


def test_equal_shapes_of_two_experiments_are_called_once_and_others_each(project, monkeypatch, capsys):
    for name, size in (("same", 64), ("other", 32)):
        write_yaml(project / "configs" / f"{name}.yaml", CONFIG | {"experiment": name, "pool_size": size})
    calls = []

    def made(config, runtime):
        size = config.pool_size
        return [Probe("pool", "torch", f"({size},)", lambda: calls.append(size))] * 2

    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, probes=made))
    _, found = probed(capsys)
    assert sorted(calls) == [32, 64]
    assert {one["shapes"]: sorted(one["experiments"]) for one in found} == {
        "(64,)": ["same", "toy"],
        "(32,)": ["other"],
    }
    _, found = probed(capsys, "other")
    assert [one["experiments"] for one in found] == [["other"]]


def test_overrides_give_other_shapes(project, monkeypatch, capsys):
    def made(config, runtime):
        return [Probe("pool", "torch", f"({config.pool_size},)", fine)]

    monkeypatch.setattr(toy_method, "METHOD", replace(toy_method.METHOD, probes=made))
    _, (one,) = probed(capsys, "--set", "pool_size=7")
    assert one["shapes"] == "(7,)"


def test_draws_do_not_depend_on_the_probes_before_and_gradients_are_given_back(project, monkeypatch, capsys):
    drawn = []

    def draws():
        drawn.append(torch.rand(3).tolist())
        torch.set_grad_enabled(False)

    first, second = Probe("first", "torch", "(3,)", draws), Probe("second", "torch", "(3,)", draws)
    declare(monkeypatch, first, second)
    probed(capsys)
    declare(monkeypatch, second)
    probed(capsys)
    assert drawn[1] == drawn[2] != drawn[0]
    assert torch.is_grad_enabled()


def test_what_a_library_prints_is_no_data(project, monkeypatch, capsys):
    declare(monkeypatch, Probe("loud", "torch", "()", lambda: print("[KeOps] Compiling cuda jit compiler engine")))
    assert main(["probe", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["probes"] and "[KeOps]" in output.err


def test_the_table_fits_a_terminal_and_ends_with_what_failed(project, monkeypatch, capsys):
    long = "a shape that is told in so many words that no column could ever hold it " * 2
    declare(monkeypatch, Probe("sum", "torch", long, fine), Probe("rows", "torch", "(2, 3)", wrong))
    assert main(["probe"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[-2].startswith("FAILED rows, (2, 3), toy: AssertionError: found (3,), expected (2,) (")
    assert lines[-1].startswith("2 probes, 1 failed; ")


def test_a_method_without_probes_is_told_how_to_get_some(project, capsys):
    assert main(["probe"]) == 0
    assert capsys.readouterr().out.startswith("no probes: give the Method `probes`")


@pytest.mark.parametrize("arguments", [["no-such"], ["--set", "pool=1"]])
def test_bad_input_is_refused_in_one_line(project, capsys, arguments):
    assert main(["probe", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("repro: ")
