"""The measuring functions of benchmarks/image_flow.py on data with a known answer, and its kept results on their page."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import image_flow  # noqa: E402
from nsgf import images, sinkhorn  # noqa: E402
from nsgf.flow import end_of_flow  # noqa: E402

DOUBLE = torch.float64


def clouds(n=12, d=5, seed=0, dtype=DOUBLE):
    stream = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, d, generator=stream, dtype=dtype)
    return x, y + 1


def pairs_far_apart(n=6, d=8):
    """Targets 20 apart in coordinates of their own, and particles 1 beside them: the assignment is plain."""
    y = 20 * torch.eye(n, d)
    return y + torch.eye(n, d).roll(1, dims=1), y


def bright_images(count=10, side=4):
    stream = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, 1, side, side), generator=stream).to(torch.uint8)
    return images.ImageSet(pixels, torch.arange(count), white=255)


# --- plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0.5, 2.0])
def test_the_velocity_from_the_plans_is_that_of_the_flow(blur):
    x, y = clouds()
    state = image_flow.state_at(x, y, blur, 0.8)
    assert torch.allclose(state.v, sinkhorn.velocity(x, y, blur=blur, scaling=0.8), atol=1e-10)
    for rows in (state.plan, state.self_plan):
        assert torch.allclose(rows.sum(1), torch.ones(12, dtype=DOUBLE))


def test_the_last_state_is_where_the_flow_ends():
    x, y = clouds()
    states = image_flow.follow(x, y, [0.2] * 3, 0.5, 0.8)
    end = end_of_flow(x, y, lambda x, y: sinkhorn.velocity(x, y, blur=0.5, scaling=0.8), steps=3, step_size=0.2)
    assert len(states) == 4
    assert torch.allclose(states[-1].x, end, atol=1e-10)


def test_step_sizes_may_differ_from_step_to_step():
    x, y = pairs_far_apart()
    states = image_flow.follow(x, y, [0.5, 0.25], 0.5, 0.8)
    left = [float((state.x - y).norm() / (x - y).norm()) for state in states]
    assert left == pytest.approx([1, 0.5, 0.375])


def test_the_converged_plan_of_two_points_is_known():
    """Points 0 and 1 onto 0 and 1: by symmetry the plan is the kernel itself, divided by its row sums."""
    line = torch.tensor([[0.0], [1.0]])
    found, error = image_flow.converged_plan(line, line.clone(), blur=1.0)
    stays = 1 / (1 + math.exp(-0.5))
    assert error < 1e-6
    assert torch.allclose(found, torch.tensor([[stays, 1 - stays], [1 - stays, stays]], dtype=DOUBLE))


def test_the_converged_plan_gives_every_target_its_due_where_the_truncated_loop_does_not():
    x, y = clouds(n=30)
    targets, truncated = image_flow.Targets(y), image_flow.state_at(x, y, 0.5, 0.8).plan
    assert targets.misplaced(image_flow.converged_plan(x, y, 0.5)[0]) < 1e-6 < 0.01 < targets.misplaced(truncated)


def test_effective_targets_counts_even_shares():
    rows = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    assert image_flow.effective_targets(rows).tolist() == pytest.approx([1, 2, 4])


def test_covered_and_misplaced_on_a_plan_that_leaves_one_target_of_four_out():
    targets, rows = image_flow.Targets(torch.arange(4.0)[:, None]), torch.eye(4)
    assert (targets.covered(rows), targets.misplaced(rows)) == (1, 0)
    rows[3] = rows[2]
    assert (targets.covered(rows), targets.misplaced(rows)) == (0.75, 0.25)


def test_copies_of_an_image_are_one_target_with_twice_the_due():
    """Three particles on one copy and one on the other image; the other copy is nobody's, and nothing is wrong with that."""
    targets = image_flow.Targets(torch.tensor([[7.0], [5.0], [7.0], [7.0]]))
    rows = torch.eye(4)[[0, 1, 0, 0]]
    assert (targets.covered(rows), targets.misplaced(rows)) == (1, 0)
    assert targets.images[targets.main(rows)].flatten().tolist() == [7, 5, 7, 7]
    assert targets.shares(torch.tensor([[0.2, 0.5, 0.2, 0.1]])).tolist()[0] == pytest.approx([0.5, 0.5])


