"""m39: a learning rate read as text from YAML.

However a learning rate is written, in the file or in an override, the optimiser of every phase gets that number.
"""

import re

import pytest
import torch
import yaml
from proof import Proof

from nsgf.phases import make_phases
from repro import config
from repro.errors import BadInput
from repro.runtime import Runtime

RATE = 1e-4
NOTATIONS = ["1e-4", "1E-4", "1e-04", "1.e-4", "1.0e-4", ".1e-3", "0.0001"]

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


def check(project, tmp_path):
    shipped = project.experiments()["2d-moons"]
    for notation in NOTATIONS:
        path = tmp_path / f"{notation}.yaml"
        path.write_text(re.sub(r"(learning_rate): \S+", rf"\1: {notation}", shipped.read_text(encoding="utf-8")))
        ways = {"file": (path, []), "override": (shipped, [f"phases.*.learning_rate={notation}"])}
        for way, (file, overrides) in ways.items():
            try:
                made, _ = config.load(project.config_class("2d-moons"), file, overrides)
                phases = make_phases(made, Runtime(torch.device("cpu")))
                rates = {phase.name: phase.make_optimiser(phase.make_model()).defaults["lr"] for phase in phases}
            except (BadInput, TypeError) as error:
                raise AssertionError(f"{notation} in the {way}: {error}") from error
            assert set(rates.values()) == {RATE}, f"{notation} in the {way}: the optimisers got {rates}"


def scalars_of_pyyaml(monkeypatch):
    """The rules of YAML 1.1: a number with an exponent has a dot and a sign."""
    monkeypatch.setattr(config, "_Loader", yaml.SafeLoader)


def overrides_by_pyyaml(monkeypatch):
    """Files are read by one parser, the command line by another."""
    real = config.parse_yaml
    monkeypatch.setattr(
        config,
        "parse_yaml",
        lambda text, source: yaml.safe_load(text) if source.startswith("--set") else real(text, source),
    )


def no_types_either(monkeypatch):
    """Nothing holds the text against the type of the field: it goes where the number belongs."""
    scalars_of_pyyaml(monkeypatch)
    real = config.validate

    def validate(model, data, source):
        written = {name: phase["learning_rate"] for name, phase in data["phases"].items() if phase}
        for name in written:
            data["phases"][name] |= {"learning_rate": RATE}
        made = real(model, data, source)
        for name, text in written.items():
            vars(getattr(made.phases, name))["learning_rate"] = text
        return made

    monkeypatch.setattr(config, "validate", validate)


def made_a_number_by_the_type(monkeypatch):
    """PyYAML reads text, and the typed configuration makes a number of it."""
    scalars_of_pyyaml(monkeypatch)
    real = config.Section.model_validate_json.__func__
    monkeypatch.setattr(
        config.Section, "model_validate_json", classmethod(lambda kind, text: real(kind, text, strict=False))
    )


def pyyaml_with_a_pattern_of_its_own(monkeypatch):
    class Loader(yaml.SafeLoader):
        pass

    pattern = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+.0123456789"))
    monkeypatch.setattr(config, "_Loader", Loader)


PROOFS = [
    Proof(
        check,
        {
            scalars_of_pyyaml: 'phases.velocity_field.learning_rate: found "1e-4", expected a valid number',
            overrides_by_pyyaml: '1e-4 in the override: --set phases.*.learning_rate=1e-4: phases.velocity_field.learning_rate: found "1e-4"',
            no_types_either: "1e-4 in the file: '<=' not supported between instances of 'float' and 'str'",
        },
        [made_a_number_by_the_type, pyyaml_with_a_pattern_of_its_own],
    )
]


def test_proof(case):
    case()


def test_what_pyyaml_reads():
    """As the entry says it."""
    read = {text: yaml.safe_load(text) for text in ("1e-4", "5e-05", "1e4", "1.0e4", "1.0e-4", "1.e-4", "0.0001")}
    assert [text for text, value in read.items() if isinstance(value, str)] == ["1e-4", "5e-05", "1e4", "1.0e4"]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_symptom_is_what_torch_says(kind):
    with pytest.raises(TypeError, match="^'<=' not supported between instances of 'float' and 'str'$"):
        kind([torch.nn.Parameter(torch.zeros(1))], lr="1e-4")


def test_a_threshold_that_is_text_is_felt_only_when_it_is_used():
    """The schedule is made without a word; the first plateau compares."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=2, eps="1e-8")
    for _ in range(3):
        schedule.step(1.0)
    with pytest.raises(TypeError, match="^'>' not supported between instances of 'float' and 'str'$"):
        schedule.step(1.0)
