"""The part on images of the results page: what stands in it follows from the records, its pictures from the runs' tensors."""

import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nsgf import evaluate_images, figures_images, images
from nsgf.config import ImageConfig, ImagePhases
from nsgf.phases import make_phases
from repro.config import load
from repro.method import find_project
from repro.run import RECORD, TENSORS, run_folder
from repro.runtime import Runtime

PROJECT = find_project(Path(__file__).parent)
KINDS = ("samples", "nearest", "handover", "losses")
JPEG = "data.set=cifar10_jpeg"
METHODS = {
    "nsgf_plus_plus": "NSGF++",
    "fm.100": "FM, 100 steps",
    "fm.10": "FM, 10 steps",
    "nsgf": "NSGF after its 5 steps",
    "handover_67": "NSGF++, every hand-over at 0.67",
    "floor": "floor: real images, train split",
}


def configuration(experiment, *overrides):
    config, _ = load(ImageConfig, PROJECT.root / "configs" / f"{experiment}.yaml", list(overrides))
    return config


def record(experiment="digits", seed=0, *overrides, logged=3, departures=(), **metrics):
    """What a run would have recorded, every metric another number; `metrics` replaces some, __ standing for the dot."""
    config = configuration(experiment, *overrides)
    names = [f"{method}.{metric}" for method in METHODS for metric in ("nfe", "classifier_frechet", "confidence")]
    names += ["test.confidence", "train.confidence", "classifier.accuracy"]
    names += ["nsgf_plus_plus.nearest_train", "test.nearest_train"]
    names += [f"nsgf_plus_plus.handover_time.{kind}" for kind in ("mean", "std", "expected")]
    measured = {name: 0.11 + 0.013 * k + 0.001 * seed for k, name in enumerate(names) if name != "floor.nfe"}
    measured |= {name.replace("__", "."): value for name, value in metrics.items()}
    return {
        "experiment": experiment,
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "departures": list(departures),
        "metrics": measured,
        "curves": {
            phase: {"loss": [(100 * k, 1 / k) for k in range(1, logged + 1)]} for phase in ImagePhases.model_fields
        },
    }


def tensors(shape=(1, 8, 8), seed=0):
    """What an evaluation keeps, with 64 pictures of one colour each, which are the quickest to write."""
    stream = torch.Generator().manual_seed(seed)
    names = ("noise", "nsgf", "nsgf_plus_plus", "fm", "real", "nearest")
    colours = torch.randint(256, (len(names), 64, shape[0], 1, 1), generator=stream, dtype=torch.uint8)
    made = {f"pictures.{name}": x.expand(-1, *shape).clone() for name, x in zip(names, colours, strict=True)}
    made |= {f"nearest.{name}": 2 + torch.rand(80, generator=stream) for name in ("nsgf_plus_plus", "test")}
    return made | {"handover.t": torch.rand(90, generator=stream)}


def keep_run(runs, of, made):
    folder = run_folder(runs, of["experiment"], of["seed"])
    folder.mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps(of))
    save_file(made, folder / TENSORS)


def table(text):
    """The cells of the first table by row and column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def pictures(text):
    """The names of the files that the page shows."""
    return set(re.findall(r"!\[[^\]]+\]\(figures/([^)]+)\)", text))


@pytest.fixture
def drawn(monkeypatch):
    """The words in each figure by file name; the files stay empty, which saves most of the time."""
    words = {}

    def note(figure, path, dpi):
        axes = [text for axis in figure.axes for text in (axis.get_title(), axis.get_xlabel())]
        axes += [text.get_text() for axis in figure.axes if axis.legend_ for text in axis.legend_.get_texts()]
        title = [figure.get_suptitle()] if figure.get_suptitle() else []
        words[path.name] = [text.get_text() for text in figure.texts] + title + axes
        path.touch()
        figures_images.plt.close(figure)

    monkeypatch.setattr(figures_images, "save", note)
    return words


@pytest.fixture
def page(tmp_path, drawn):
    """The sections of some records without any runs."""
    return lambda *records: figures_images.report_sections([], records, tmp_path / "no-runs", tmp_path)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Reports of two seeds of digits and one of the colour experiment, made from runs; then the text and the records."""
    folder = tmp_path_factory.mktemp("images")
    records = [record("cifar10", 0, JPEG), record(seed=0), record(seed=1)]
    for each, shape in zip(records, ((3, 32, 32), (1, 8, 8), (1, 8, 8)), strict=True):
        keep_run(folder / "runs", each, tensors(shape, seed=each["seed"]))
    return folder, records, figures_images.report_sections([], records, folder / "runs", folder)


def test_records_of_points_alone_make_no_section(page, tmp_path):
    assert page({"experiment": "2d-moons", "seed": 0}) == ""
    assert not list(tmp_path.iterdir())