def test_near_and_far_are_masses_over_due_of_the_quarters_by_distance_to_the_mean():
    """Of 8 images, 9 twice, the two nearest to their mean, 9.9, are 9 and 11; 20 and 0 are the farthest."""
    targets = image_flow.Targets(torch.tensor([20.0, 0, 9, 9, 11, 14, 6, 15, 5])[:, None])
    rows = torch.eye(9)[[0, 0, 1, 1, 2, 4, 5, 6, 7]]
    assert targets.near_and_far(rows) == pytest.approx((2 / 3, 2))


def test_self_share_is_the_largest_that_leaves_its_particle():
    assert image_flow.self_share(torch.tensor([[0.2, 0.8], [0.3, 0.7]])) == pytest.approx(0.8)


# --- the way -----------------------------------------------------------------------------------------------------


def test_a_point_on_its_line_is_its_noise_and_its_image():
    x_0, y = clouds(n=5, d=20)
    found = image_flow.way(0.3 * x_0 + 0.7 * y, x_0, y)
    assert found == pytest.approx({"way_left": 0.3, "noise": 0.3, "image": 0.7, "off_line": 0}, abs=1e-9)


def test_what_is_neither_noise_nor_image_is_off_the_line():
    x_0, y = torch.tensor([[2.0, 0, 0]]), torch.tensor([[0, 1.0, 0]])
    found = image_flow.way(torch.tensor([[0.6, 0.0, 0.8]]), x_0, y)
    assert (found["noise"], found["image"], found["off_line"]) == pytest.approx((0.3, 0, 0.8), abs=1e-6)


def test_the_flow_to_fixed_targets_leaves_the_share_of_the_hand_over_time():
    x, y = pairs_far_apart()
    step_sizes = [0.1, 0.4, 0.2]
    end = image_flow.measure_ways(image_flow.follow(x, y, step_sizes, 0.5, 0.8), image_flow.Targets(y))[-1]
    assert end["way_left"] == pytest.approx(1 - image_flow.hand_over_time(step_sizes), abs=1e-5)
    assert image_flow.hand_over_time(step_sizes) == pytest.approx(1 - 0.9 * 0.6 * 0.8)


def test_the_rising_schedule_is_that_of_the_authors_comment():
    """lr * exp((k - T) / (T / 4)) at T = 5, lr = 2: exponents -4, -3.2, -2.4, -1.6, -0.8."""
    assert image_flow.rising(2.0, 5) == pytest.approx([2 * math.exp(e) for e in (-4, -3.2, -2.4, -1.6, -0.8)])


@pytest.mark.parametrize("wanted", [0.1, 0.67232, 0.9])
def test_a_rising_schedule_can_be_had_for_every_hand_over_time(wanted):
    step_sizes = image_flow.rising_to(wanted, 5)
    assert image_flow.hand_over_time(step_sizes) == pytest.approx(wanted)
    assert step_sizes == sorted(step_sizes) and step_sizes[-1] < 1


# --- plans and states of a minibatch -----------------------------------------------------------------------------


def test_particles_beside_their_targets_agree_with_the_assignment_in_everything():
    x, y = pairs_far_apart()
    match = torch.arange(len(x))
    found = image_flow.measure_plans(image_flow.follow(x, y, [0.2] * 2, 0.5, 0.8), y, match, y - x)
    ones = {"unchanged", "effective_targets.first", "effective_targets.last", "covered.first", "covered.last"}
    ones |= {f"{of}.{at}" for of in ("cosine", "same") for at in ("first", "before_last")}
    ones |= {f"{of}.{at}" for of in ("near", "far") for at in ("first", "last")}
    assert found == pytest.approx({key: float(key in ones) for key in found}, abs=1e-5)


