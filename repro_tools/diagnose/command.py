"""`repro diagnose`: measures why a phase does not train, and names the next test to make. Writes nothing."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from repro import __main__ as command_line
from repro.checkpoint import load as load_state
from repro.errors import EXIT_OK, EXIT_RUN_FAILED, BadInput
from repro.loop import FINISHED, load_networks
from repro.method import find_project
from repro.phases import Networks, Phase, SingleLossPhase
from repro.run import Plan
from repro.runtime import Runtime, World, check_precision, deterministic, find_device
from repro_tools.diagnose.bench import Bench
from repro_tools.diagnose.curves import curve_findings, curves_of, in_words
from repro_tools.diagnose.diagnostics import measure, train
from repro_tools.diagnose.explanation import Finding, Place
from repro_tools.diagnose.hypotheses import findings, notes
from repro_tools.diagnose.measured import Column, Measured
from repro_tools.gate import checked_plan
from repro_tools.own_loop import require_single_loss

STEPS = 100
BARS = "▁▂▃▄▅▆▇█"
WIDTH, INDENT = 120, 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measures each phase of an experiment: its loss at the start, a few rows fitted, a short training with true pairs and with\n"
        "shuffled ones, gradients, updates, inputs, loss by time. Each finding comes with three explanations and the cheapest test\n"
        "between them. Exit code 1 when there is one. Writes nothing; make it small with --set."
    )
    parser.epilog = "example: repro diagnose 2d-moons --set 'phases.*.pool.batches=10'"
    parser.add_argument("experiment", metavar="NAME", help="the experiment")
    parser.add_argument("--phase", metavar="NAME", help="one phase (default: all)")
    command_line.add(parser, "--set", "--train-iters")
    parser.add_argument(
        "--steps",
        type=command_line.positive,
        default=STEPS,
        metavar="N",
        help=f"steps of each fit and each training (default: {STEPS})",
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, metavar="SEED", help="default: 0")
    parser.add_argument(
        "--runs",
        type=Path,
        metavar="DIR",
        help="look at the loss curves of the runs in DIR too, and take the earlier phases' networks from there",
    )
    command_line.add(parser, "--device", "--data-root")
    parser.add_argument(
        "--stand-in", action="store_true", help="random examples in place of a data set that is not there"
    )
    command_line.add(parser, "--json")


@dataclass(frozen=True)
class Diagnosis:
    """What was found in one phase."""

    measured: Measured
    findings: list[Finding]
    notes: list[str]
    curves: dict[str, str]
    earlier: list[str]
    """Where the networks of earlier phases came from, as far as this phase asked for them."""
    prepare_s: float
    measure_s: float


def command(options: argparse.Namespace) -> int:
    planned = checked_plan(find_project(Path.cwd()), options.experiment, command_line.overrides(options))
    for change in planned.changes:
        print(f"{planned.experiment}: {change}", file=sys.stderr)
    device = find_device(options.device, World())
    runtime = Runtime(device, options.data_root, stand_in_data=options.stand_in)
    phases = list(planned.project.method.phases(planned.config, runtime))
    chosen = require_single_loss(_chosen(phases, options.phase), planned.experiment)
    run = options.runs / planned.experiment / f"seed-{options.seed}" if options.runs else None
    if run is not None and not run.parent.is_dir():
        raise BadInput(f"--runs: found no folder {run.parent}, expected the runs of {planned.experiment}")
    networks = _Networks(phases, options.seed, device, options.steps, run)
    if not options.json:
        print(f"{planned.experiment}, seed {options.seed}, {device}, {options.steps} steps for each fit and training")
    diagnoses = []
    with deterministic(device):
        for phase in chosen:
            diagnoses.append(_diagnose(phase, planned, options, networks))
            if not options.json:
                print("\n" + "\n".join(lines(diagnoses[-1])), flush=True)
    count = sum(len(one.findings) for one in diagnoses)
    if options.json:
        print(json.dumps(_plain(_as_data(planned, options, device, diagnoses)), indent=1))
    else:
        print(f"\n{_summary(diagnoses)}")
    return EXIT_RUN_FAILED if count else EXIT_OK


def open_phase(
    experiment: str, phase: str, seed: int = 0, overrides: Sequence[str] = ()
) -> tuple[SingleLossPhase, nn.Module, dict[str, Tensor]]:
    """A prepared phase, its fresh network and its first minibatch, on the CPU: for a look by hand.

    The network comes as it is measured: in train mode, its dropout at rest. Raises NotMeasured for a phase with a loop of its own.
    """
    planned = checked_plan(find_project(Path.cwd()), experiment, list(overrides))
    device = torch.device("cpu")
    phases = list(planned.project.method.phases(planned.config, Runtime(device)))
    (one,) = require_single_loss(_chosen(phases, phase)[:1], planned.experiment)
    networks = _Networks(phases, seed, device, STEPS, None)
    with tempfile.TemporaryDirectory() as scratch:
        one.prepare(seed, Path(scratch), networks.before(one))
        bench = Bench(one, seed, device)
        return one, bench.model(), bench.minibatch(0, "draws")


def _chosen(phases: Sequence[Phase], name: str | None) -> list[Phase]:
    chosen = [phase for phase in phases if name in (None, phase.name)]
    if not chosen:
        raise BadInput(
            f"--phase: found no phase '{name}', expected one of: {', '.join(phase.name for phase in phases)}"
        )
    return chosen


class _Networks:
    """The network of each phase, for the phases behind it: of a finished run, else trained here, when it is asked for."""

    def __init__(self, phases: Sequence[Phase], seed: int, device: torch.device, steps: int, run: Path | None):
        self._phases, self._seed, self._device, self._steps, self._run = phases, seed, device, steps, run
        self._ready: dict[str, Networks] = {}
        self.told: list[str] = []

    def before(self, phase: Phase) -> Mapping[str, Networks]:
        position = next(index for index, one in enumerate(self._phases) if one is phase)
        return _Lazy({one.name: one for one in self._phases[:position]}, self)

    def keep(self, phase: Phase, networks: Networks) -> None:
        self._ready.setdefault(phase.name, networks.eval().requires_grad_(False))

    def get(self, phase: Phase) -> Networks:
        trained = f"{phase.name}: trained here for {self._steps} steps"
        if phase.name not in self._ready:
            found = self._finished(phase)
            if found is None:
                (one,) = require_single_loss([phase], f"{phase.name}: found no finished run of it")
                with tempfile.TemporaryDirectory() as scratch:
                    one.prepare(self._seed, Path(scratch), self.before(one))
                    found = Networks({"model": train(one, self._seed, self._device, self._steps)})
                    one.release()
            else:
                trained = f"{phase.name}: of the run in {self._run}"
            self.keep(phase, found)
        self.told.append(trained)
        return self._ready[phase.name]

    def _finished(self, phase: Phase) -> Networks | None:
        for path in sorted(self._run.glob(f"*-{phase.name}/{FINISHED}")) if self._run else []:
            networks = Networks(dict(phase.rebuilt(self.before(phase))))
            try:
                load_networks(networks, load_state(path))
            except (BadInput, RuntimeError, KeyError) as error:
                raise BadInput(
                    f"{path}: found another network than that of phase {phase.name} as configured now: {' '.join(str(error).split())[:120]}"
                ) from None
            return networks.to(self._device)
        return None


class _Lazy(Mapping):
    """Networks by the name of their phase, made when they are asked for: most phases never ask."""

    def __init__(self, phases: Mapping[str, Phase], networks: _Networks):
        self._phases, self._networks = phases, networks

    def __getitem__(self, name: str) -> nn.Module:
        return self._networks.get(self._phases[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._phases)

    def __len__(self) -> int:
        return len(self._phases)


def _diagnose(phase: SingleLossPhase, planned: Plan, options: argparse.Namespace, networks: _Networks) -> Diagnosis:
    check_precision(phase.precision, phase.name, networks._device)
    with tempfile.TemporaryDirectory() as scratch:
        for line in phase.check(Path(scratch)):
            print(f"{phase.name}: {line}", file=sys.stderr)
        networks.told.clear()
        began = time.perf_counter()
        phase.prepare(options.seed, Path(scratch), networks.before(phase))
        prepared = time.perf_counter()
        measured, model = measure(phase, options.seed, networks._device, options.steps)
        measure_s = time.perf_counter() - prepared
        phase.release()
    networks.keep(phase, Networks({"model": model}))
    place = Place(
        planned.experiment,
        phase.name,
        options.seed,
        options.steps,
        tuple(command_line.overrides(options)),
        _options(options),
    )
    found, curves = findings(measured, place), {}
    if options.runs:
        for folder in sorted((options.runs / planned.experiment).glob("seed-*")):
            curve = curves_of(folder).get(phase.name)
            if curve:
                curves[str(folder)] = in_words(curve)
                found += curve_findings(curve, str(folder), measured.constant, measured.zero, place)
    return Diagnosis(measured, found, notes(measured), curves, list(networks.told), prepared - began, measure_s)


def _options(options: argparse.Namespace) -> str:
    """The options of this call, besides overrides, that a further one needs too."""
    words = ["--device", options.device] if options.device != "auto" else []
    words += ["--data-root", str(options.data_root)] if options.data_root != Path("data") else []
    words += ["--stand-in"] if options.stand_in else []
    return "".join(f" {shlex.quote(word)}" for word in words)


# --- what is shown -------------------------------------------------------------------------------------------------


def lines(one: Diagnosis) -> Iterator[str]:
    """A diagnosis as text of at most 120 columns."""
    m = one.measured
    yield f"{m.phase}  (prepared in {one.prepare_s:.1f} s, measured in {one.measure_s:.1f} s)"
    for name, text in _rows(one):
        yield from textwrap.wrap(
            f"  {name:<{INDENT - 2}}{text}", WIDTH, subsequent_indent=" " * INDENT, break_on_hyphens=False
        )
    for number, finding in enumerate(one.findings, start=1):
        yield f"  {number}. {finding.kind}: {finding.title}"
        parts = [("measured", finding.measured, "")]
        for role in ("likely", "subtle", "null"):
            hypothesis = getattr(finding, role)
            parts.append((role, f"{hypothesis.says}; then {hypothesis.then}", f"  [{hypothesis.evidence}]"))
        for role, text, mark in parts:
            yield from textwrap.wrap(
                f"     {role:<{INDENT - 5}}{text}{mark}", WIDTH, subsequent_indent=" " * INDENT, break_on_hyphens=False
            )
        for number_of_line, line in enumerate(finding.test.splitlines()):
            yield f"     {'' if number_of_line else 'test':<{INDENT - 5}}{line}"
    if not one.findings:
        yield f"  {'findings':<{INDENT - 2}}none"


def _rows(one: Diagnosis) -> Iterator[tuple[str, str]]:
    m = one.measured
    for column in m.columns:
        yield f"column {column.name}", _column(column)
    for column in m.arguments:
        if column.name not in {c.name for c in m.columns}:
            yield f"network's {column.name}", _column(column)
    if m.repeated:
        yield "repeated rows", f"{m.repeated:.0%} of a minibatch"
    if m.initial is not None:
        parts = [f"{m.initial:.4g}"]
        if m.zero is not None:
            parts.append(f"output 0 has {m.zero:.4g}, the best constant {m.constant:.4g}")
        stated = f"theory: {m.expected:.4g}" if m.expected else "theory: none given (Phase.expected_initial_loss)"
        yield "loss at the start", "; ".join([*parts, stated])
    if m.fit is not None:
        rates = ", ".join(
            f"{loss:.3g}" + ("" if factor == 1 else f" at {factor:g} x the rate")
            for factor, loss in m.fit.losses.items()
        )
        yield (
            f"{m.fit.rows} row{'s' * (m.fit.rows > 1)} fitted",
            f"from {m.fit.begun:.3g} to {rates} in {m.fit.steps} steps",
        )
    if m.learning is not None:
        shuffled = f"; pairs shuffled {m.learning.shuffled:.4g}" if m.learning.shuffled is not None else ""
        yield f"{m.learning.steps} steps", f"{m.learning.true:.4g} on other minibatches{shuffled}"
    if m.parameters is not None and m.parameters.updates:
        updates = sorted(m.parameters.updates.items(), key=lambda item: item[1])
        (low, least), (high, most) = updates[0], updates[-1]
        yield "steps / weights", f"log10 from {least:.1f} ({low}) to {most:.1f} ({high}); folklore: about -3"
    if m.parameters is not None and m.parameters.gradients:
        norms = list(m.parameters.gradients.items())
        yield (
            "gradients",
            f"norm {norms[0][1]:.2g} ({norms[0][0]}) to {norms[-1][1]:.2g} ({norms[-1][0]}) at the first step",
        )
    if m.parameters is not None and len(m.parameters.pulls) > 1:
        pulls = sorted(m.parameters.pulls.items(), key=lambda item: item[1])
        (low, least), (high, most) = pulls[0], pulls[-1]
        yield "gradient x weight", f"from {least:.2g} ({low}) to {most:.2g} ({high}), each the largest of ten steps"
    if m.flat:
        units, dead, later = (
            sum(f.units for f in m.flat),
            sum(f.dead for f in m.flat),
            sum(f.dead for f in m.flat_after),
        )
        yield (
            "dead units",
            f"{dead} of {units} before the first step" + (f", {later} after the last" if m.flat_after else ""),
        )
    if any(m.times):
        known = [pair[0] for pair in m.times if pair is not None]
        top = max(known)
        bars = "".join(
            " " if pair is None else BARS[min(7, int(8 * pair[0] / top))] if top > 0 and math.isfinite(pair[0]) else "?"
            for pair in m.times
        )
        yield "loss by time", f"0 {bars} 1   " + " ".join("-" if pair is None else f"{pair[0]:.3g}" for pair in m.times)
    for source in one.earlier:
        yield "earlier network", source
    for folder, text in one.curves.items():
        yield "curve", f"{folder}: {text}"
    for text in one.notes:
        yield "note", text


def _column(column: Column) -> str:
    places = f", {column.constant_places} places never change" if column.constant_places and not column.constant else ""
    return (
        f"{column.shape} {column.dtype}, mean {column.mean:.3g}, std {column.std:.3g}, "
        f"{column.least:.3g} to {column.most:.3g}{places}"
    )


def _summary(diagnoses: Sequence[Diagnosis]) -> str:
    count = sum(len(one.findings) for one in diagnoses)
    if not count:
        return f"no findings in {len(diagnoses)} phase{'s' * (len(diagnoses) > 1)}; what this cannot see stands in the skill's refs/debugging.md"
    first = next(one for one in diagnoses if one.findings)
    return (
        f"{count} finding{'s' * (count > 1)}, the likeliest cause first; mend {first.measured.phase} 1 "
        f"({first.findings[0].kind}) and run this again.\n"
        "Code of a test runs in Python after: from repro_tools.diagnose.command import open_phase"
    )


def _as_data(planned: Plan, options: argparse.Namespace, device: torch.device, diagnoses: Sequence[Diagnosis]) -> dict:
    return {
        "experiment": planned.experiment,
        "seed": options.seed,
        "device": str(device),
        "steps": options.steps,
        "departures": [str(change) for change in planned.departures],
        "phases": [asdict(one) for one in diagnoses],
    }


def _plain(value):
    """JSON has no number for infinity and none for NaN: they become text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