def test_a_section_appears_for_each_experiment_with_records_and_no_other(page):
    text = page({"experiment": "2d-moons", "seed": 0}, record("digits"), record("mnist-reduced"))
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == [
        "`digits`: scikit-learn's digits",
        "`mnist-reduced`: MNIST",
    ]


def test_the_page_and_its_pictures_stay_as_they_are_without_the_runs(reported):
    folder, records, text = reported
    before = {path.name: path.read_bytes() for path in (folder / "figures").iterdir()}
    assert figures_images.report_sections([], records, folder / "no-runs", folder) == text
    assert {path.name: path.read_bytes() for path in (folder / "figures").iterdir()} == before


def test_every_picture_of_the_page_exists_and_none_lies_there_unused(reported):
    folder, _, text = reported
    expected = {f"{experiment}-{kind}.png" for experiment in ("cifar10", "digits") for kind in KINDS}
    assert pictures(text) == expected == {path.name for path in (folder / "figures").iterdir()}


def test_a_page_that_never_had_the_runs_shows_only_what_the_records_hold(page):
    assert pictures(page(record())) == {"digits-losses.png"}


def test_tensors_of_a_run_without_a_record_are_not_drawn(tmp_path, drawn):
    keep_run(tmp_path / "runs", record(), tensors())
    (run_folder(tmp_path / "runs", "digits", 0) / RECORD).unlink()
    figures_images.report_sections([], [record()], tmp_path / "runs", tmp_path)
    assert drawn.keys() == {"digits-losses.png"}


def test_the_pictures_are_those_of_the_lowest_seed(tmp_path, drawn):
    records = [record(seed=2), record(seed=10)]
    for each in records:
        keep_run(tmp_path / "runs", each, tensors(seed=each["seed"]))
    figures_images.report_sections([], records[::-1], tmp_path / "runs", tmp_path)
    for kind in ("samples", "nearest", "handover"):
        assert "digits: scikit-learn's digits, seed 2" in drawn[f"digits-{kind}.png"]
    times = [f"{t:.2f}" for t in tensors(seed=2)["handover.t"][:10].tolist()]
    assert [word for word in drawn["digits-samples.png"] if re.fullmatch(r"0\.\d\d", word)] == times


def test_the_page_says_which_seeds_it_means_and_which_one_the_pictures_show(reported):
    _, _, text = reported
    colour, digits = text.split("### `digits`")
    assert "\nSeeds 0 and 1. " in digits and "Pictures are of the lowest seed, 0." in digits
    assert "\nSeed 0. " in colour and "lowest seed" not in colour


def test_the_compressed_copy_of_cifar10_is_named_wherever_the_set_is(reported, drawn):
    folder, records, text = reported
    colour = text.split("### `digits`")[0]
    named = [line for line in colour.splitlines() if line.startswith(("###", "!["))]
    assert len(named) == 1 + len(KINDS)
    assert [line for line in named if "CIFAR-10 (JPEG q75)" not in line] == []
    assert colour.count("CIFAR-10 (JPEG q75)") == colour.count("CIFAR-10")
    figures_images.report_sections([], records[:1], folder / "runs", folder)
    assert len(drawn) == len(KINDS)
    for name, words in drawn.items():
        assert any("CIFAR-10 (JPEG q75)" in word for word in words), name


def test_the_uncompressed_set_is_not_called_compressed(page):
    text = page(record("cifar10"))
    assert "### `cifar10`: CIFAR-10\n" in text and "JPEG" not in text


def test_the_numbers_of_the_table_are_those_of_the_record(page):
    one = record()
    columns = {
        "NFE": "nfe",
        "Fréchet distance in the classifier's features": "classifier_frechet",
        "classifier's confidence": "confidence",
    }
    found = table(page(one))
    expected = {
        label: {
            column: f"{one['metrics'][f'{method}.{metric}']:.3g}" if f"{method}.{metric}" in one["metrics"] else ""
            for column, metric in columns.items()
        }
        for method, label in METHODS.items()
    }
    assert found == expected
    assert len({cell for row in found.values() for cell in row.values()}) == 3 * len(METHODS)


def test_seeds_are_averaged_with_their_standard_deviation(page):
    found = table(page(*(record(seed=k, nsgf_plus_plus__nfe=nfe) for k, nfe in enumerate((40.0, 44.0, 48.0)))))
    assert found["NSGF++"]["NFE"] == "44 ± 4"


def test_large_numbers_are_written_without_an_exponent(page):
    found = table(page(*(record(seed=k, nsgf__fid=fid) for k, fid in enumerate((1210.0, 1250.0)))))
    assert found["NSGF after its 5 steps"]["FID"] == "1230 ± 30"