def test_a_wrong_assignment_and_a_wrong_reference_show():
    x, y = pairs_far_apart()
    turned = torch.arange(len(x)).roll(1)
    found = image_flow.measure_plans(image_flow.follow(x, y, [0.2] * 2, 0.5, 0.8), y, turned, 2 * (y - x))
    assert found["same.first"] == 0 and found["cosine.first"] < 0.9 and found["error.first"] > 0.5
    assert found["error_converged"] == pytest.approx(0.5)


def test_the_error_of_those_with_the_same_partner_leaves_the_others_out():
    x, y = pairs_far_apart()
    match = torch.arange(len(x))
    match[:2] = match[:2].flip(0)
    found = image_flow.measure_plans(image_flow.follow(x, y, [0.2] * 2, 0.5, 0.8), y, match, y - x)
    assert found["same.first"] == pytest.approx(4 / 6)
    assert found["error_same.first"] == pytest.approx(0, abs=1e-5) and found["error.first"] > 0.5


def turning():
    """Three states of which the last turns every particle to the next target; the particles stay where they are."""
    x, y = pairs_far_apart()
    plans = torch.eye(len(x)), torch.eye(len(x)), torch.eye(len(x)).roll(1, dims=1)
    return [image_flow.State(x, rows, torch.eye(len(x)), y - x) for rows in plans], y


def test_a_turn_in_the_last_state_shows_there_and_not_before():
    states, y = turning()
    found = image_flow.measure_plans(states, y, torch.arange(len(y)), y - states[0].x)
    assert (found["unchanged"], found["same.first"], found["same.before_last"]) == (0, 1, 1)


def test_the_way_is_measured_towards_the_last_targets():
    states, y = turning()
    found = image_flow.measure_ways(states, image_flow.Targets(y))[0]
    assert found == image_flow.way(states[0].x, states[0].x, y.roll(-1, dims=0))


def test_shares_of_the_loss_fall_with_the_square_of_the_way_left():
    x, y = pairs_far_apart()
    rows = image_flow.measure_states(image_flow.follow(x, y, [0.5] * 2, 0.5, 0.8), image_flow.Targets(y))
    assert [row["loss_share"] for row in rows] == pytest.approx([16 / 21, 4 / 21, 1 / 21], rel=1e-4)


# --- times and images of mixtures --------------------------------------------------------------------------------


def test_the_regression_reads_the_time_of_fresh_mixtures():
    """Pictures of 2 x 2 even squares; a guess of the mean would be off by 0.29."""
    stream = torch.Generator().manual_seed(0)

    def mixtures(n):
        y = torch.rand(n, 1, 2, 2, generator=stream).repeat_interleave(4, 2).repeat_interleave(4, 3).flatten(1) * 2 - 1
        t = torch.rand(n, generator=stream)
        return t[:, None] * y + (1 - t[:, None]) * torch.randn(n, 64, generator=stream), t

    read = image_flow.fit_time_reader(*mixtures(1500), (1, 8, 8))
    x, t = mixtures(500)
    assert (read(x) - t).square().mean().sqrt() < 0.06


def by_hand(x, t, stored):
    """log density of x = t y + (1 - t) noise for every image y, up to a constant."""
    y = stored.images().flatten(1).double()
    return -((x.double()[:, None] - t * y).square().sum(2)) / (2 * (1 - t) ** 2) - x.shape[1] * math.log(1 - t)


def noisy(stored, t):
    stream = torch.Generator().manual_seed(2)
    y = stored.images().flatten(1)
    return t * y + (1 - t) * torch.randn(y.shape, generator=stream)


@pytest.mark.parametrize("t", [0.2, 0.6])
def test_the_ideal_image_is_the_mean_under_the_posterior(monkeypatch, t):
    monkeypatch.setattr(image_flow, "CHUNK", 3)
    stored = bright_images()
    x = noisy(stored, t)
    expected = torch.softmax(by_hand(x, t, stored), dim=1) @ stored.images().flatten(1).double()
    assert torch.allclose(image_flow.ideal_image(x, t, stored).double(), expected, atol=1e-5)


