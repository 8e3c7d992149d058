import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator
from toy_method import Config
from toy_project import CONFIG, write_yaml

from repro.config import Section, differences, digest, flatten, load, parse_yaml, read_yaml
from repro.errors import BadInput


@pytest.fixture
def path(tmp_path):
    return write_yaml(tmp_path / "toy.yaml", CONFIG)


def edited(tmp_path, edit):
    data = copy.deepcopy(CONFIG)
    edit(data)
    return write_yaml(tmp_path / "toy.yaml", data)


def problem(call) -> str:
    with pytest.raises(BadInput) as caught:
        call()
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def test_a_star_reaches_every_copy_and_each_change_is_listed(path):
    config, changes = load(Config, path, ["phases.*.iterations=5"])
    assert config.phases.line.iterations == config.phases.constant.iterations == 5
    assert [str(change) for change in changes] == [
        "phases.line.iterations: 12 -> 5",
        "phases.constant.iterations: 9 -> 5",
    ]


def test_a_star_stands_for_one_name_only(path):
    found = problem(lambda: load(Config, path, ["*.iterations=5"]))
    assert "--set *.iterations=5: found no field '*.iterations'" in found


def test_a_later_override_wins(path):
    config, _ = load(Config, path, ["pool_size=3", "pool_size=4"])
    assert config.pool_size == 4


def test_an_override_that_matches_nothing_says_what_was_meant(path):
    found = problem(lambda: load(Config, path, ["phases.line.iteration=5"]))
    assert "did you mean 'phases.line.iterations'?" in found


def test_a_misspelt_pattern_is_answered_with_a_pattern(path):
    assert "did you mean 'phases.*.iterations'?" in problem(lambda: load(Config, path, ["phases.*.iteration=5"]))


def test_an_override_to_the_same_value_is_no_change(path):
    assert load(Config, path, ["pool_size=64"])[1] == []


@pytest.mark.parametrize("override", ["pool_size", "=3", ""])
def test_an_override_without_a_value_is_refused(path, override):
    assert "expected key=value" in problem(lambda: load(Config, path, [override]))


def test_an_override_of_the_wrong_type_names_key_found_and_expected(path):
    found = problem(lambda: load(Config, path, ["phases.line.iterations=many"]))
    assert found == '--set phases.line.iterations=many: phases.line.iterations: found "many", expected a valid integer'


def test_an_unknown_key_names_file_key_and_the_likely_one(tmp_path):
    path = edited(tmp_path, lambda data: data["phases"]["line"].update(batchsize=3))
    found = problem(lambda: load(Config, path))
    assert found.startswith(f"{path}: phases.line.batchsize: found an unknown key, expected iterations, batch_size")
    assert found.endswith("did you mean 'batch_size'?")


def test_a_missing_key_is_named(tmp_path):
    path = edited(tmp_path, lambda data: data["phases"]["line"].pop("batch_size"))
    assert problem(lambda: load(Config, path)) == f"{path}: phases.line.batch_size: found nothing, expected a value"


def test_every_problem_is_reported_at_once(tmp_path):
    path = edited(tmp_path, lambda data: (data.update(pool_size=1.5), data["pace"].update(log_every="x")))
    with pytest.raises(BadInput) as caught:
        load(Config, path)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("value", [1.5, True, "8", None, [8], -1, 0])
def test_no_value_is_coerced_into_a_count(tmp_path, value):
    path = edited(tmp_path, lambda data: data.update(pool_size=value))
    assert f"{path}: pool_size: found" in problem(lambda: load(Config, path))


def test_a_learning_rate_written_without_a_point_is_a_number(tmp_path):
    path = edited(tmp_path, lambda data: None)
    path.write_text(path.read_text().replace("learning_rate: 0.01", "learning_rate: 1e-4"))
    assert load(Config, path)[0].phases.line.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2e3),
        (".5", 0.5),
        ("7", 7),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("1:30", "1:30"),
        ("", None),
        ("~", None),
        ("'8'", "8"),
        ("2026-11-21", "2026-11-21"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


def test_a_repeated_key_is_refused(tmp_path):
    (tmp_path / "twice.yaml").write_text("a: 1\na: 2\n")
    assert "found the key 'a' twice" in problem(lambda: read_yaml(tmp_path / "twice.yaml"))


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [true]", "a: !!python/name:os.system ''", "[", "a: b: c", "\x00", "- 1"]
)
def test_hostile_or_broken_yaml_ends_in_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert problem(lambda: read_yaml(path)).startswith(str(path))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert problem(lambda: read_yaml(tmp_path / "absent.yaml")) == f"{tmp_path / 'absent.yaml'}: found no such file"
    assert str(tmp_path) in problem(lambda: read_yaml(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problem(lambda: read_yaml(tmp_path / "bytes.yaml"))


@given(st.text(max_size=40))
def test_no_text_escapes_the_error_type(text):
    try:
        parse_yaml(text, "here")
    except BadInput as error:
        assert str(error).startswith("here")


def test_a_configuration_cannot_be_changed(path):
    config, _ = load(Config, path)
    with pytest.raises(ValueError, match="frozen"):
        config.pool_size = 3


def test_the_digest_follows_content_not_order(path):
    config, _ = load(Config, path)
    data = config.model_dump(mode="json")
    assert digest(config) == digest(dict(reversed(data.items())))
    assert digest(config) != digest({**data, "pool_size": 65})


def test_differences_name_leaves_on_either_side():
    found = differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 2}})
    assert [(change.key, change.before, change.after) for change in found] == [("a.c", 2, None), ("a.d", None, 2)]
    assert flatten({"a": {"b": 1}, "c": [1, 2]}) == {"a.b": 1, "c": [1, 2]}


def test_overrides_that_only_fit_together_may_come_in_any_order(tmp_path):
    class Range(Section):
        low: int
        high: int

        @model_validator(mode="after")
        def _ordered(self):
            if self.low > self.high:
                raise ValueError("low at most high")
            return self

    path = write_yaml(tmp_path / "range.yaml", {"low": 1, "high": 2})
    for overrides in (["low=5", "high=6"], ["high=6", "low=5"]):
        config, _ = load(Range, path, overrides)
        assert (config.low, config.high) == (5, 6)
    with pytest.raises(
        BadInput, match=r"^--set low=5: \(the whole file\): found low 5, high 2, expected low at most high$"
    ):
        load(Range, path, ["low=5", "high=4"])


@pytest.mark.parametrize(
    "text",
    [
        "{quote: image x[::6], page: 1}",
        "quote: one: two",
        "{why: see: below}",
        "quote: [::6]",
        "quote: **3** layers",
        "quote: @x",
    ],
)
def test_text_that_yaml_takes_for_syntax_belongs_in_quotes(text):
    assert problem(lambda: parse_yaml(text, "spec.yaml")).endswith("; put text with any of : [ { , * @ in quotes")


@pytest.mark.parametrize("text", ["a: {b: c", "a: 'b", "a:\n\t- b", "- a\nb: c"])
def test_other_faults_of_yaml_are_told_alone(text):
    assert "in quotes" not in problem(lambda: parse_yaml(text, "spec.yaml"))


def test_an_empty_file_is_an_empty_mapping_only_where_it_may_be(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("# nothing yet")
    assert read_yaml(path, may_be_empty=True) == {}
    assert "found null, expected a mapping" in problem(lambda: read_yaml(path))
