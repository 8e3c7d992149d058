"""Answers: odd ones come through unharmed, impossible ones are refused with the reason and leave nothing behind."""

import ast
import keyword
import re
import sys
import tomllib

import pytest
import torch
import yaml
from rendering import PRESETS, ROOT, in_project, render

from repro.config import read_yaml
from repro_tools.memory.devices import DEVICES, HERE
from repro_tools.spec import load_spec

QUESTIONS = yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))
TITLES = [
    "Über die Näherung von ∫ f dμ: 変分法",
    """She said "it's" 100% \\alpha {{x}} [[ 7 * 7 ]] {% raw %} $(id) `id` # & <b>""",
    "- null: [a, *b, {c: d}]  # no comment",
    "T" * 300,
    "🙂 emoji",
    " spaces around ",
]


@pytest.mark.parametrize("title", TITLES)
def test_a_title_reads_back_as_it_was_written(project, title):
    made = project(title=title)
    assert load_spec(made / "spec.yaml").paper.title == title
    assert tomllib.loads((made / "pyproject.toml").read_text(encoding="utf-8"))["project"]["description"].endswith(
        title
    )
    assert title in (made / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load((made / ".copier-answers.yml").read_text(encoding="utf-8"))["title"] == title


def test_experiments_become_configurations_with_their_shapes(project):
    shapes = {"mnist": [1, 28, 28], "cifar-10": [3, 32, 32], "2024": [1, 8, 8], "null": [2, 4, 4]}
    made = project(preset="classification", experiments=shapes, metric="top1.validation", value=93.5)
    found = {path.stem: read_yaml(path) for path in (made / "configs").glob("*.yaml")}
    assert {name: config["data"]["shape"] for name, config in found.items()} == shapes
    assert {config["experiment"] for config in found.values()} == set(shapes)
    claims = load_spec(made / "spec.yaml").claims
    assert {(claim.experiment, claim.metric, claim.reported) for claim in claims} == {
        (name, "top1.validation", 93.5) for name in shapes
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_several_experiments_of_odd_shapes_are_green(project, preset):
    shapes = {"a": [1, 3, 5], "b-2": [2, 7, 1]}
    made = project(
        preset=preset, experiments=shapes, package="zebra_method", metric="m.x", value=0.0, level="conceptual"
    )
    done = in_project(made, "-m", "repro_tools", "preflight")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_path_with_spaces_and_umlauts_is_green(template, tmp_path):
    made = render(template, tmp_path / "my päper (1)")
    done = in_project(made, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout


def test_an_arxiv_identifier_gives_the_link_and_none_asks_for_one(template, tmp_path):
    with_one = load_spec(render(template, tmp_path / "with", arxiv="2401.14069") / "spec.yaml").paper
    without = load_spec(render(template, tmp_path / "without") / "spec.yaml").paper
    assert (with_one.arxiv, with_one.url) == ("2401.14069", "https://arxiv.org/abs/2401.14069")
    assert without.arxiv is None
    assert without.url.startswith("FILL IN")


@pytest.mark.parametrize("licence", [choice for choice in QUESTIONS["licence"]["choices"] if choice != "none"])
def test_a_licence_is_in_the_project_and_in_its_metadata(project, licence):
    made = project(licence=licence)
    assert tomllib.loads((made / "pyproject.toml").read_text())["project"]["license"] == licence
    text = (made / "LICENSE").read_text()
    assert re.sub(r"\W|\d.*", "", licence)[:3].lower() in text.lower()
    assert ("authors of paper-reproduction: the engine in repro/" in text) != (made / "repro/LICENSE").exists()


def test_without_a_licence_only_the_kit_has_one(project):
    made = project(licence="none")
    assert not (made / "LICENSE").exists()
    assert "license" not in tomllib.loads((made / "pyproject.toml").read_text())["project"]
    assert (made / "repro/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


REFUSED = [
    ({"title": "two\nlines"}, "line break"),
    ({"title": "bell\a"}, "line break or another sign that cannot be printed"),
    ({"title": " "}, "found nothing"),
    ({"title": "T" * 301}, "301 signs"),
    ({"package": "import"}, "a word of Python itself"),
    ({"package": "random"}, "hide"),
    ({"package": "repro"}, "the project itself or a library"),
    ({"package": "torch"}, "the project itself or a library"),
    ({"package": "my-paper"}, "expected small letters"),
    ({"package": "../evil"}, "expected small letters"),
    ({"package": "Paper"}, "expected small letters"),
    ({"package": "2fast"}, "expected small letters"),
    ({"package": "pap\u00ebr"}, "expected small letters"),
    ({"package": "_private"}, "expected small letters"),
    ({"package": "name\n"}, "expected small letters"),
    ({"package": "p" * 42}, "at most 41"),
    ({"arxiv": "2401.14069v1"}, "without its version"),
    ({"arxiv": "https://arxiv.org/abs/2401.14069"}, "without its version"),
    ({"metric": "Top-1"}, "dotted name"),
    ({"metric": "a..b"}, "dotted name"),
    ({"metric": "x\n"}, "dotted name"),
    ({"value": float("nan")}, "finite"),
    ({"value": float("inf")}, "finite"),
    ({"experiments": {}}, "a name and a shape"),
    ({"experiments": [1, 2]}, "a name and a shape"),
    ({"experiments": {"../up": [1]}}, "expected a name"),
    ({"experiments": {"a b": [1]}}, "expected a name"),
    ({"experiments": {"a\n": [1]}}, "expected a name"),
    ({"experiments": {7: [1]}}, "expected a name"),
    ({"experiments": {"main": []}}, "whole numbers"),
    ({"experiments": {"main": [0]}}, "whole numbers"),
    ({"experiments": {"main": [1.5]}}, "whole numbers"),
    ({"experiments": {"main": [True]}}, "whole numbers"),
    ({"experiments": {"main": "28"}}, "whole numbers"),
    ({"experiments": {"main": 28}}, "whole numbers"),
    ({"experiments": {"main": [8]}, "preset": "classification"}, "channels, height and width"),
    ({"level": "some"}, "choice"),
    ({"preset": "other"}, "choice"),
    ({"device": "T5"}, "choice"),
    ({"licence": "WTFPL"}, "choice"),
]


@pytest.mark.parametrize("answers, reason", REFUSED, ids=[str(answers)[:40] for answers, _ in REFUSED])
def test_an_impossible_answer_is_refused_with_the_reason_and_nothing_is_written(template, tmp_path, answers, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        render(template, tmp_path / "my-paper", **answers)
    assert not (tmp_path / "my-paper").exists()


def reserved(name: str) -> set[str]:
    text = (ROOT / "templates/answers.jinja").read_text(encoding="utf-8")
    return set(re.search(rf"\[%- set {name} -%\](.*?)\[%- endset -%\]", text, re.DOTALL)[1].split())


def test_no_word_or_module_of_python_is_taken_for_a_name():
    words = {word for word in keyword.kwlist + keyword.softkwlist if word.islower()}
    modules = {name for name in sys.stdlib_module_names if not name.startswith("_")}
    assert words - {"_"} <= reserved("keywords")
    assert modules <= reserved("standard_library")


def test_no_library_or_folder_of_the_project_is_taken_for_a_name(project):
    made = project()
    folders = {path.name for path in made.iterdir() if path.is_dir()} - {"method", ".github"}
    imported = {
        name.split(".")[0]
        for path in made.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    libraries = {name.lower() for name in imported} - set(sys.stdlib_module_names) - {"method", ""}
    assert folders | libraries <= reserved("others")


def test_the_devices_to_choose_from_are_this_machine_and_those_of_the_table():
    (label, this), *others = QUESTIONS["device"]["choices"]
    assert (this, others) == (HERE, [device.name for device in DEVICES])
    assert label.startswith(f"{HERE}: ")


def test_the_page_names_the_devices_to_choose_from():
    page = (ROOT / "refs/scaffold.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^`device` is (.*?)\n\n", page, re.DOTALL | re.MULTILINE)
    assert re.findall(r"`([^`]+)`", listed) == [HERE, *(device.name for device in DEVICES)]


def test_a_project_may_be_for_the_machine_at_hand(project):
    made = project(device=HERE)
    assert load_spec(made / "spec.yaml").budget.device == HERE
    done = in_project(made, "-m", "repro_tools", "preflight")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the device is this machine" in done.stdout or torch.cuda.is_available()


def test_the_template_runs_nothing_where_it_is_used():
    assert not {"_tasks", "_migrations", "_jinja_extensions"} & set(QUESTIONS)