def test_the_ideal_time_is_the_mean_under_the_posterior(monkeypatch):
    monkeypatch.setattr(image_flow, "CHUNK", 3)
    stored, grid = bright_images(), torch.tensor([0.3, 0.5, 0.6, 0.8])
    x = noisy(stored, 0.55)
    logs = torch.stack([by_hand(x, t, stored).logsumexp(1) for t in grid.tolist()], dim=1)
    expected = torch.softmax(logs, dim=1) @ grid.double()
    assert torch.allclose(image_flow.ideal_time(x, grid, stored), expected, atol=1e-4)


def test_the_image_part_is_what_the_noise_leaves():
    x_0, y = clouds(n=4, d=30)
    found = image_flow.describe_points(0.25 * x_0 + 0.75 * y, x_0, y, 0.75)
    assert torch.allclose(found["correlation"], torch.cosine_similarity(x_0, y))
    assert torch.allclose(found["nearest"], 0.25 * (x_0 - y).norm(dim=1)), "the nearest is the point's own target"


def test_the_variance_of_the_images_does_not_depend_on_how_they_are_read(monkeypatch):
    monkeypatch.setattr(image_flow, "CHUNK", 3)
    stored = bright_images()
    expected = stored.images().flatten(1).var(0, correction=0).sum()
    assert image_flow.image_variance(stored) == pytest.approx(float(expected), rel=1e-5)


# --- conflict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [0.0, 1.0, 3.0])
def test_the_share_explained_by_the_particle_is_found_without_bias(between):
    """u = a vector of the particle, variance `between` a coordinate, + one of the redraw, variance 1."""
    stream = torch.Generator().manual_seed(3)
    redraws, particles, d = 8, 40, 400
    own = between**0.5 * torch.randn(1, particles, d, generator=stream)
    within, share = image_flow.explained_share(own + torch.randn(redraws, particles, d, generator=stream))
    assert within / d == pytest.approx(1, abs=0.02)
    assert share == pytest.approx(between / (between + 1), abs=0.02)


# --- the script --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Every question on two tiny minibatches of digits, with its figures."""
    sizes = {"PARTICLES": {"digits": 8}, "MINIBATCHES": 2, "MIXTURE_BATCHES": 2, "FITTED": 400, "IDEAL_PARTICLES": 4}
    sizes |= {"FIXED": 2, "REDRAWS": 3, "ROUNDS": 2, "BOUND_PARTICLES": 4, "TIME_STEP": 0.1, "MAX_ITERATIONS": 200}
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(image_flow, name, value)
        patch.setattr(image_flow, "PAGE", out / "page.md")  # there is none: a partial run has no business there
        patch.setattr(sys, "argv", ["image_flow", "--data-root", str(out), "--out", str(out)])
        assert image_flow.main() == 0
    return out


def test_a_run_keeps_its_origin_and_names_what_it_left_out(small_run):
    kept = json.loads((small_run / "image_flow.json").read_text())
    assert {"command", "commit", "versions", "machine", "started"} <= kept["origin"].keys()
    assert list(kept["sets"]) == ["digits"]


def test_a_run_draws_every_figure(small_run):
    drawn = {path.stem.removeprefix("image-flow-") for path in small_run.glob("*.png")}
    assert drawn == {"way", "targets", "times", "conflict", "pictures"}


def test_numbers_of_a_run_are_finite(small_run):
    def leaves(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from leaves(item)
        elif isinstance(value, float):
            yield value

    assert all(
        math.isfinite(value) for value in leaves(json.loads((small_run / "image_flow.json").read_text())["sets"])
    )


def test_a_run_without_all_sets_does_not_replace_the_kept_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_flow, "RESULTS", tmp_path)
    monkeypatch.setattr(image_flow, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["image_flow", "--data-root", str(tmp_path)])
    assert image_flow.main() == 2
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().err
    assert "left out: mnist: " in printed and "expected 3 sets or another folder" in printed


