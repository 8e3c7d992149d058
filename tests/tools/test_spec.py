import copy
import json
from pathlib import Path

import pytest
from toy_method import Config
from toy_project import CONFIG, SPEC, write_yaml

from repro.config import validate
from repro.errors import BadInput
from repro_tools.spec import Draft, Spec, check_experiment, claim_hash, claim_hashes, load_spec, matches, passages

REFERENCE = Path(__file__).parents[2] / "reference_impl"


def spec(edit=lambda data: None):
    data = copy.deepcopy(SPEC)
    edit(data)
    return validate(Spec, data, "spec.yaml")


def refused(edit):
    with pytest.raises(BadInput) as caught:
        spec(edit)
    return str(caught.value)


def test_a_claim_needs_a_tolerance_with_a_reason():
    assert "claims.0.tolerance: found nothing" in refused(lambda data: data["claims"][0].pop("tolerance"))
    assert "tolerances.wide.why" in refused(lambda data: data["tolerances"]["wide"].update(why=""))


def test_a_claim_names_a_tolerance_that_exists():
    assert "found narrow" in refused(lambda data: data["claims"][0].update(tolerance="narrow"))


def test_only_a_draft_may_lack_parts_and_tolerances():
    claims = [{**SPEC["claims"][0], "tolerance": "narrow"}]
    assert validate(Draft, {"claims": claims}, "spec.yaml").claims[0].tolerance == "narrow"
    with pytest.raises(BadInput, match="level: found nothing"):
        validate(Spec, {"claims": claims}, "spec.yaml")


@pytest.mark.parametrize("kind", ["equal", "within", "at_most"])
def test_close_is_wider_than_reproduced(kind):
    def edit(data):
        data["claims"][0]["kind"] = kind
        data["tolerances"]["wide"].update(close=0.1)

    told = f"in tolerance 'wide', which claim constant ({kind}) uses, close (0.1) no tighter than reproduced (0.5)"
    assert told in refused(edit)


def test_close_is_the_lower_bound_of_a_claim_from_below():
    def edit(data, **bounds):
        data["claims"][0]["kind"] = "at_least"
        data["tolerances"]["wide"].update(bounds)

    told = "in tolerance 'wide', which claim constant (at_least) uses, close (1.0) not above reproduced (0.5)"
    assert told in refused(edit)
    assert spec(lambda data: edit(data, close=0.1)).tolerances["wide"].close == 0.1
    assert spec(lambda data: edit(data, close=0.5)).tolerances["wide"].close == 0.5


@pytest.mark.parametrize("kind", ["equal", "within"])
@pytest.mark.parametrize("bounds", [{"reproduced": 0.0}, {"reproduced": -1.0}, {"reproduced": 0, "close": 0}])
def test_a_distance_is_held_against_more_than_nothing(kind, bounds):
    def edit(data):
        data["claims"][0]["kind"] = kind
        data["tolerances"]["wide"].update(bounds)

    assert "both greater than 0" in refused(edit)


def test_a_value_may_be_held_against_zero_and_less():
    def edit(data, kind, **bounds):
        data["claims"][0]["kind"] = kind
        data["tolerances"]["wide"].update(bounds)

    assert spec(lambda data: edit(data, "at_least", reproduced=0.0, close=-1.0)).tolerances["wide"].close == -1
    assert spec(lambda data: edit(data, "at_most", reproduced=-1.0, close=0.0)).tolerances["wide"].reproduced == -1


def test_one_tolerance_does_not_serve_claims_from_above_and_from_below():
    def edit(data):
        data["claims"].append({**data["claims"][0], "id": "other", "kind": "at_least"})

    assert "claim other (at_least) uses" in refused(edit)


def test_a_tolerance_that_no_claim_uses_is_ordered_too():
    spare = {"reproduced": 0.5, "close": 0.1, "why": "chosen for the test"}
    told = "in tolerance 'spare', which no claim uses, close (0.1) no tighter than reproduced (0.5)"
    assert told in refused(lambda data: data["tolerances"].update(spare=spare))


def test_a_draft_may_claim_from_below_before_its_tolerance_is_written():
    claim = {**SPEC["claims"][0], "kind": "at_least", "tolerance": "top1"}
    assert validate(Draft, {"claims": [claim]}, "spec.yaml").tolerances == {}
    bounds = {"reproduced": 0.7, "close": 0.6, "why": "chosen for the test"}
    assert (
        validate(Draft, {"claims": [claim], "tolerances": {"top1": bounds}}, "spec.yaml").claims[0].kind == "at_least"
    )


def test_a_value_is_a_ratio_or_a_difference():
    told = "claims.0: found"
    message = refused(lambda data: data["claims"][0].update(divided_by="line.error", minus="line.error"))
    assert told in message and "expected divided_by or minus, not both" in message


def test_what_most_entries_leave_empty_may_be_left_out():
    def edit(data):
        data["paper"] = {"title": "Toy", "authors": ["Nobody"]}
        for name in ("divided_by", "floor"):
            del data["claims"][0][name]
        for name in ("where", "alternatives", "why"):
            del data["settings"][0][name]

    one, whole = spec(edit), spec()
    assert (one.settings[0].where, one.settings[0].alternatives, one.settings[0].why) == ("not stated", [], "")
    assert (one.paper.arxiv, one.paper.version, one.paper.url) == (None, None, None)
    assert claim_hash(one, one.claims[0]) == claim_hash(whole, whole.claims[0])


