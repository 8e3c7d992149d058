"""The results page: a summary first, then what was missed and why, then every claim, and what it all was measured with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from repro_tools.memory.words import hours_spent
from repro_tools.report.judge import (
    BELOW_FLOOR,
    NOT,
    REPRODUCED,
    SHORTENED,
    VERDICTS,
    Judgement,
    causes,
    unexplained,
    worded,
)
from repro_tools.report.markup import (
    LEAST,
    as_reported,
    cell,
    code,
    edition_of,
    mean_and_spread,
    number,
    plural,
    table,
    text,
    title_of,
)
from repro_tools.report.results import Results, Runs, short, tally, tally_in_words
from repro_tools.report.statistics import LEVEL, Interval, what_seeds_show
from repro_tools.spec import Deviation, Spec


def results_page(results: Results) -> str:
    """The whole page, in Markdown."""
    parts = [
        f"# {text(results.title)}\n",
        _introduction(results),
        _verdicts(results),
        _missed(results),
        _deviations(results.spec),
        _claims(results),
        _pairs(results),
        results.sections,
        _runs(results),
        _settings(results.spec),
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def interval_text(interval: Interval | None) -> str:
    """Each end to two significant digits of its distance from the centre; on the log scale to two of its own at least."""
    if interval is None:
        return ""
    least = 2 if interval.scale == "log" else None
    return " to ".join(number(end, end - interval.centre, least) for end in (interval.low, interval.high))


def gap_lines(results: Results, judgements: Sequence[Judgement]) -> list[str]:
    """The suspected causes that concern `judgements`, numbered as in the spec, each with the claims that it may explain."""
    lines = []
    for index, gap in enumerate(results.spec.gaps, start=1):
        missed = [j for j in judgements if index in causes(results.spec, j)]
        if missed:
            lines.append(
                f"- **Cause {index}**: {text(gap.cause)} It may explain {plural(len(missed), 'claim')} ({code(gap.claims)}). "
                f"*Evidence*: {text(gap.evidence)} *What would tell*: {text(gap.ablation)}"
            )
    return lines


def deviation_lines(spec: Spec, reasons: bool = True) -> list[str]:
    """Departures from the paper on purpose, and where less is done than the paper does; a sentence when there are none."""
    lines = [f"- {text(d.what)}" + (f" {text(d.why)}" if reasons else "") for d in stated_deviations(spec)]
    for s in spec.simplifications:
        lines.append(
            f"- {text(s.what)}" + (f" {text(s.why)}" if reasons else "") + f" *Probable effect*: {text(s.effect)}"
        )
    return lines or ["None known." if spec.deviations else "None stated."]


def stated_deviations(spec: Spec) -> list[Deviation]:
    """The deviations of the spec, without an entry that only says that there is none."""
    return [
        d for d in spec.deviations if not re.fullmatch(r"(?i)none( (yet )?(known|stated))?( yet)?\.?", d.what.strip())
    ]


def _introduction(results: Results) -> str:
    spec, records = results.spec, results.records
    paper = f"{title_of(spec.paper)} ({edition_of(spec.paper)})"
    lines = f"This page is written by `repro report` from the spec and the run records. Paper: {paper}.\n"
    if records and all(record["departures"] for record in records):
        changes = sorted({change for record in records for change in record["departures"]})
        lines += (
            '\n!!! warning "Shortened runs"\n    Every run on this page departs from the shipped configuration. '
            f"Nothing here counts as a verdict. Changed: {'; '.join(code(change) for change in changes)}.\n"
        )
    return lines


def _verdicts(results: Results) -> str:
    groups = results.by_experiment()
    rows = [
        [f"[{name}](#claims-on-{name})", *(str(count or "") for count in tally(own).values()), _ids(results, own)]
        for name, own in groups.items()
    ]
    rows.append(["**all**", *(f"**{count}**" for count in tally(results.judgements).values()), ""])
    page = "## Verdicts\n\n" + table(["experiment", *VERDICTS, "runs"], rows)
    page += "\nA verdict holds the mean over the planned seeds against a tolerance that was fixed before the runs. Nothing else moves it.\n"
    return page + _firmness(results.judgements)


def _firmness(judgements: Sequence[Judgement]) -> str:
    """How many verdicts would be the same anywhere in the interval."""
    sentences = []
    for verdict, where in ((REPRODUCED, "within the tolerance"), (NOT, "outside of what counts as close")):
        own = [j for j in judgements if j.verdict == verdict and j.settled is not None]
        if own:
            settled = sum(bool(j.settled) for j in own)
            sentences.append(
                f"The whole {LEVEL:.0%} interval lies {where} for {settled} of {plural(len(own), 'claim')} {verdict}."
            )
    return f"\n{' '.join(sentences)} Elsewhere these seeds leave another verdict open.\n" if sentences else ""


def _missed(results: Results) -> str:
    lines = gap_lines(results, results.judgements)
    missed = [j for j in results.judgements if j.verdict == NOT]
    if not lines and not missed:
        return ""
    without = unexplained(results.spec, results.judgements)
    page = "## What was not reproduced, and suspected causes\n\n"
    if lines:
        page += "Written after the runs, from what they show. A suspected cause is a guess until its test has been made.\n\n"
        page += "\n".join(lines) + "\n\n"
    if not missed:
        return page
    if not without:
        return page + "Every claim that was not reproduced has a suspected cause.\n"
    names = ", ".join(code(name) for name in without)
    return page + f"Not reproduced and without any suspected cause ({len(without)} of {len(missed)}): {names}.\n"


def _deviations(spec: Spec) -> str:
    lines = ["## Deviations\n", *deviation_lines(spec), "\n## Not attempted\n"]
    lines += [f"- {text(n.what).rstrip('.')} ({text(n.where)}). {text(n.why)}" for n in spec.not_attempted] or [
        "Nothing stated."
    ]
    return "\n".join(lines) + "\n"


def _claims(results: Results) -> str:
    sizes = sorted({len(j.seeds) for j in results.judgements if j.seeds})
    page = (
        "## Every claim\n\n"
        "*Ours* is the mean over the seeds ± their standard deviation; the mean is what the tolerance is held against. "
        f"*{LEVEL:.0%} interval*: Student's t for the mean over n seeds; for a ratio on the log scale, where it holds the geometric mean and A / B "
        "is judged like B / A. It counts what the seed changes, and neither another machine nor another reading of the paper. Of twenty such "
        "intervals one misses by chance. The *floor* is what the same metric gives between two independent samples of the target: no generator can "
        "be expected to score below it. *Open*: a part of the interval would get another verdict. *Causes* and *runs* refer to the sections on "
        f"{'[what was not reproduced](#what-was-not-reproduced-and-suspected-causes)' if results.spec.gaps else 'what was not reproduced'} and on "
        "[runs](#runs).\n"
    )
    page += "".join(f"\n{what_seeds_show(n)}\n" for n in sizes)
    for name, own in results.by_experiment().items():
        page += f"\n### Claims on {text(name)}\n\n{tally_in_words(own)[:1].upper()}{tally_in_words(own)[1:]}. {_seeds(own)}\n\n"
        page += _claims_table(results, own)
    return page


def _claims_table(results: Results, own: Sequence[Judgement]) -> str:
    header = ["claim", "metric", "reported", "ours", f"{LEVEL:.0%} interval"]
    floors, explained = any(j.floor for j in own), any(causes(results.spec, j) for j in own)
    header += ["floor"] * floors + ["verdict", "why"] + ["causes"] * explained + ["runs"]
    rows = []
    for j in own:
        row = [
            f"**{j.id}** {cell(j.statement)} ({cell(j.where)})", code(j.metric), as_reported(j.reported),
            _show(j.reproduced, j.reported),
            interval_text(j.interval),
        ]  # fmt: skip
        row += [_show(j.floor)] * floors + [worded(j), cell(_reason(j))]
        row += [", ".join(map(str, causes(results.spec, j)))] * explained
        rows.append([*row, _ids(results, [j])])
    return table(header, rows)


def _reason(judgement: Judgement) -> str:
    """The reason as the table shows it: what is said above the table is not said again in every row."""
    if judgement.reason.startswith(SHORTENED):
        return SHORTENED
    short_form = judgement.reason.replace(" from the reported value, ", ", ")
    return short_form.replace(BELOW_FLOOR, "reported below floor")


def _pairs(results: Results) -> str:
    own = [(j, j.pairs) for j in results.judgements if j.pairs]
    if not own:
        return ""
    rows = []
    for j, pairs in own:
        assert j.reproduced is not None  # pairs are those of runs
        interval = pairs.interval
        if interval is None:
            shows = "no interval: one seed" if len(pairs.ratios) < 2 else "no interval: a ratio is not positive"
        elif interval.high < 1:
            shows = "A is lower"
        elif interval.low > 1:
            shows = "B is lower"
        else:
            shows = "not which is lower"
        rows.append(
            [
                code(j.id),
                code(j.metric),
                ", ".join(number(ratio, j.reproduced["spread"], LEAST) for ratio in pairs.ratios),
                number(interval.centre, interval.centre - interval.low) if interval else "",
                interval_text(interval),
                f"{pairs.below} of {len(pairs.ratios)}",
                shows,
                _ids(results, [j]),
            ]
        )
    header = [
        "claim",
        "A / B",
        "ratio by seed",
        "geometric mean",
        f"{LEVEL:.0%} interval",
        "A lower in",
        "these seeds show",
        "runs",
    ]
    return (
        "## A against B, seed by seed\n\n"
        "Both methods of a row ran with the same seeds on the same data, and each seed gives one ratio. So what a seed changes in both of them "
        "falls out. The interval is Student's t on the log scale; it shows an order where it does not hold 1. A verdict asks something else: "
        "whether the mean ratio keeps to its bound.\n\n" + table(header, rows)
    )


def _runs(results: Results) -> str:
    if not results.runs:
        return "## Runs\n\nNone yet.\n"
    later, devices = (
        any(getattr(one, name) for one in results.runs) for name in ("evaluated_later", "peak_device_mib")
    )
    header = ["runs", "experiment", "seeds", "command", "minutes by seed", "peak host MiB"] + [
        "peak device MiB"
    ] * devices
    header += ["machine", "commit", "configuration", "checkpoint"] + ["evaluated later"] * later
    rows = []
    for one in results.runs:
        row = [
            one.id, one.experiment, ", ".join(map(str, one.seeds)), code(one.command),
            ", ".join(f"{minutes:.1f}" for minutes in one.minutes), "" if one.peak_host_mib is None else f"{one.peak_host_mib:.0f}",
        ]  # fmt: skip
        row += [f"{one.peak_device_mib:.0f}" if one.peak_device_mib else ""] * devices
        row += [cell(one.machine), short(one.commit), one.config_hash, cell(one.checkpoint)]
        rows.append(row + [cell(one.evaluated_later or "")] * later)
    return (
        "## Runs\n\n"
        "A row is the runs of one experiment that differ in the seed alone; SEED in the command stands for it. The networks that "
        "are judged are those of the last step of every phase, and all planned seeds count. Neither is chosen by a result: nothing here is a best of several.\n\n"
        + table(header, rows)
        + f"\n{_cost(results.runs)}\n"
        + _parts(results.runs)
        + _without_gate(results.records)
    )


def _parts(runs: Sequence[Runs]) -> str:
    """What is known of the parts of minibatches."""
    lines = [f"- {one.id}: {text(line)}" for one in runs for line in one.parts]
    if not lines:
        return ""
    told = "Minibatches were divided. Before such a run, a step is tried in parts and held against the gradient of the whole:"
    return f"\n{told}\n\n" + "\n".join(lines) + "\n"


def _without_gate(records: Sequence[dict]) -> str:
    """Which runs the engine made alone, and what that means."""
    own = [record for record in records if record.get("no_gate")]
    if not own:
        return ""
    named = ", ".join(f"{text(record['experiment'])} seed {record['seed']}" for record in own)
    return (
        f"\nNo gate was passed by {plural(len(own), 'run')} ({named}): the engine ran alone, and nothing held the configuration against the "
        "specification. Their claims are those of the specification whose text the run kept.\n"
    )


def _cost(runs: Sequence[Runs]) -> str:
    hours = sum(minutes for one in runs for minutes in one.minutes) / 60
    return f"{plural(sum(len(one.seeds) for one in runs), 'run')} in all, {hours_spent(hours)} of their machines."


def _settings(spec: Spec) -> str:
    rows = [
        [
            cell(s.name), code(s.experiments), cell(s.value), cell(f"{s.origin}: {s.where}"),
            cell("; ".join(s.alternatives) or "none"), cell(s.why),
        ]
        for s in spec.settings
    ]  # fmt: skip
    header = ["setting", "experiments", "value", "origin", "alternatives", "why"]
    return "## Settings and where they come from\n\n" + table(header, rows)


def _ids(results: Results, judgements: Sequence[Judgement]) -> str:
    return ", ".join(dict.fromkeys(one.id for j in judgements for one in results.runs_of(j)))


def _seeds(judgements: Sequence[Judgement]) -> str:
    seeds = sorted({seed for j in judgements for seed in j.seeds})
    return f"Seeds {', '.join(map(str, seeds))}." if seeds else "No run."


def _show(summary: dict | None, reported: float | None = None) -> str:
    return " ± ".join(filter(None, mean_and_spread(summary, reported)))