def test_the_lossy_copy_stands_in_only_where_cifar10_is_absent(image_sets):
    found, left_out = image_flow.readable(image_sets)
    assert list(found) == ["digits", "mnist", "cifar10"] and left_out == {}


# --- the kept results and their page -----------------------------------------------------------------------------

KEPT = json.loads((image_flow.RESULTS / "image_flow.json").read_text())
PAGE = image_flow.PAGE.read_text()


def test_the_tables_of_the_page_are_those_of_the_kept_results():
    assert image_flow.fill(PAGE, KEPT) == PAGE


@pytest.mark.parametrize("marks", ["", "<!-- measured:image-flow:steps -->"], ids=["none", "half"])
def test_a_page_without_the_place_of_a_table_is_refused(marks):
    with pytest.raises(ValueError, match="steps is not marked exactly once"):
        image_flow.fill(marks, KEPT)


def test_every_figure_of_the_page_is_kept():
    shown = set(re.findall(r"image-flow-\w+\.png", PAGE))
    assert shown == {path.name for path in image_flow.RESULTS.glob("image-flow-*.png")} != set()


def kept(name, *path):
    """A mean of the kept results."""
    value = KEPT["sets"][name]
    for key in path:
        value = value[key]
    return value["mean"] if isinstance(value, dict) else value


def of_plan(name, key, quantity):
    return 100 * kept(name, "plans", key, quantity)


def loss_floor(name, key):
    """Unpredictable square error a pixel at the first state."""
    conflict = KEPT["sets"][name]["conflict"]
    return (
        kept(name, "conflict", "state_0", key, "unpredictable") * conflict["image_variance"] / kept(name, "dimensions")
    )


def time_off(name, of, kind="0.5/0.95"):
    return abs(kept(name, "mixtures", "kinds", kind, of) - kept(name, "mixtures", "kinds", "independent", of))


def later(name, k):
    return 100 * KEPT["sets"][name]["conflict"]["later"][k - 1]["particles"]