def test_claim_ids_are_unique():
    assert "found twice: constant" in refused(lambda data: data["claims"].append(data["claims"][0]))


def test_a_relative_tolerance_needs_a_reported_value_other_than_zero():
    assert "use at_most" in refused(lambda data: data["claims"][0].update(reported=0.0))
    for kind in ("at_most", "within"):
        assert spec(lambda data, kind=kind: data["claims"][0].update(reported=0.0, kind=kind)).claims[0].reported == 0


def test_a_number_where_text_belongs_says_what_to_do():
    assert "found 2006.11239, expected a valid string; put it in quotes" in refused(
        lambda data: data["paper"].update(arxiv=2006.11239)
    )


def test_a_setting_whose_key_matches_no_field_is_named(tmp_path):
    config = validate(Config, CONFIG, "toy.yaml")
    misspelt = spec(lambda data: data["settings"][0].update(key="pool_sise"))
    with pytest.raises(BadInput, match="setting 'pool': key: found 'pool_sise', expected a field of toy.yaml"):
        check_experiment(misspelt, tmp_path / "spec.yaml", "toy", config, "toy.yaml")


def test_an_origin_is_one_of_five():
    assert "settings.0.origin" in refused(lambda data: data["settings"][0].update(origin="common knowledge"))


def test_a_configuration_that_contradicts_the_spec_is_named(tmp_path):
    config = validate(Config, {**CONFIG, "pool_size": 65}, "toy.yaml")
    path = tmp_path / "toy.yaml"
    with pytest.raises(BadInput) as caught:
        check_experiment(spec(), tmp_path / "spec.yaml", "toy", config, path)
    assert str(caught.value) == f"{path}: pool_size: found 65, expected 64 ({tmp_path / 'spec.yaml'}: pool, page 1)"


def test_an_experiment_that_no_claim_names_contradicts_the_spec(tmp_path):
    config = validate(Config, CONFIG, "toy.yaml")
    with pytest.raises(BadInput, match="experiment: found 'other', expected one that .* claims something of: toy"):
        check_experiment(spec(), tmp_path / "spec.yaml", "other", config, tmp_path / "other.yaml")


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["tolerances"]["wide"].update(reproduced=0.6),
        lambda data: data["claims"][0].update(reported=3.1),
        lambda data: data["claims"][0].update(statement="The constant is about three."),
        lambda data: data["claims"][0].update(kind="within"),
        lambda data: data["claims"][0].update(minus="line.error"),
    ],
)
def test_the_hash_of_a_claim_follows_claim_and_tolerance(edit):
    before, after = spec(), spec(edit)
    assert claim_hash(before, before.claims[0]) != claim_hash(after, after.claims[0])


def test_the_hash_of_a_claim_is_still_the_one_that_finished_runs_hold():
    """Those runs were made when a claim had no `minus`; with another hash they would all be inconclusive."""
    records = [json.loads(path.read_text()) for path in sorted((REFERENCE / "reports" / "records").glob("*.json"))]
    reference = load_spec(REFERENCE / "spec.yaml")
    assert records
    for record in records:
        assert record["claims"] == claim_hashes(reference, record["experiment"])


def test_the_hash_of_a_claim_ignores_the_rest():
    before, after = spec(), spec(lambda data: data["paper"].update(title="Other"))
    assert claim_hash(before, before.claims[0]) == claim_hash(after, after.claims[0])


def test_a_spec_is_read_from_its_file(tmp_path):
    assert load_spec(write_yaml(tmp_path / "spec.yaml", SPEC)).claims[0].id == "constant"


def test_the_hash_of_a_claim_ignores_its_quote():
    """It is evidence, and may be found later."""
    before = spec()
    for quote in ("the constant is 3", ["the constant", "is **3**"]):
        after = spec(lambda data: data["claims"][0].update(quote=quote))
        assert claim_hash(before, before.claims[0]) == claim_hash(after, after.claims[0])
        assert passages(after.claims[0].quote) == ([quote] if isinstance(quote, str) else quote)


@pytest.mark.parametrize("value", [[0.67], [10, 100], ["test", "train"], [], None, False, 0.5, 3, "adam"])
def test_a_setting_takes_every_value_that_a_field_may_have(value):
    kept = spec(lambda data: data["settings"][0].update(value=value)).settings[0].value
    assert kept == value and type(kept) is type(value)


@pytest.mark.parametrize(
    "key, pattern, fits",
    [
        ("phases.line.rate", "phases.*.rate", True),
        ("phases.line.rate", "phases.[lc]*.rate", True),
        ("phases.line.rate", "phases.*", False),
        ("phases.line.pool.rate", "phases.*.rate", False),
    ],
)
def test_a_star_is_one_name(key, pattern, fits):
    assert matches(key, pattern) is fits


def test_a_spec_that_is_half_filled_is_read():
    """Budget, simplifications, gaps, items and quotes may come later; `repro check` asks for them."""
    assert spec().budget is None and spec().settings[0].item is None and spec().simplifications == []
    assert "settings.0.item" in refused(lambda data: data["settings"][0].update(item="magic"))
