"""m37: torchvision beside a build of torch that it was not made for.

Data sets and FID work where the compiled part of torchvision cannot be loaded, whichever of them imports it first; where it can be, nothing is declared in its place.
Both kinds of build are simulated, so that the test says the same on both; the installed one is imported in `tests/nsgf/test_torchvision_cpu.py`.
"""

import importlib
import sys
from contextlib import contextmanager
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader

import pytest
import torch
from proof import Proof

from nsgf import images, inception, torchvision_cpu

CPU = torch.device("cpu")
RULES = ("nms", "qnms")  # operators that torchvision 0.28 has a shape rule for and its compiled part declares
IMPORTERS = ("torchvision", "torch_fidelity")


class Build(MetaPathFinder, Loader):
    """Imports torchvision as one of its builds does: a shape rule for an operator that nothing has declared is an error.

    What it consists of then are the modules of the installed one.
    """

    def __init__(self, compiled):
        self.operators, self.declared = set(RULES if compiled else ()), []
        self.installed = {name: module for name, module in sys.modules.items() if name.startswith("torchvision.")}
        self.contents = vars(sys.modules["torchvision"])

    def find_spec(self, name, path=None, target=None):
        return spec_from_loader(name, self, is_package=True) if name == "torchvision" else None

    def exec_module(self, module):
        for name in RULES:
            if name not in self.operators:
                raise RuntimeError(f"operator torchvision::{name} does not exist")
        vars(module).update({name: part for name, part in self.contents.items() if not name.startswith("__")})
        sys.modules.update(self.installed)

    def define(self, name, schema):
        """torch.library.define."""
        if name.removeprefix("torchvision::") in self.operators:
            raise RuntimeError(
                f"Tried to register an operator ({name}) with the same name and overload name multiple times."
            )
        self.operators.add(name.removeprefix("torchvision::"))
        self.declared.append(name)


@contextmanager
def torchvision_of(compiled):
    """Within this block torchvision has not been imported yet, nor what imports it, and is of that kind of build."""
    torchvision_cpu.import_torchvision()
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in IMPORTERS}
    build = Build(compiled)
    with pytest.MonkeyPatch.context() as patch:
        for name in before:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [build, *sys.meta_path])
        patch.setattr(torch.library, "define", build.define)
        try:
            yield build
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in IMPORTERS]:
                del sys.modules[name]


def check(image_sets, compiled, first):
    with torchvision_of(compiled) as build:
        uses = {
            "data sets": lambda: [images.load(name, "train", image_sets) for name in ("mnist", "cifar10")],
            "FID": lambda: inception.scores({"x": noise()}, noise(), None, CPU),
        }
        for use in (first, *(set(uses) - {first}), first):
            try:
                found = uses[use]()
            except RuntimeError as error:
                raise AssertionError(f"{use}: torchvision cannot be imported: {error}") from None
            assert found, f"{use}: found nothing"
        expected = [] if compiled else [f"torchvision::{name}" for name in RULES]
        assert sorted(build.declared) == expected, f"declared are {build.declared}, expected {expected}"


def noise():
    return torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def imported_plainly(monkeypatch):
    for module in (images, inception):
        monkeypatch.setattr(module, "import_torchvision", lambda: importlib.import_module("torchvision"))


def fidelity_imported_first(monkeypatch):
    """What imports torchvision itself is imported without a thought of it."""
    monkeypatch.setattr(inception, "import_torchvision", lambda: None)


def one_operator(monkeypatch):
    """The one in the message: enough for an older torchvision."""
    monkeypatch.setattr(torchvision_cpu, "OPERATORS", ("nms",))


def declared_in_any_case(monkeypatch):
    """First the operators, then the import. Written where it is needed, and never run where it is not."""

    def import_torchvision():
        if "torchvision" not in sys.modules:
            for operator in RULES:
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return importlib.import_module("torchvision")

    for module in (images, inception):
        monkeypatch.setattr(module, "import_torchvision", import_torchvision)


def after_an_import_that_failed(monkeypatch):
    """Somebody tries the plain import first."""
    real = torchvision_cpu.import_torchvision

    def import_torchvision():
        try:
            return importlib.import_module("torchvision")
        except RuntimeError:
            return real()

    for module in (images, inception):
        monkeypatch.setattr(module, "import_torchvision", import_torchvision)


def declared_the_other_way_round(monkeypatch):
    monkeypatch.setattr(torchvision_cpu, "OPERATORS", ("qnms", "nms"))


def imported_once_at_the_beginning(monkeypatch):
    """And not again where it is needed."""
    real, kept = torchvision_cpu.import_torchvision, []

    def import_torchvision():
        kept.extend([real()] if not kept else [])
        return kept[0]

    for module in (images, inception):
        monkeypatch.setattr(module, "import_torchvision", import_torchvision)


CORRECT = [after_an_import_that_failed, declared_the_other_way_round, imported_once_at_the_beginning]
NMS = "torchvision cannot be imported: operator torchvision::nms does not exist"
QNMS = "torchvision cannot be imported: operator torchvision::qnms does not exist"
PROOFS = [
    Proof(
        partial(check, compiled=False, first="data sets"),
        plant={imported_plainly: f"data sets: {NMS}", one_operator: f"data sets: {QNMS}"},
        innocent=CORRECT,
    ),
    Proof(
        partial(check, compiled=False, first="FID"),
        plant={imported_plainly: f"FID: {NMS}", fidelity_imported_first: f"FID: {NMS}"},
        innocent=CORRECT,
    ),
    Proof(
        partial(check, compiled=True, first="data sets"),
        plant={
            declared_in_any_case: "data sets: torchvision cannot be imported: Tried to register an operator (torchvision::nms)"
        },
        innocent=[*CORRECT, imported_plainly, fidelity_imported_first],
    ),
]


def test_proof(case):
    case()


def test_the_symptom_is_what_torch_says_of_a_rule_without_an_operator():
    with pytest.raises(RuntimeError, match=r"^operator nobody::nms does not exist$"):
        torch.library.register_fake("nobody::nms")(lambda dets, scores, iou_threshold: dets)


def test_declaring_an_operator_that_is_there_is_refused():
    with torch.library._scoped_library("nobody", "FRAGMENT") as library:
        library.define("twice(Tensor x) -> Tensor")
        with pytest.raises(RuntimeError, match="with the same name and overload name multiple times"):
            torch.library.define("nobody::twice", "(Tensor x) -> Tensor")
