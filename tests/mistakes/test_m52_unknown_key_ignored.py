"""m52: an unknown key in a configuration, an override or on the command line is ignored.

A misspelt name is refused by its name, in every section of a configuration, and nothing is trained with the value that stood there before.
"""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from proof import Proof
from pydantic import BaseModel

from repro import config
from repro.errors import BadInput
from repro_tools import cli

ROOT = Path(__file__).parents[2]


def sections(data, place=()):
    """The place of every mapping in nested data."""
    if isinstance(data, dict):
        yield place
        for name, child in data.items():
            yield from sections(child, (*place, name))


def refusal(load):
    try:
        load()
    except BadInput as error:
        return str(error)
    return None


def check_file(experiment, project, tmp_path):
    """In each section stands a key more than is known, one letter from a known one."""
    path, model = project.experiments()[experiment], project.config_class(experiment)
    data = config.read_yaml(path)
    for place in sections(data):
        changed = deepcopy(data)
        section = changed
        for name in place:
            section = section[name]
        misspelt = f"{next(iter(section))}s"
        section[misspelt] = 7
        edited, key = tmp_path / f"{experiment}.yaml", ".".join([*place, misspelt])
        edited.write_text(yaml.safe_dump(changed))
        told = refusal(lambda: config.load(model, edited))
        assert told, f"{experiment}: the key {key} was accepted, and nothing reads it"
        assert key in told, f"{experiment}: the key {key} was refused without its name: {told}"


def check_override(project):
    path, model = project.experiments()["2d-moons"], project.config_class("2d-moons")
    for key in ("phases.*.learning_rates", "phases.velocityfield.learning_rate", "sinkhorn.blurr", "epochs"):
        told = refusal(lambda: config.load(model, path, [f"{key}=7"]))
        assert told, f"the override of {key} was accepted, and nothing reads it"
        assert key in told, f"the override of {key} was refused without its name: {told}"


def check_command(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for option in ("--train-itres", "--learning-rate"):
        try:
            code = cli.main(["run", "2d-moons", "--dry-run", option, "5"])
        except SystemExit as end:
            code = end.code
        assert code == 2, f"the option {option} was accepted, and nothing reads it: exit code {code}"
        assert option in capsys.readouterr().err, f"the option {option} was refused without its name"


def default_of_pydantic(monkeypatch):
    """A model that is told nothing leaves unknown keys out."""
    real = config.Section.model_validate_json.__func__
    monkeypatch.setattr(
        config.Section, "model_validate_json", classmethod(lambda kind, text: real(kind, text, extra="ignore"))
    )


def one_section_picks_what_it_knows(monkeypatch):
    """The others refuse. One is read by hand: steps=flow["steps"], step_size=flow["step_size"]."""
    real = config.validate

    def validate(model, data, source):
        data = deepcopy(data)
        first = data["phases"]["velocity_field"]
        first["flow"] = {key: first["flow"][key] for key in ("steps", "step_size")}
        return real(model, data, source)

    monkeypatch.setattr(config, "validate", validate)


def added_and_left_out(monkeypatch):
    """An override sets a key of a dictionary, whether it was there or not; the typed configuration leaves it out."""
    default_of_pydantic(monkeypatch)
    real = config._override

    def override(data, text):
        try:
            return real(data, text)
        except BadInput:
            key, _, value = text.partition("=")
            data[key] = value
            return []

    monkeypatch.setattr(config, "_override", override)


def options_known_so_far(monkeypatch):
    monkeypatch.setattr(cli.Parser, "parse_args", lambda self, words: self.parse_known_args(words)[0])


def held_against_the_file_afterwards(monkeypatch):
    """Left out when it is read, and missed in what came of it."""
    default_of_pydantic(monkeypatch)
    real = config.validate

    def validate(model, data, source):
        made = real(model, data, source)
        lost = config.flatten(data).keys() - config.flatten(made).keys()
        if lost:
            raise BadInput(f"{source}: nothing reads {', '.join(sorted(lost))}")
        return made

    monkeypatch.setattr(config, "validate", validate)


def refused_without_a_hint(monkeypatch):
    monkeypatch.setattr(config, "_hint", lambda word, known: "")


def abbreviations_allowed(monkeypatch):
    """--train-iter for --train-iters is understood, not ignored."""
    real = cli.Parser.__init__

    def init(self, **arguments):
        real(self, **arguments)
        self.allow_abbrev = True

    monkeypatch.setattr(cli.Parser, "__init__", init)


PROOFS = [
    *(
        Proof(
            partial(check_file, experiment),
            {
                default_of_pydantic: f"{experiment}: the key experiments was accepted, and nothing reads it",
                one_section_picks_what_it_knows: f"{experiment}: the key phases.velocity_field.flow.stepss was accepted",
            },
            [held_against_the_file_afterwards, refused_without_a_hint],
        )
        for experiment in ("2d-moons", "digits")
    ),
    Proof(
        check_override,
        {added_and_left_out: "the override of phases.*.learning_rates was accepted, and nothing reads it"},
        [refused_without_a_hint],
    ),
    Proof(
        check_command,
        {options_known_so_far: "the option --train-itres was accepted, and nothing reads it: exit code 0"},
        [abbreviations_allowed],
    ),
]


def test_proof(case):
    case()


def test_a_key_that_stands_in_the_place_of_the_right_one_is_missed_even_then(monkeypatch, project, tmp_path):
    """No value that shapes a result is a default of the code."""
    default_of_pydantic(monkeypatch)
    path = tmp_path / "2d-moons.yaml"
    text = project.experiments()["2d-moons"].read_text(encoding="utf-8")
    path.write_text(text.replace("learning_rate:", "learning_rates:"))
    told = refusal(lambda: config.load(project.config_class("2d-moons"), path))
    assert "phases.velocity_field.learning_rate: found nothing, expected a value" in told


def test_pydantic_ignores_unless_it_is_told():
    class Training(BaseModel):
        learning_rate: float = 1e-3

    assert Training.model_validate({"learning_rates": 1.0}).learning_rate == 1e-3


def test_a_group_of_parameters_takes_any_key():
    """`lr` is the name. Other keys of a group are kept beside it, for optimisers that read more."""
    weights = [torch.nn.Parameter(torch.zeros(1))]
    (group,) = torch.optim.Adam([{"params": weights, "learning_rate": 1.0}], lr=1e-3).param_groups
    assert group["lr"] == 1e-3 and group["learning_rate"] == 1.0
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        torch.optim.Adam(weights, learning_rate=1.0)