def sentences():
    """What the page says in prose, with the numbers of the kept results."""
    fine, lossy = "0.5/0.95", "cifar10_jpeg"
    off_line = {name: kept(name, "steps", "0.5/0.2", -1, "off_line") for name in KEPT["sets"]}
    rising = {name: kept(name, "steps", "0.5/rising to the same time", -1, "off_line") for name in KEPT["sets"]}
    targets = {key: [kept(*key, k, "effective_targets") for k in (0, -1)] for key in
               (("digits", "steps", "2/0.2"), ("mnist", "steps", "2/0.2"))}  # fmt: skip
    yield f"with 1 a particle aims at {kept('digits', 'plans', '1/0.95', 'effective_targets.first'):.0f} images at once"
    yield f"{kept('mnist', 'steps', '0.5/rising', -1, 'way_left'):.2f} of the way is left"
    yield f"{rising['mnist']:.3f} remains off the line instead of {off_line['mnist']:.3f} on MNIST and {off_line[lossy]:.3f} on CIFAR-10 (JPEG q75)"
    yield "whole set: {:.0f} images at first, and {:.0f} at the end".format(*targets["digits", "steps", "2/0.2"])
    yield "begins with {:.0f} and ends with {:.1f}".format(*targets["mnist", "steps", "2/0.2"])
    yield f"{of_plan('mnist', '0.5/0.80', 'misplaced'):.0f} percent of the mass lies on the wrong images on MNIST"
    yield f"{100 - of_plan('mnist', '0.5/0.80', 'covered.last'):.0f} percent of the images are nobody's"
    yield f"At 0.95 it is {of_plan('mnist', fine, 'misplaced'):.0f} and {100 - of_plan('mnist', fine, 'covered.last'):.0f} percent"
    yield f"{100 - of_plan(lossy, '2/0.80', 'covered.last'):.0f} percent of the images of CIFAR-10 (JPEG q75) are still nobody's"
    authors, mnist = (kept(name, "plans", key, "near.last") for name, key in ((lossy, "2/0.80"), ("mnist", "0.5/0.80")))
    yield f"{authors:.2f} and {kept(lossy, 'plans', '2/0.80', 'far.last'):.2f} of their due on CIFAR-10 (JPEG q75)"
    yield f"{mnist:.2f} and {kept('mnist', 'plans', '0.5/0.80', 'far.last'):.2f} on MNIST at blur 0.5"
    errors = [of_plan(name, "0.5/0.80", "error_converged") for name in KEPT["sets"]]
    yield f"off by {min(errors):.0f} to {max(errors):.0f} percent at blur 0.5"
    unchanged = [of_plan(lossy, key, "unchanged") for key in KEPT["sets"][lossy]["plans"]]
    yield f"{min(unchanged):.0f} to {max(unchanged):.0f} percent of the main targets stay the same on CIFAR-10 (JPEG q75)"
    yield f"and {of_plan('mnist', '2/0.95', 'unchanged'):.0f} on MNIST at blur 2"
    others = [100 - of_plan(name, fine, "same.first") for name in KEPT["sets"]]
    yield f"{min(others):.0f} to {max(others):.0f} percent other pairs"
    straight = [of_plan(name, fine, "error_same.before_last") for name in KEPT["sets"]]
    yield f"an error of {min(straight):.0f} to {max(straight):.0f} percent in the last velocity"
    leaning = [kept(name, "mixtures", "kinds", fine, "correlation") for name in KEPT["sets"]]
    yield "{:.2f} on digits, {:.2f} on MNIST, {:.2f} on CIFAR-10 (JPEG q75)".format(*leaning)
    yield f"is off by {time_off('digits', 'read_time'):.3f} on digits"
    yield f"the ideal reader is off by {time_off('digits', 'ideal_time'):.3f}"
    seen = [kept("digits", "mixtures", "kinds", "2/0.80", of) for of in ("read_time", "ideal_time")]
    yield "the readers see it: {:.2f} and {:.2f}".format(*seen)
    floors = loss_floor("digits", fine), loss_floor("mnist", fine)
    yield "cannot fall below {:.3f} a pixel on digits and {:.3f} on MNIST".format(*floors)
    yield f"or {loss_floor(lossy, '2/0.80'):.3f} on CIFAR-10 (JPEG q75) at blur 2 and scaling 0.80"
    yield f"{later('digits', 2):.0f} percent on digits, {later('mnist', 2):.0f} on MNIST and {later(lossy, 2):.0f} on CIFAR-10 (JPEG q75)"


@pytest.mark.parametrize("sentence", list(sentences()))
def test_the_page_quotes_the_kept_results(sentence):
    assert sentence in " ".join(PAGE.split())


def test_the_bounds_that_the_page_states_hold():
    sets = KEPT["sets"]
    step_sizes = image_flow.STEP_SIZES
    ends = {
        name: {key: states[-1]["way_left"] for key, states in found["steps"].items()} for name, found in sets.items()
    }
    assert (
        max(abs(ends[name][f"0.5/{size:g}"]["mean"] - (1 - size) ** 5) for name in sets for size in step_sizes) < 0.007
    )
    assert max(end["std"] for found in ends.values() for end in found.values()) < 0.005
    large = [name for name in sets if name != "digits"]
    inert = [kept(name, "plans", key, f"self_share.{at}") for name in large for key in sets[name]["plans"]
             for at in ("first", "last")]  # fmt: skip
    assert max(inert) < 1e-6
    even = [kept(name, "plans", key, f"{of}.last") for name in sets for key in sets[name]["plans"] if key.endswith("0.95")
            for of in ("near", "far")]  # fmt: skip
    assert min(even) > 0.94 and max(even) < 1.06
    assert max(time_off(name, "read_time") for name in large) < 0.004
    assert max(time_off(name, "ideal_time") for name in large) < 0.005
    tenth, fortieth = ([100 - of_plan(name, key, "covered.last") for name in sets] for key in ("0.5/0.80", "0.5/0.95"))
    assert min(tenth) > 7 and max(tenth) < 12 and min(fortieth) > 1 and max(fortieth) < 3.5