def test_a_metric_that_nothing_measured_has_no_column(page):
    columns = table(page(record()))["NSGF++"].keys()
    assert not columns & {"FID", "IS"}


def test_a_metric_that_some_methods_have_leaves_the_others_empty(page):
    found = table(page(record(nsgf_plus_plus__fid=3.8, floor__fid=0.5, nsgf_plus_plus__inception_score=8.9)))
    assert {label: row["FID"] for label, row in found.items() if row["FID"]} == {
        "NSGF++": "3.8",
        METHODS["floor"]: "0.5",
    }
    assert found["NSGF++"]["IS"] == "8.9"


def test_a_metric_that_only_some_seeds_have_says_so(page):
    found = table(page(record(seed=0, nsgf_plus_plus__fid=3.8), record(seed=1)))
    assert found["NSGF++"]["FID"] == "3.8 (1 of 2 seeds)"


def test_the_floor_is_named_by_the_split_that_is_not_the_reference(page):
    (floor,) = [label for label in table(page(record("cifar10"))) if label.startswith("floor")]
    assert floor == "floor: real images, test split"


def test_runs_of_different_configurations_are_never_averaged(page):
    changed = record("digits", 1, "nsgf_plus_plus.sinkhorn_steps=3", nsgf_plus_plus__nfe=99.0)
    text = page(record(seed=0, nsgf_plus_plus__nfe=40.0), changed)
    first, second = text.split("### ")[1:]
    assert [table(part)["NSGF++"]["NFE"] for part in (first, second)] == ["40", "99"]
    assert pictures(first) == {"digits-losses.png"} and len(pictures(second) - pictures(first)) == 1


def test_runs_that_differ_in_their_pace_alone_are_one_experiment(page):
    text = page(record(), record("digits", 1, "pace.log_every=7"))
    assert text.count("### ") == 1


def test_a_shortened_run_is_called_one_in_the_text_and_in_its_figures(page, drawn):
    text = page(record(departures=["evaluation.samples: 1500 -> 300"]))
    assert "**Shortened or altered run, it does not count**: `evaluation.samples: 1500 -> 300`." in text
    assert "digits: scikit-learn's digits, seed 0, shortened or altered run" in drawn["digits-losses.png"]
    assert "hortened" not in page(record())


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ((2.4, 2.6), "is 2.5 ± 0.1 for NSGF++ samples and 2 for test images. The median sample lies 25% farther"),
        ((1.4, 1.6), "is 1.5 ± 0.1 for NSGF++ samples and 2 for test images. The median sample lies 25% closer"),
    ],
)
def test_the_check_for_copies_is_put_into_words_by_the_numbers(page, samples, expected):
    records = [
        record(seed=k, nsgf_plus_plus__nearest_train=value, test__nearest_train=2.0) for k, value in enumerate(samples)
    ]
    text = page(*records)
    assert expected in text
    assert ("no copies" in text) == (mean(samples) >= 2) and ("as copies would" in text) == (mean(samples) < 2)


def test_the_smallest_distances_over_the_seeds_are_given(page):
    smallest = [(0.9, 0.6), (0.7, 0.8)]
    records = [
        record(seed=k, nsgf_plus_plus__nearest_train_min=samples, test__nearest_train_min=test)
        for k, (samples, test) in enumerate(smallest)
    ]
    assert "The smallest distances are 0.7 and 0.6." in page(*records)


@pytest.mark.parametrize(("experiment", "mirrored"), [("digits", False), ("cifar10", True)])
def test_the_page_says_where_mirrored_training_images_count_too(page, experiment, mirrored):
    text = page(record(experiment))
    assert ("Nearest training image, mirrored or not: " in text) == mirrored


def test_the_predicted_time_stands_beside_the_theory(page):
    times = {f"nsgf_plus_plus__handover_time__{kind}": value for kind, value in {"mean": 0.69, "std": 0.05}.items()}
    expected = evaluate_images.expected_handover(5, 0.2)
    text = page(record(**times, nsgf_plus_plus__handover_time__expected=expected))
    assert "time: 0.690 ± 0.050 over the samples" in text
    assert "1 − (1 − 0.2)<sup>5</sup> = 0.672" in text


def test_the_histogram_of_the_times_names_their_mean_and_the_theory(tmp_path, drawn):
    theory = record(nsgf_plus_plus__handover_time__expected=0.67232)
    keep_run(tmp_path / "runs", theory, tensors() | {"handover.t": torch.tensor([0.4, 0.5, 0.9])})
    figures_images.report_sections([], [theory], tmp_path / "runs", tmp_path)
    assert {"mean 0.600", "1 − (1 − 0.2)$^{5}$ = 0.672"} <= set(drawn["digits-handover.png"])


