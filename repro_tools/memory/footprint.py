"""How much device memory a phase needs: its real step on fake tensors, and what no tracker of tensors sees, as named allowances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repro.config import RunConfig
from repro.method import Method
from repro.phases import Phase, Work
from repro.runtime import Runtime
from repro_tools.memory.fake import AsOnAGpu, Rehearsal, as_on_a_gpu, fake_tensors, networks, reported_as
from repro_tools.memory.storages import REST, LiveStorages, Peak

STEPS = 3
"""The optimiser's state exists after the first step, the second is the first one to have all of it, the third shows what piles up."""
MIB = 2**20

CONTEXT = 600 * MIB
FRAGMENTATION = 0.10
MATRIX_WORKSPACE = 32 * MIB
CONVOLUTION_WORKSPACE = 256 * MIB


@dataclass(frozen=True)
class Allowance:
    """Memory that is not in the tracked peak, and where its size comes from."""

    name: str
    size: int
    origin: str


@dataclass(frozen=True)
class Part:
    """A piece of work on the device and the worst moment in it. `times`: how often a run does it."""

    name: str
    times: int
    peak: Peak


@dataclass(frozen=True)
class Footprint:
    """What a phase, or the evaluation, holds on the device.

    rows: of the minibatch in one process, 0 for the evaluation; `micro_batches`: into how many it is divided. parts: the step first (not for the evaluation), then other work.
    piling_up: bytes more that are alive after a step than after the one before; 0 unless something is kept.
    gradients: bytes of them. storage: bytes kept on the host, by name. notes: what is to be known besides.
    bound: why a minibatch in other parts gives another result, as far as that is known without data.
    """

    name: str
    rows: int
    parts: tuple[Part, ...]
    piling_up: int
    gradients: int
    convolves: bool
    storage: Mapping[str, int]
    notes: tuple[str, ...] = ()
    micro_batches: int = 1
    bound: str = ""

    @property
    def largest(self) -> Part:
        return max(self.parts, key=lambda part: part.peak.in_blocks)


def allowances(found: Footprint, part: Part, processes: int = 1) -> list[Allowance]:
    """What comes to the tracked peak of `part` on a GPU. Nothing of it was measured here: there was no GPU."""
    made = [
        Allowance("CUDA context", CONTEXT, "assumed; it grows with the GPU and the kernels loaded"),
        Allowance(
            "fragmentation",
            round(FRAGMENTATION * part.peak.in_blocks),
            f"assumed: {FRAGMENTATION:.0%} of the peak, what PyTorch's tests of its own tracker accept",
        ),
        Allowance(
            "matrix workspace",
            MATRIX_WORKSPACE,
            "CUBLAS_WORKSPACE_CONFIG=:4096:8, which `repro run` sets: 8 buffers of 4 MiB",
        ),
    ]
    if found.convolves:
        made.append(Allowance("convolution workspace", CONVOLUTION_WORKSPACE, "assumed; cuDNN chooses it by algorithm"))
    if processes > 1:
        made.append(
            Allowance("gradient buckets", found.gradients, "one flat copy of the gradients, in which they are added up")
        )
    return made


def needed(found: Footprint, part: Part, processes: int = 1) -> int:
    """Bytes of a device's memory that `part` takes, allowances included."""
    return part.peak.in_blocks + sum(one.size for one in allowances(found, part, processes))


def of_phase(
    phase: Phase,
    before: Sequence[Phase],
    *,
    processes: int = 1,
    micro_batches: int = 1,
    steps: int = STEPS,
    fake: bool = True,
    work: bool = True,
) -> Footprint:
    """The footprint of a fresh `phase` after the phases `before` it. With `fake` False the same steps are done on real CPU tensors.

    Raises CannotRehearse where the phase does not run without data.
    """
    what = f"phase {phase.name}"
    with reported_as(what):
        others = tuple(phase.work()) if work else ()
    tensors, live = _tensors(fake), LiveStorages()
    with tensors, live, reported_as(what):
        earlier = networks(before)
        live.label("earlier networks", _held(*earlier.values()))
        rehearsal = Rehearsal(phase, earlier, processes, micro_batches=micro_batches)
        live.label("parameters", _held(rehearsal.model))
        live.label("average", _held(rehearsal.average))
        live.label_rest("optimiser")  # some keep a copy of the weights from the beginning
        rehearsal.draw()
        live.forget()  # that lies on the host
        peak, piling_up = _worst(live, rehearsal, [rehearsal.model], [rehearsal.optimiser], steps)
        operations = frozenset(live.operations)
        parts = [_part(live, one) for one in others]
    minibatch = sum(column.nbytes for column in rehearsal.minibatch.values())
    step = Part("step", phase.steps, _apart(peak, "minibatch", minibatch))
    return Footprint(
        phase.name,
        max((len(column) for column in rehearsal.minibatch.values()), default=0),
        (step, *parts),
        piling_up,
        sum(weight.nbytes for weight in rehearsal.model.parameters() if weight.requires_grad),
        "aten::convolution" in operations,
        dict(phase.storage()),
        _notes(operations, rehearsal.model),
        micro_batches,
        _bound(phase, rehearsal),
    )


