"""With how many micro-batches, or with which minibatch, a phase fits into a device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from repro.config import load
from repro.errors import BadInput
from repro.method import Project
from repro.phases import Phase
from repro.runtime import Runtime
from repro_tools.memory.fake import CPU, CannotRehearse
from repro_tools.memory.footprint import Footprint, needed, of_phase

PROBES = 4


@dataclass(frozen=True)
class Divided:
    """The micro-batches with which a phase fits, the rows of the largest; `needed` bytes of the device."""

    micro_batches: int
    rows: int
    needed: int


@dataclass(frozen=True)
class Smaller:
    """Overrides with which a phase fits, for as many examples in all; `needed` bytes of the device. `changes`: what else they change."""

    overrides: tuple[str, ...]
    needed: int
    changes: str


def more_micro_batches(
    phases: Callable[[], Sequence[Phase]], found: Footprint, room: int, processes: int = 1
) -> Divided | str:
    """The fewest micro-batches of the phase of `found` that need at most `room` bytes, or one line that says why there are none.

    `phases` makes those of the experiment anew.
    """
    if found.bound:
        return found.bound
    names = [phase.name for phase in phases()]
    index = names.index(found.name)

    def needs(count: int) -> int:
        own, before = phases()[index], phases()[:index]
        one = of_phase(own, before, processes=processes, micro_batches=count, work=False)
        return needed(one, one.parts[0], processes)

    try:
        count = fewest(needs, found.rows, needed(found, found.parts[0], processes), room, found.micro_batches)
        if count is None:
            return (
                "not even one example at a time fits: the networks, gradients and the optimiser's state are too large"
            )
        return Divided(count, -(-found.rows // count), needs(count))
    except (BadInput, CannotRehearse) as error:
        return f"no micro-batches were found: {error}"


def fewest(needs: Callable[[int], int], rows: int, size_now: int, room: int, now: int = 1) -> int | None:
    """The smallest number of parts of `rows` above `now` with needs(number) <= room, verified; None when parts of one row are too large.

    Memory grows in proportion to the rows of a part, above what is always there: two points give the line, and each guess is tried, in
    turn with the middle.
    """
    if rows <= now:
        return None
    sizes = {now: size_now, rows: needs(rows)}
    low, high, by_line = now, rows, True
    if sizes[rows] > room:
        return None
    while high - low > 1:
        guess = (low + high) // 2
        if by_line:
            slope = (sizes[low] - sizes[high]) / (rows / low - rows / high)
            guess = math.ceil(rows / max(1.0, rows / high + (room - sizes[high]) / slope))
        by_line = not by_line
        guess = min(max(guess, low + 1), high - 1)
        sizes[guess] = needs(guess)
        low, high = (low, guess) if sizes[guess] <= room else (guess, high)
    return high


def smaller_minibatch(
    project: Project, experiment: str, overrides: list[str], found: Footprint, room: int, processes: int = 1
) -> Smaller | str:
    """The largest minibatch of the phase of `found` that needs at most `room` bytes, or one line that says why there is none.

    A configuration has it, by convention, as `phases.<name>.batch_size` beside `phases.<name>.iterations`.
    """
    path, key = project.experiments()[experiment], f"phases.{found.name}"

    def phases(batch_size: int) -> list:
        config, _ = load(project.config_class(experiment), path, [*overrides, f"{key}.batch_size={batch_size}"])
        return list(project.method.phases(config, Runtime(CPU)))

    def needs(batch_size: int) -> int:
        names = [phase.name for phase in phases(batch_size)]
        index = names.index(found.name)
        own, before = phases(batch_size)[index], phases(batch_size)[:index]
        one = of_phase(own, before, processes=processes, micro_batches=found.micro_batches, work=False)
        return needed(one, one.parts[0], processes)

    batch_size = found.rows * processes
    try:
        size = largest(
            needs, batch_size, needed(found, found.parts[0], processes), room, processes, found.parts[0].times
        )
    except (BadInput, CannotRehearse) as error:
        return f"no smaller minibatch was found: {error}"
    if size is None:
        return (
            "not even a minibatch of one example fits: the networks, gradients and the optimiser's state are too large"
        )
    iterations = -(-batch_size * found.parts[0].times // size)
    (phase,) = (phase for phase in phases(size) if phase.name == found.name)
    return Smaller((f"{key}.batch_size={size}", f"{key}.iterations={iterations}"), needs(size), phase.minibatch_defines)


def largest(
    needs: Callable[[int], int], batch_size: int, size_now: int, room: int, multiple: int = 1, iterations: int = 1
) -> int | None:
    """The largest size below `batch_size` with needs(size) <= room, verified; None when one `multiple` is too large already.

    Memory grows in proportion to the minibatch, above what is always there: two points give the line, and each guess is tried.
    Sizes that divide batch_size * iterations are preferred, when there is one within a fifth: then as many examples are seen.
    """
    low = max(multiple, batch_size // 2 // multiple * multiple)
    if low >= batch_size:
        return None
    at_low = needs(low)
    slope = (size_now - at_low) / (batch_size - low)
    guess = low if slope <= 0 else low + int((room - at_low) // slope)
    for _ in range(PROBES):
        guess = min(guess, batch_size - multiple) // multiple * multiple
        if guess < multiple:
            break
        guess = next(_divisors(guess, multiple, batch_size * iterations), guess)
        if needs(guess) <= room:
            return guess
        guess = int(guess * 0.95) if guess > 20 * multiple else guess - multiple
    return multiple if needs(multiple) <= room else None


def _divisors(guess: int, multiple: int, examples: int) -> Iterator[int]:
    return (size for size in range(guess, int(guess * 0.8), -1) if size % multiple == 0 and examples % size == 0)
