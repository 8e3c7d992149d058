"""The checks of `repro preflight`: what each asks, and what to do when it fails."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["pass", "fail", "open", "not measured", "not applicable"]


@dataclass(frozen=True)
class Check:
    """`of` is what a row of the table is about, `asks` what holds when it passes, `fix` what to do when it does not."""

    of: Literal["project", "experiment", "phase"]
    asks: str
    fix: str


CHECKS = {
    "spec": Check("project", "`repro check` finds no fault in the spec", "run repro check"),
    "placeholders": Check("project", "nothing is still to be filled in", "fill in what repro check lists"),
    "seeds": Check("project", "the spec names seeds, each once", "name each seed once in spec.yaml"),
    "commit": Check("project", "a record would name the commit of the code that runs", "commit or stash the changes"),
    "configuration": Check("experiment", "it loads, and agrees with the spec", "make the two agree"),
    "unknown keys": Check(
        "experiment",
        "a key or an override that nothing reads is refused",
        "let every part of the configuration be a repro.config.Section that allows no other keys",
    ),
    "overrides": Check(
        "phase",
        "phases.*.iterations and phases.*.batch_size reach it",
        "read both from the phase's own section of the configuration",
    ),
    "probes": Check("experiment", "every library call gives the constructed answer", "run repro probe"),
    "machine": Check("phase", "this machine has what it asks for", "do as the line says, or run on another machine"),
    "data": Check(
        "experiment", "its data are here and give minibatches like those tried", "put the data where the line says"
    ),
    "room": Check(
        "experiment", "what it keeps and saves fits", "free the disk, choose another --runs, or make the rounds smaller"
    ),
    "memory": Check(
        "phase",
        "it fits on the device",
        "run repro memory, which says what would fit; a phase that reads data overrides rehearse",
    ),
    "minibatch": Check(
        "phase",
        "its minibatch is a function of (seed, step) alone",
        "make every draw from the generator that minibatch is given, and keep nothing between steps",
    ),
    "rehearsal": Check(
        "phase", "`rehearse` gives the shapes and types of a real minibatch", "correct rehearse, or leave it out"
    ),
    "training": Check("phase", "two steps at tiny size have a finite loss", "see the line; then repro diagnose"),
    "gradients": Check(
        "phase", "a gradient reaches every parameter", "use the parameter in the loss, or take it out of the network"
    ),
    "updates": Check(
        "phase",
        "every parameter that a gradient reaches moves",
        "give the optimiser every parameter, and a learning rate that is felt",
    ),
    "parts": Check(
        "phase",
        "parts of a minibatch give the gradient of the whole: for torchrun and --micro-batches",
        "run it in one part; or use update.gather or a norm of single rows, give update.backward the weight, or say in parts_define "
        "that the paper means it per part",
    ),
    "checkpoint": Check(
        "phase",
        "its state can be written and read, and goes on as if it were not",
        "keep only tensors and plain values in a state_dict, and change nothing in it",
    ),
    "boundary": Check(
        "phase",
        "begun in a new process, it goes as it does behind earlier phases",
        "take nothing from earlier phases but their networks; build the rest in prepare from generator(seed, ...)",
    ),
    "resume": Check(
        "phase",
        "killed after a step and resumed, its whole state ends in the same bits",
        "what changes from step to step belongs in the state and in its state_dict, or must be a function of the step",
    ),
    "evaluation": Check("experiment", "it runs, and what it gives can be kept", "see the line"),
    "eval mode": Check(
        "experiment", "no network is in training mode when it is evaluated",
        "call train() on none, eval() on new ones; give a function of dropout training=self.training",
    ),
    "metrics": Check(
        "experiment", "every metric that a claim names is given, and finite", "correct the name in the spec or in evaluate"
    ),
    "repetition": Check(
        "experiment", "two evaluations of one seed are equal", "draw from generator(seed, ...); keep nothing between calls"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One answer. `text` says what was found; for a check that is not measured or not applicable, why. "open" keeps nothing from
    running, but what runs does not count. "not measured" is neither a fault nor a pass."""

    check: str
    status: Status
    text: str
    experiment: str | None = None
    phase: str | None = None

    @property
    def fix(self) -> str | None:
        return CHECKS[self.check].fix if self.status == "fail" else None


@dataclass
class Findings:
    """The rows of one experiment, or of the project, in the order in which they were found."""

    experiment: str | None = None
    rows: list[Row] = field(default_factory=list)

    def passed(self, check: str, text: str = "", phase: str | None = None) -> None:
        self.rows.append(Row(check, "pass", text, self.experiment, phase))

    def failed(self, check: str, text: str, phase: str | None = None) -> None:
        self.rows.append(Row(check, "fail", text, self.experiment, phase))

    def left_open(self, check: str, text: str) -> None:
        self.rows.append(Row(check, "open", text, self.experiment))

    def left_out(self, check: str, reason: str, phase: str | None = None) -> None:
        self.rows.append(Row(check, "not applicable", reason, self.experiment, phase))

    def not_measured_all(self, checks: Iterable[str], reason: str, phase: str | None = None) -> None:
        self.rows += [Row(check, "not measured", reason, self.experiment, phase) for check in checks]

    def judge(self, check: str, problem: str | None, text: str = "", phase: str | None = None) -> None:
        """Fails with `problem`, or passes with `text` when there is none."""
        if problem is None:
            self.passed(check, text, phase)
        else:
            self.failed(check, problem, phase)

    def has(self, check: str, phase: str) -> bool:
        """Whether there is a row already."""
        return any((row.check, row.phase) == (check, phase) for row in self.rows)

    def leave_out_all(self, checks: Iterable[str], reason: str, phase: str | None = None) -> None:
        """Those of the checks that have no row yet."""
        done = {row.check for row in self.rows if row.phase == phase}
        for check in checks:
            if check not in done:
                self.left_out(check, reason, phase)


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Rows in the order of the checklist."""
    place = list(CHECKS).index
    return sorted(rows, key=lambda row: place(row.check))