def _bound(phase: Phase, rehearsal: Rehearsal) -> str:
    if phase.parts_define:
        return f"in other parts it is another method: the paper means {phase.parts_define} within each part"
    if rehearsal.couples_rows:
        return "a run in parts is refused: its batch norm takes the statistics of a part"
    return ""


def of_evaluation(
    method: Method, config: RunConfig, phases: Sequence[Phase], runtime: Runtime, *, fake: bool = True
) -> Footprint | None:
    """The footprint of an evaluation, with all networks on the device; None where the method says nothing about it."""
    tensors, live = _tensors(fake), LiveStorages()
    with tensors, live, reported_as("evaluation"):
        models = networks(phases)
        live.label("parameters", _held(*models.values()))
    with reported_as("evaluation"):
        work = tuple(method.evaluation_work(config, models, runtime))
    with tensors, live, torch.no_grad(), reported_as("evaluation"):
        parts = tuple(_part(live, one) for one in work)
    convolves = "aten::convolution" in live.operations
    return (
        Footprint("evaluation", 0, parts, 0, 0, convolves, {}, _notes(live.operations, *models.values()))
        if parts
        else None
    )


def of_step(
    build: Callable[[], tuple],
    step: Callable[..., object],
    *,
    steps: int = STEPS,
    fake: bool = True,
    on_a_gpu: bool = True,
) -> Part:
    """The worst moment of any training step: `step(*build())` is done `steps` times.

    `build` makes everything, modules, optimisers, minibatch, so that no tensor comes from outside. It may return several
    optimisers; with `on_a_gpu` the CPU does what a GPU does where that matters (see `repro_tools.memory.fake`: as_on_a_gpu, AsOnAGpu).
    """
    tensors, live = _tensors(fake), LiveStorages()
    with tensors, live, reported_as("step"):
        made = build()
        modules = [one for one in made if isinstance(one, nn.Module)]
        optimisers = [one for one in made if isinstance(one, torch.optim.Optimizer)]
        for optimiser in optimisers if on_a_gpu else ():
            as_on_a_gpu(optimiser)
        live.label("parameters", _held(*modules))
        live.label("minibatch", [one for one in made if isinstance(one, Tensor)])
        with AsOnAGpu() if on_a_gpu else nullcontext():
            return Part("step", 1, _worst(live, lambda number: step(*made), modules, optimisers, steps)[0])


def _tensors(fake: bool) -> AbstractContextManager:
    return fake_tensors() if fake else nullcontext()


def _worst(
    live: LiveStorages,
    step: Callable[[int], object],
    modules: Sequence[nn.Module],
    optimisers: Sequence[torch.optim.Optimizer],
    steps: int,
) -> tuple[Peak, int]:
    """The worst moment of `steps` steps, and the bytes by which the last one left more behind than the one before.

    Gradients and optimiser state are told apart as they come into being.
    """
    for module in modules:
        for weight in module.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: live.label("gradients", [weight.grad]))
    live.restart()
    left = []
    for number in range(steps):
        step(number)
        left.append(live.alive)
        for optimiser in optimisers:
            states = optimiser.state.values()
            live.label("optimiser", [one for state in states for one in state.values() if isinstance(one, Tensor)])
    return live.peak, left[-1] - left[-2] if steps >= STEPS else 0


def _part(live: LiveStorages, work: Work) -> Part:
    live.restart()
    work.run()
    return Part(work.name, work.times, live.peak)


def _apart(peak: Peak, kind: str, size: int) -> Peak:
    """`size` bytes of what is not told apart, under a name of their own."""
    rest = peak.by_kind.get(REST, 0)
    return Peak(peak.total, peak.in_blocks, {**peak.by_kind, kind: min(size, rest), REST: max(0, rest - size)})


def _held(*modules: nn.Module | None) -> list[Tensor]:
    return [one for module in modules if module is not None for one in (*module.parameters(), *module.buffers())]


def _notes(operations: Set[str], *models: nn.Module) -> tuple[str, ...]:
    found = []
    if "aten::_safe_softmax" in operations:
        found.append(
            "attention is not fused, all its weights lie in memory: the last dimension of query, key or value is not contiguous, or a "
            "mask needs a gradient; a GPU has no fused kernel for that either"
        )
    if any(isinstance(module, nn.RNNBase) for model in models for module in model.modules()):
        found.append(
            "recurrent layers are counted step by step in time; cuDNN keeps a buffer of its own, which was not compared"
        )
    return tuple(found)