def test_the_accuracy_of_the_classifier_is_given(page):
    assert "right about 91.7% of the test images" in page(record(classifier__accuracy=0.9166))


@pytest.mark.parametrize(("logged", "smoothed"), [(20, False), (200, True)])
def test_smoothed_loss_curves_are_called_smoothed(page, logged, smoothed):
    text = page(record(logged=logged))
    assert ("running median over eleven" in text) == smoothed and ("not smoothed" in text) == (not smoothed)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_every_pixel_is_drawn_as_a_square_of_its_colour_and_all_squares_are_of_one_size(tmp_path, monkeypatch, shape):
    made, write = tensors(shape), figures_images.save
    made["pictures.noise"] = torch.randint(256, (64, *shape), generator=torch.Generator(), dtype=torch.uint8)
    monkeypatch.setattr(figures_images, "save", lambda *given: "-samples" in given[1].name and write(*given))
    keep_run(tmp_path / "runs", record(), made)
    figures_images.report_sections([], [record()], tmp_path / "runs", tmp_path)
    figure = matplotlib.image.imread(tmp_path / "figures" / "digits-samples.png")[..., :3]
    figure = (255 * figure).round().astype(np.uint8)
    row = made["pictures.noise"][:10].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    found = [(size, top) for size in range(1, 20) for top in flush_right(enlarged(row, size), figure)]
    assert len(found) == 1


def enlarged(row, size):
    """Images (n, s, s, 3) side by side, a white stripe of four pixels between them."""
    squares = row.repeat(size, 1).repeat(size, 2)
    return np.concatenate(list(np.pad(squares, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=255)), 1)[:, :-4]


def flush_right(block, figure):
    """The rows of the figure at which the block begins whose right edge is the figure's."""
    height, width = block.shape[:2]
    if width > figure.shape[1]:
        return []
    edge = figure[:, -width:]
    starts = np.flatnonzero((edge == block[0]).all((1, 2)))
    return [top for top in starts if np.array_equal(edge[top : top + height], block)]


def test_the_pairs_shown_are_the_closest_of_the_kept_samples(tmp_path, drawn):
    made = tensors()
    without_a_picture = torch.zeros(16)
    made["nearest.nsgf_plus_plus"] = torch.cat([torch.linspace(6, 3, 64), without_a_picture])
    keep_run(tmp_path / "runs", record(), made)
    figures_images.report_sections([], [record()], tmp_path / "runs", tmp_path)
    distances = [float(word) for word in drawn["digits-nearest.png"] if re.fullmatch(r"\d\.\d\d", word)]
    assert distances == pytest.approx([3 + 3 / 63 * k for k in range(20)], abs=0.01)


def test_every_image_set_and_every_phase_has_its_words():
    assert figures_images.SETS.keys() == images.SOURCES.keys()
    assert figures_images.PHASES.keys() == ImagePhases.model_fields.keys()


def test_what_the_evaluation_gives_is_what_the_page_asks_for(tmp_path, drawn):
    """A tiny evaluation of untrained networks: every method in the table, every figure drawn."""
    tiny = "{channels: 8, blocks: 1, multipliers: [1], heads: 1, head_channels: null, attention_resolutions: [], dropout: 0.0, groups: 4}"
    settings = ["samples=16", "batch_size=16", "euler_steps=[2, 3]", "handover_times=[0.5]", "nearest=5", "pictures=4"]
    overrides = [f"evaluation.{setting}" for setting in settings] + ["nsgf_plus_plus.straight_flow_step=0.5"]
    config = configuration(
        "digits", *overrides, *(f"phases.{k}.network={tiny}" for k in ("velocity_field", "straight_flow"))
    )
    runtime = Runtime(torch.device("cpu"), tmp_path)
    models = {phase.name: phase.make_model().eval() for phase in make_phases(config, runtime)}
    with torch.no_grad():
        evaluation = evaluate_images.evaluate(config, models, 0, runtime)
    made = record("digits", 0) | {"config": config.model_dump(mode="json"), "metrics": evaluation.metrics}
    keep_run(tmp_path / "runs", made, evaluation.tensors)
    text = figures_images.report_sections([], [made], tmp_path / "runs", tmp_path)
    assert len(drawn) == len(KINDS)
    assert "The smallest distances are " in text
    rows = table(text)
    assert list(rows) == [
        "NSGF++", "FM, 3 steps", "FM, 2 steps", "NSGF after its 5 steps", "NSGF++, every hand-over at 0.5", METHODS["floor"],
    ]  # fmt: skip
    assert Counter(cell == "" for row in rows.values() for cell in row.values()) == {False: 17, True: 1}
