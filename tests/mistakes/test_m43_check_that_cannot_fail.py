"""m43: a check that asks `any`, or cannot fail.

`repro preflight` names one layer that is not trained among others that are. And a proof of this folder passes only if its check sees the mistake:
a check that stays green, fails for another reason, or crashes proves nothing.
"""

from pathlib import Path

import pytest
import torch
from proof import Proof, _call
from torch import nn

from repro.phases import SingleLossPhase
from repro.runtime import Runtime
from repro_tools.preflight import trial
from repro_tools.preflight.checks import Findings
from repro_tools.preflight.trial import STEPS, Trial, try_phases

LAYERS = 3
FROZEN = 1
"""The one of the layers that is not trained."""


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(LAYERS)))


class Sound(SingleLossPhase):
    """Three layers, all of which are trained."""

    name, iterations = "sound", STEPS

    def make_model(self):
        return layers()

    def make_optimiser(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def minibatch(self, step, generator):
        return {"x": torch.randn(8, 4, generator=generator)}

    def loss(self, model, batch):
        return (model(batch["x"]) - batch["x"]).square().mean()


class BeginsAtZero(Sound):
    """No gradient passes the last layer at the first step, by design."""

    name = "begins at zero"

    def make_model(self):
        model = layers()
        nn.init.zeros_(model[-1].weight)
        return model


class FrozenOnPurpose(Sound):
    name = "frozen on purpose"

    def make_model(self):
        model = layers()
        model[FROZEN].requires_grad_(False)
        return model

    def make_optimiser(self, model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


class Detached(Sound):
    name = "detached"

    def loss(self, model, batch):
        hidden = nn.functional.linear(model[0](batch["x"]), model[1].weight.detach(), model[1].bias.detach())
        return (model[2](hidden) - batch["x"]).square().mean()


class Forgotten(Sound):
    """By the optimiser."""

    name = "forgotten"

    def make_optimiser(self, model):
        return torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)


class RateOfZero(Sound):
    name = "rate of zero"

    def make_optimiser(self, model):
        return torch.optim.SGD([{"params": one.parameters(), "lr": 0.1 * (one is not model[FROZEN])} for one in model])


PHASES = {
    Sound: None,
    BeginsAtZero: None,
    FrozenOnPurpose: None,
    Detached: "gradients",
    Forgotten: "training",  # the engine ends it itself: a gradient is left over that no optimiser takes
    RateOfZero: "updates",
}
"""The row that must fail."""


def check_preflight(tmp_path):
    """Of three layers one is not trained, and its two parameters are named."""
    findings = Findings("layers")
    try_phases(
        Trial(
            phases=lambda: [one() for one in PHASES], wider=None, batch_sizes={}, ignored_iterations={}, seed=0,
            runtime=Runtime(torch.device("cpu"), Path("data")), folder=tmp_path,
        ),
        findings,
    )  # fmt: skip
    for phase, expected in PHASES.items():
        told = {row.check: row.text for row in findings.rows if row.phase == phase.name and row.status == "fail"}
        assert list(told) == ([expected] if expected else []), (
            f"{phase.name}: found the failed rows {list(told)}, expected {expected or 'none'}"
        )
        for name, _ in layers().named_parameters():
            of_the_frozen = name.startswith(f"{FROZEN}.") and expected is not None
            assert (name in told.get(expected, "")) == of_the_frozen, f"{phase.name}: {told[expected]}: {name}"


def any_gradient(monkeypatch):
    monkeypatch.setattr(trial, "_fault_of_gradients", lambda seen: None if seen.reached else "no gradient reaches it")


def any_movement(monkeypatch):
    monkeypatch.setattr(trial, "_fault_of_updates", lambda seen: None if trial._moved(seen) else "nothing moved")


def a_gradient_in_each_layer_at_the_first_step(monkeypatch):
    """Too strict by as much: what begins at zero has none yet."""
    real = trial._Seen.look_at_gradients

    def look_at_gradients(self):
        if not self.reached:
            real(self)

    def fault(seen):
        lacking = [name for name, p in seen.weights.items() if p.requires_grad and name not in seen.pushed]
        return f"no gradient reaches {', '.join(lacking)}" if lacking else None

    monkeypatch.setattr(trial._Seen, "look_at_gradients", look_at_gradients)
    monkeypatch.setattr(trial, "_fault_of_gradients", fault)


def each_parameter_by_itself(monkeypatch):
    """Right for networks without normalisation."""

    def fault(seen):
        still = [name for name in seen.weights if name in seen.pushed - trial._moved(seen)]
        return f"a gradient reaches {', '.join(still)}, which did not move" if still else None

    monkeypatch.setattr(trial, "_fault_of_updates", fault)


def any_of_each_layer(monkeypatch):
    """`any` within a layer, `all` over the layers."""

    def fault(seen):
        pushed = sorted(seen.pushed)
        moved = {name.rpartition(".")[0] for name in trial._moved(seen)}
        still = [name for name in pushed if name.rpartition(".")[0] not in moved]
        return f"a gradient reaches {', '.join(still)}, which did not move" if still else None

    monkeypatch.setattr(trial, "_fault_of_updates", fault)


# --- the proofs themselves

TRAINED = {"layers": tuple(range(LAYERS))}


def moved():
    """Which layers a step moves."""
    model = layers()
    before = [one.weight.detach().clone() for one in model]
    optimiser = torch.optim.SGD([p for number in TRAINED["layers"] for p in model[number].parameters()], lr=0.1)
    model(torch.ones(2, 4)).square().mean().backward()
    optimiser.step()
    return [not torch.equal(one.weight, old) for one, old in zip(model, before, strict=True)]


def one_layer_frozen(monkeypatch):
    monkeypatch.setitem(TRAINED, "layers", (0, 2))


def layers_in_another_order(monkeypatch):
    monkeypatch.setitem(TRAINED, "layers", (2, 1, 0))


def patch_that_breaks_the_code(monkeypatch):
    monkeypatch.delitem(TRAINED, "layers")


REASON = f"layer {FROZEN} did not move"


def asks_all():
    found = moved()
    assert all(found), f"layer {found.index(False)} did not move"


def asks_any():
    assert any(moved()), REASON


def asks_nothing():
    moved()


def fails_for_another_reason():
    assert len(moved()) == LAYERS and all(moved()), "the network has too few layers"


WORTHLESS = {
    "a check that asks any": (asks_any, one_layer_frozen),
    "a check without an assertion": (asks_nothing, one_layer_frozen),
    "a check that fails for another reason": (fails_for_another_reason, one_layer_frozen),
    "a patch that breaks the code": (asks_all, patch_that_breaks_the_code),
}


def check_proofs(request):
    """A proof passes whose check asks all. It does not where the plant goes unseen, or is seen for another reason; none is made without a plant."""
    innocent = [layers_in_another_order]
    Proof(asks_all, {one_layer_frozen: REASON}, innocent).run(one_layer_frozen, REASON, request)
    for what, (check, plant) in WORTHLESS.items():
        try:
            Proof(check, {plant: REASON}, innocent).run(plant, REASON, request)
        except (Exception, pytest.fail.Exception):
            continue
        raise AssertionError(f"{what} is taken for a proof")
    for what, plant in {"no plant": {}, "a plant without a reason": {one_layer_frozen: ""}}.items():
        try:
            Proof(asks_all, plant, innocent)
        except ValueError:
            continue
        raise AssertionError(f"{what} is taken for a proof")


def run_as(monkeypatch, judge):
    """Another way to run a proof; `judge(error, reason)` says whether what the check raised counts."""

    def run(self, patch, reason, request):
        with pytest.MonkeyPatch.context() as own:
            _call(patch, request, monkeypatch=own)
            found = None
            try:
                _call(self.check, request)
            except Exception as error:
                found = error
        if not judge(found, reason):
            pytest.fail(f"{self}: found {found!r}")

    monkeypatch.setattr(Proof, "run", run)


def run_only(monkeypatch):
    """The plant is applied and the check is called; nobody asks what came of it."""
    run_as(monkeypatch, lambda error, reason: True)


def any_error_is_red(monkeypatch):
    run_as(monkeypatch, lambda error, reason: error is not None)


def any_assertion_is_red(monkeypatch):
    run_as(monkeypatch, lambda error, reason: isinstance(error, AssertionError))


def proof_of_the_green_case_alone(monkeypatch):
    monkeypatch.setattr(Proof, "__post_init__", lambda self: None)


def words_of_any_error_compared(monkeypatch):
    """But those of the reason: a crash says something else."""
    run_as(monkeypatch, lambda error, reason: error is not None and reason in str(error))


def message_begins_with_the_reason(monkeypatch):
    run_as(monkeypatch, lambda error, reason: isinstance(error, AssertionError) and str(error).startswith(reason))


PROOFS = [
    Proof(
        check_preflight,
        plant={
            any_gradient: "detached: found the failed rows [], expected gradients",
            any_movement: "rate of zero: found the failed rows [], expected updates",
            a_gradient_in_each_layer_at_the_first_step: "begins at zero: found the failed rows ['gradients'], expected none",
        },
        innocent=[each_parameter_by_itself, any_of_each_layer],
    ),
    Proof(
        check_proofs,
        plant={
            run_only: "a check that asks any is taken for a proof",
            any_error_is_red: "a check that fails for another reason is taken for a proof",
            any_assertion_is_red: "a check that fails for another reason is taken for a proof",
            proof_of_the_green_case_alone: "no plant is taken for a proof",
        },
        innocent=[words_of_any_error_compared, message_begins_with_the_reason],
    ),
]


def test_proof(case):
    case()
