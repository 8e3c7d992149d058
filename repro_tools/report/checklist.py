"""Answers to the questions of the machine-learning reproducibility checklist, as far as spec and records hold them.

The checklist is that of J. Pineau (version 2.0, as NeurIPS took it up), in our words. A question that they do not answer is left
open for a person, and is said to be open: an answer is never made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from repro_tools.report.markup import code, edition_of, is_written, kept, plural, text, written_by_hand, yours
from repro_tools.report.results import Results, checkpoint_rule
from repro_tools.report.results_page import stated_deviations
from repro_tools.report.statistics import LEVEL
from repro_tools.spec import Setting

CORE_PACKAGES = ("python", "torch", "numpy", "scipy")


@dataclass(frozen=True)
class Question:
    """A question of the checklist; `answer` gives Markdown, or None where only a person can answer."""

    id: str
    part: str
    asks: str
    answer: Callable[[Results], str | None]


def checklist(results: Results, path: Path) -> str:
    """The page. `path` is where it will lie: what a person answered there is kept. Raises BadInput for damaged marks."""
    earlier = written_by_hand(path)
    answers = {question.id: question.answer(results) for question in QUESTIONS}
    by_hand = [question.id for question in QUESTIONS if is_written(question.id, earlier)]
    answered = [name for name, answer in answers.items() if answer]
    left = [question.id for question in QUESTIONS if question.id not in answered and question.id not in by_hand]
    page = (
        "# Reproducibility checklist\n\n"
        f"Written by `repro report --checklist` for {text(results.spec.paper.title)} ({edition_of(results.spec.paper)}"
        "). The questions are those of the machine-learning reproducibility checklist (Pineau, version 2.0) in "
        "other words; they are asked about this reproduction, not about the paper.\n\n"
        f"Of {len(QUESTIONS)} questions {len(answered)} are answered from the spec and the run records, {len(set(by_hand) - set(answered))} by "
        f"hand, and {len(left)} not at all{': ' + ', '.join(left) if left else ''}.\n"
    )
    part = None
    for question in QUESTIONS:
        if question.part != part:
            part = question.part
            page += f"\n## {part}\n"
        page += f"\n**{question.asks}**\n\n"
        page += "\n".join(_answer(question, answers[question.id], earlier))
    return page + "\n" * bool(earlier) + kept(earlier, [question.id for question in QUESTIONS])


def _answer(question: Question, answer: str | None, earlier: Mapping[str, str]) -> list[str]:
    lines = [f"{answer}\n"] if answer else []
    if not answer or is_written(question.id, earlier):
        lines.append(yours(question.id, "Neither the spec nor a record says it.", earlier))
    return lines


def _ask_a_person(results: Results) -> None:
    return None


def _settings_of(item: str) -> Callable[[Results], str | None]:
    """The settings that answer an item of the extraction checklist."""

    def answer(results: Results) -> str | None:
        found = [setting for setting in results.spec.settings if setting.item == item]
        return "\n".join(map(_setting, found)) or None

    return answer


def _setting(setting: Setting) -> str:
    return f"- {text(setting.name)} ({code(setting.experiments)}): {text(setting.value)}. {text(setting.origin)}: {text(setting.where)}."


def _differs(results: Results) -> str | None:
    spec = results.spec
    what = [*stated_deviations(spec), *spec.simplifications]
    if not what:
        return "By the paper: the spec says that no deviation is known." if spec.deviations else None
    return f"By the paper, but for {plural(len(what), 'deviation')} that the [results page](README.md#deviations) lists with their reasons."


def _size(results: Results) -> str | None:
    sizes = {record["experiment"]: record["parameters"] for record in results.records if record.get("parameters")}
    if not sizes:
        return None
    lines = [
        f"- {text(name)}: {', '.join(f'{text(phase)} {count:,}' for phase, count in own.items())}"
        for name, own in sizes.items()
    ]
    return (
        "Parameters of each network; time and memory of each run are on the [results page](README.md#runs).\n\n"
        + "\n".join(lines)
    )


def _dependencies(results: Results) -> str | None:
    found: dict[str, set[str]] = {name: set() for name in CORE_PACKAGES}
    for record in results.records:
        for name in found:
            if name in record.get("versions", {}):
                found[name].add(record["versions"][name])
    shown = [f"{name} {' and '.join(sorted(versions))}" for name, versions in found.items() if versions]
    return (
        f"{', '.join(shown)}; each record holds the version of every package that its run imported." if shown else None
    )


def _training_code(results: Results) -> str | None:
    if not results.runs:
        return None
    commands = dict.fromkeys(one.command for one in results.runs if one.command)
    commits = dict.fromkeys(one.commit for one in results.runs)
    return f"{', '.join(map(code, commands))}, at commit {', '.join(map(code, commits))}."


def _evaluation_code(results: Results) -> str | None:
    if not results.runs:
        return None
    later = [one for one in results.runs if one.evaluated_later]
    anew = f" {', '.join(one.id for one in later)} were judged anew by `repro evaluate`." if later else ""
    return f"The same command evaluates after training; `repro evaluate` does it again without training.{anew}"


def _table_with_commands(results: Results) -> str | None:
    return "The [results page](README.md) has every claim, and under [runs](README.md#runs) the command of each row."


def _ranges(results: Results) -> str | None:
    settings = results.spec.settings
    if not settings:
        return None
    origins = Counter(setting.origin for setting in settings)
    several = [setting for setting in settings if setting.alternatives]
    return (
        f"{plural(len(settings), 'setting')}: {', '.join(f'{count} {origin}' for origin, count in origins.most_common())}. For {len(several)} of them "
        "[the table of settings](README.md#settings-and-where-they-come-from) names the alternatives."
    )


def _selection(results: Results) -> str | None:
    measured = [setting for setting in results.spec.settings if setting.origin == "measured here"]
    if not measured:
        return None
    lines = "\n".join(f"- {text(s.name)} ({code(s.experiments)}): {text(s.where)}. {text(s.why)}" for s in measured)
    return f"{plural(len(measured), 'setting')} were chosen by a measurement here, each with its script; the others were taken as found or assumed.\n\n{lines}"


def _checkpoints(results: Results) -> str | None:
    rules = sorted({checkpoint_rule(record) for record in results.records})
    if not rules:
        return None
    return f"No choice among checkpoints: {'; '.join(map(text, rules))}. All planned seeds count, and no others."


def _number_of_runs(results: Results) -> str | None:
    if not results.runs:
        return None
    lines = [f"- {text(one.experiment)} ({one.id}): seeds {', '.join(map(str, one.seeds))}" for one in results.runs]
    return (
        f"{plural(sum(len(one.seeds) for one in results.runs), 'run')}, each trained and evaluated once"
        + (", and those judged anew once more" if any(one.evaluated_later for one in results.runs) else "")
        + ". Runs made during development have no record here.\n\n"
        + "\n".join(lines)
    )


def _error_bars(results: Results) -> str | None:
    if not any(judgement.reproduced for judgement in results.judgements):
        return None
    sizes = sorted({len(judgement.seeds) for judgement in results.judgements if judgement.seeds})
    return (
        f"± is the standard deviation over the seeds (n = {', '.join(map(str, sizes))}). Intervals are {LEVEL:.0%} Student t-intervals of the mean; "
        "for a ratio of two methods they are of the geometric mean, on the log scale. They hold what the seed changes: initial weights, order and draws of "
        "the training, and draws of the evaluation."
    )


def _central(results: Results) -> str | None:
    if not any(judgement.reproduced for judgement in results.judgements):
        return None
    return "Mean, standard deviation, interval and the value of every seed: the page, and `results.json`."


def _runtime(results: Results) -> str | None:
    lines = [
        f"- {text(one.experiment)} ({one.id}): {fmean(one.minutes):.1f} minutes a seed"
        for one in results.runs
        if one.minutes
    ]
    return "Mean wall time of a run. Energy was not measured.\n\n" + "\n".join(lines) if lines else None


def _infrastructure(results: Results) -> str | None:
    machines = dict.fromkeys(one.machine for one in results.runs)
    return "; ".join(map(text, machines)) + "." if machines else None


MODELS, THEORY, DATA, CODE, RESULTS = "Models and algorithms", "Theory", "Data", "Code", "Experimental results"
QUESTIONS = (
    Question("description", MODELS, "Is the setting, the algorithm and the model described?", _differs),
    Question("assumptions", MODELS, "Are the assumptions stated?", _ask_a_person),
    Question("complexity", MODELS, "How large are the models, and what do they cost in time, memory and samples?", _size),
    Question("theory", THEORY, "Is each theoretical claim stated with its assumptions and its proof?", _ask_a_person),
    Question("data-statistics", DATA, "What are the sizes of the data sets?", _ask_a_person),
    Question("splits", DATA, "How is the data split into training, validation and test?", _ask_a_person),
    Question("preprocessing", DATA, "What was left out of the data, and how was it prepared?", _settings_of("preprocessing")),
    Question("data-link", DATA, "Where can the data be had?", _ask_a_person),
    Question("new-data", DATA, "How was new data collected, and how was its quality controlled?", _ask_a_person),
    Question("dependencies", CODE, "Which dependencies, in which versions?", _dependencies),
    Question("training-code", CODE, "Is there code for training?", _training_code),
    Question("evaluation-code", CODE, "Is there code for evaluation?", _evaluation_code),
    Question("trained-models", CODE, "Are the trained models to be had?", _ask_a_person),
    Question("readme", CODE, "Is there a table of results with the exact command of each?", _table_with_commands),
    Question("ranges", RESULTS, "Which hyper-parameters were considered, and which were used?", _ranges),
    Question("selection", RESULTS, "How were the hyper-parameters chosen?", _selection),
    Question("checkpoint", RESULTS, "Which checkpoint was judged, and was anything chosen by its result?", _checkpoints),
    Question("runs", RESULTS, "How many training and evaluation runs were there, exactly?", _number_of_runs),
    Question("measure", RESULTS, "How is each measure defined?", _settings_of("evaluation protocol")),
    Question("error-bars", RESULTS, "What do the error bars mean?", _error_bars),
    Question("central-tendency", RESULTS, "Are central tendency and variation given?", _central),
    Question("runtime", RESULTS, "How long does a run take, and what energy does it use?", _runtime),
    Question("infrastructure", RESULTS, "On what machines did it run?", _infrastructure),
)  # fmt: skip
"""Every question. Its id names the part of the page that keeps a person's answer."""
