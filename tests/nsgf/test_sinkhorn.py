"""The closed-form Sinkhorn velocity against constructed truth and against GeomLoss."""

import math

import pytest
import torch
from geomloss import SamplesLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nsgf import geomloss_velocity, sinkhorn
from nsgf.sinkhorn import velocity

SHAPES = [(256, 2), (256, 784), (128, 3072)]
SETTINGS = [(0.05, 0.95), (0.5, 0.5), (1.0, 0.85), (2.0, 0.8)]
IMAGE_SIDE = {784: (1, 28), 3072: (3, 32)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads waiting for each other on a busy machine made this file ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clouds(n, d, dtype=torch.float64, *, m=None, seed=0):
    """Gaussian noise and targets like the paper's: eight Gaussians in 2-D, smooth images in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    m = m or n
    x = torch.randn(n, d, generator=generator)
    if d in IMAGE_SIDE:
        channels, side = IMAGE_SIDE[d]
        coarse = torch.randn(m, channels, 7, 7, generator=generator)
        y = torch.nn.functional.interpolate(coarse, side, mode="bilinear").clamp(-1, 1).flatten(1)
    else:
        angles = torch.randint(8, (m, 1), generator=generator) * math.pi / 4 + torch.arange(d) * math.pi / 2
        y = 5 * angles.cos() + 0.5 * torch.randn(m, d, generator=generator)
    return x.to(dtype), y.to(dtype)


def grid(side, spacing):
    ticks = spacing * torch.arange(side, dtype=torch.float64)
    return torch.cartesian_prod(ticks, ticks)


def geomloss(x, y, blur, scaling, backend="tensorized"):
    return geomloss_velocity.velocity(x, y, blur=blur, scaling=scaling, backend=backend)


def difference(found, expected):
    """Largest absolute difference over the largest expected velocity."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


# Constructed truth


def test_one_point_to_one_point_is_the_difference():
    """Exact: a plan with one entry is 1, whatever blur and scaling."""
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]])
    assert torch.equal(velocity(x, y, blur=0.5, scaling=0.8), y - x)


def test_coinciding_particles_share_the_mean_target():
    """1e-12: both plans are uniform, so only summation rounds."""
    x, y = torch.full((4, 2), 3.0, dtype=torch.float64), clouds(5, 2)[1]
    v = velocity(x, y, blur=100.0, scaling=0.8)
    torch.testing.assert_close(v, v[:1].expand(4, 2), rtol=0, atol=1e-12)


def test_translation_of_a_cloud_is_its_own_velocity():
    """1e-9: at blur .1 and spacing 4 another match weighs exp(-800)."""
    x, shift = grid(5, 4.0), torch.tensor([0.5, -0.25], dtype=torch.float64)
    v = velocity(x, x + shift, blur=0.1, scaling=0.9)
    torch.testing.assert_close(v, shift.expand(25, 2), rtol=0, atol=1e-9)


def test_separated_targets_are_matched_in_any_order():
    """1e-9: at blur .1 and spacing 4 another match weighs exp(-800); the order of y must not matter."""
    x, order = grid(5, 4.0), torch.randperm(25, generator=torch.Generator().manual_seed(0))
    y = x + 0.3 * torch.randn(25, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(velocity(x, y[order], blur=0.1, scaling=0.9), y - x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("blur", [0.7, 1.5])
def test_gaussians_have_the_closed_form_of_entropic_transport(blur):
    """3e-3 of the largest velocity: 400 quantiles cut the Gaussians' tails, scaling .99 leaves about 1e-3.

    Janati et al. 2020 (arXiv:2006.02572), theorem 1, in one dimension with their sigma^2 = blur^2: the
    optimal plan of N(0, a^2) and N(m, b^2) has covariance c(a, b), and E[y | x] = m + c(a, b) x / a^2.
    """
    a, b, mean, eps = 1.0, 2.0, 3.0, blur**2
    quantiles = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400)[:, None]

    def covariance(s, t):
        return (math.sqrt(4 * s**2 * t**2 + eps**2) - eps) / 2

    expected = mean + (covariance(a, b) - covariance(a, a)) / a**2 * a * quantiles
    v = velocity(a * quantiles, mean + b * quantiles, blur=blur, scaling=0.99)
    assert difference(v[20:-20], expected[20:-20]) < 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_velocity_between_a_cloud_and_itself(dtype):
    """1e-3 / 1e-9 at blur .05, as against GeomLoss: the general and the symmetric loop round differently."""
    x, _ = clouds(100, 2, dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    assert velocity(x, x.clone(), blur=0.05, scaling=0.8).abs().max() < tolerance


def test_infinite_blur_moves_by_the_difference_of_means():
    """1e-6: the plan differs from the uniform one by |x||y| / blur^2 = 1e-7."""
    x, y = clouds(50, 2, m=40)
    expected = (y.mean(0) - x.mean(0)).expand(50, 2)
    torch.testing.assert_close(velocity(x, y, blur=1e4, scaling=0.5), expected, rtol=0, atol=1e-6)


def test_sinkhorn_divergence_falls_along_euler_steps():
    """No tolerance: at step size .2 the fall of each step is far above rounding (eq. 11, page 3)."""
    x, y = clouds(64, 2)
    divergence = SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.9, backend="tensorized")
    energies = []
    for _ in range(8):
        energies.append(float(divergence(x, y)))
        x = x + 0.2 * velocity(x, y, blur=0.5, scaling=0.9)
    assert energies == sorted(energies, reverse=True)


# Symmetries


def test_equivariant_under_permutation_of_particles():
    """1e-11: sums over particles are taken in another order; blur .5 divides exponents by .25."""
    x, y = clouds(60, 2, m=50)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    v = velocity(x, y, blur=0.5, scaling=0.8)
    torch.testing.assert_close(velocity(x[order], y, blur=0.5, scaling=0.8), v[order], rtol=0, atol=1e-11)


def test_invariant_under_translation_of_both_clouds():
    """1e-9: a shift of 10 costs two digits of the inner products."""
    x, y = clouds(60, 2, m=50)
    v = velocity(x, y, blur=0.5, scaling=0.8)
    torch.testing.assert_close(velocity(x + 10, y + 10, blur=0.5, scaling=0.8), v, rtol=0, atol=1e-9)


def test_units_of_length_cancel():
    """1e-10: points and blur times 4 give velocities times 4; the schedule's logarithms round differently."""
    x, y = clouds(60, 2, m=50)
    v = velocity(x, y, blur=0.5, scaling=0.8)
    torch.testing.assert_close(velocity(4 * x, 4 * y, blur=2.0, scaling=0.8), 4 * v, rtol=0, atol=1e-10)


def test_cost_without_one_half_doubles_the_velocity_at_half_eps():
    """1e-10: with C = |x - y|^2 and eps' = 2 eps both dual problems are the same, times two."""
    x, y = clouds(60, 2, m=50)
    x.requires_grad_()
    other = SamplesLoss(
        "sinkhorn", p=2, blur=0.5 * math.sqrt(2), scaling=0.8, diameter=9.0 * math.sqrt(2), debias=False,
        potentials=True, backend="tensorized", cost=lambda a, b: torch.cdist(a, b) ** 2,
    )  # fmt: skip
    (to_targets,) = torch.autograd.grad(other(x, y)[0].sum(), x)
    expected = 2 * (x - sinkhorn.barycentric_projection(
        sinkhorn.potentials(x.detach(), y, blur=0.5, scaling=0.8, diameter=9.0), y
    ))  # fmt: skip
    torch.testing.assert_close(to_targets, expected.detach(), rtol=0, atol=1e-10)


# GeomLoss


@pytest.mark.parametrize("diameter", [0.01, 1.0, 7.3, 200.0])
@pytest.mark.parametrize("blur, scaling", SETTINGS)
def test_schedule_is_geomloss_schedule(diameter, blur, scaling):
    """Exact: the number of temperatures decides the result."""
    from geomloss._legacy.sinkhorn_divergence import epsilon_schedule

    ours = sinkhorn.epsilon_schedule(diameter, blur, scaling)
    assert list(ours) == epsilon_schedule(2, diameter, blur, scaling)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blur, scaling", SETTINGS)
def test_equals_geomloss_in_float64(shape, blur, scaling):
    """1e-9: rounding of 1e-16 |x|^2 / eps is 1e-10 in the exponent at worst (3072 dimensions, blur .05)."""
    x, y = clouds(*shape)
    assert difference(velocity(x, y, blur=blur, scaling=scaling), geomloss(x, y, blur, scaling)) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blur, scaling", SETTINGS)
def test_float32_is_near_the_float64_velocity(shape, blur, scaling):
    """1e-3: the inner products, some 100, round by 1e-5; blur .05 makes that 1e-3 to 1e-2 of an exponent."""
    x, y = clouds(*shape, torch.float32)
    exact = geomloss(x.double(), y.double(), blur, scaling)
    assert difference(velocity(x, y, blur=blur, scaling=scaling), exact) < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("blur, scaling", SETTINGS[1:])
def test_equals_geomloss_in_float32(shape, blur, scaling):
    """1e-3, without blur .05: there GeomLoss itself, which rounds |x|^2 / eps, is up to 1e-2 off float64."""
    x, y = clouds(*shape, torch.float32)
    assert difference(velocity(x, y, blur=blur, scaling=scaling), geomloss(x, y, blur, scaling)) < 1e-3


@settings(max_examples=30)
@given(
    n=st.integers(2, 40), m=st.integers(1, 40), d=st.integers(1, 5), seed=st.integers(0, 99),
    setting=st.sampled_from(SETTINGS),
)  # fmt: skip
def test_equals_geomloss_at_any_size(n, m, d, seed, setting):
    """1e-9, as for the paper's shapes; n, m and d differ here, which catches a mean over the wrong axis."""
    x, y = clouds(n, d, m=m, seed=seed)
    assert difference(velocity(x, y, blur=setting[0], scaling=setting[1]), geomloss(x, y, *setting)) < 1e-9


def test_potentials_equal_geomloss_potentials():
    """1e-9, with the constant that theory leaves free; GeomLoss returns them after one more softmin."""
    x, y = clouds(60, 2, m=50)
    p = sinkhorn.potentials(x, y, blur=0.5, scaling=0.8)
    loss = SamplesLoss("sinkhorn", p=2, blur=0.5, scaling=0.8, debias=False, potentials=True, backend="tensorized")
    f, g = loss(x, y)
    cost = torch.cdist(x, y) ** 2 / 2
    last_f = -p.eps * (((p.g - cost) / p.eps).logsumexp(1) - math.log(50))
    last_g = -p.eps * (((p.f[:, None] - cost) / p.eps).logsumexp(0) - math.log(60))
    torch.testing.assert_close((last_f, last_g), (f.flatten(), g.flatten()), rtol=1e-9, atol=1e-9)


@pytest.mark.slow  # KeOps compiles its kernels
@pytest.mark.skipif(geomloss_velocity.compiler() is None, reason="KeOps needs a C++ compiler (g++ or CXX)")
@pytest.mark.skipif(" " in geomloss_velocity.keops_folder(), reason="KeOps compiles in no path with a space")
def test_equals_geomloss_online():
    """1e-6 in float64: GeomLoss hands 1 / eps to KeOps in float32, 6e-8 off, whatever the points are."""
    x, y = clouds(60, 2, m=50)
    assert difference(velocity(x, y, blur=0.5, scaling=0.8), geomloss(x, y, 0.5, 0.8, "online")) < 1e-6


def test_geomloss_velocity_leaves_gradients_as_they_were():
    """GeomLoss itself switches them on, inside no_grad too."""
    x, y = clouds(5, 2)
    with torch.no_grad():
        geomloss(x, y, 0.5, 0.8)
        assert not torch.is_grad_enabled()


def test_online_without_a_compiler_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(geomloss_velocity, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match='^backend "online" .* install g\\+\\+ or set CXX.*$'):
        geomloss(*clouds(5, 2), 0.5, 0.8, "online")


def test_online_in_a_folder_with_a_space_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(geomloss_velocity, "compiler", lambda: "/usr/bin/g++")
    monkeypatch.setattr(geomloss_velocity, "keops_folder", lambda: "/a b/keopscore")
    with pytest.raises(RuntimeError, match='^backend "online": found a space in /a b/keopscore.*another folder$'):
        geomloss(*clouds(5, 2), 0.5, 0.8, "online")


# The fast path


@pytest.mark.parametrize("n, m", [(60, 50), (50, 60)])
def test_fast_and_stable_path_agree(monkeypatch, n, m):
    """1e-11: the same sums with and without subtracting the maximum first."""
    x, y = clouds(n, 2, m=m)
    fast = sinkhorn.potentials(x, y, blur=0.05, scaling=0.8)
    monkeypatch.setitem(sinkhorn.LOG_MEAN_LIMIT, torch.float64, -1.0)
    stable = sinkhorn.potentials(x, y, blur=0.05, scaling=0.8)
    torch.testing.assert_close((stable.f, stable.g), (fast.f, fast.g), rtol=0, atol=1e-11)


@pytest.mark.parametrize("scaling, redone", [(0.8, False), (0.5, True)])
def test_only_sums_out_of_range_are_redone_by_the_stable_path(monkeypatch, scaling, redone):
    """No tolerance: cooling by .5 at image scale and blur .05 overflows float32, cooling by .8 does not."""
    calls = []
    stable = sinkhorn._log_means_stable

    def counted(*problem):
        step = stable(*problem)
        return lambda *state: calls.append(state) or step(*state)

    monkeypatch.setattr(sinkhorn, "_log_means_stable", counted)
    velocity(*clouds(128, 3072, torch.float32), blur=0.05, scaling=scaling)
    assert bool(calls) == redone


@pytest.mark.filterwarnings("error")
def test_rows_in_blocks_give_the_same(monkeypatch):
    """1e-11: column sums are added block by block, in another order; the last block is a smaller one."""
    x, y = clouds(60, 2, m=50)
    whole = velocity(x, y, blur=0.05, scaling=0.8)
    monkeypatch.setattr(sinkhorn, "BLOCK_BYTES", 7 * 50 * 8)
    torch.testing.assert_close(velocity(x, y, blur=0.05, scaling=0.8), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_exponential_is_denormal(dtype):
    """Exact: the smallest exponential is that of the floor, and a normal number."""
    smallest = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            result = op(*args, **(kwargs or {}))
            if op._schema.name in ("aten::exp", "aten::exp_"):
                smallest.append(float(result.min()))
            return result

    x, y = clouds(30, 2, dtype)
    with Record():
        velocity(x, y, blur=0.01, scaling=0.8)
    assert min(smallest) == float(torch.tensor(sinkhorn.EXPONENT_FLOOR[dtype], dtype=dtype).exp())
    assert min(smallest) > torch.finfo(dtype).tiny


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_low_precision_products_chosen_for_networks_do_not_reach_the_exponents(precision):
    """1e-4: float32's own rounding at blur .5; bfloat16 products are 1e-1 off here."""
    x, y = clouds(64, 784, torch.float32)
    expected = velocity(x, y, blur=0.5, scaling=0.8)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = velocity(x, y, blur=0.5, scaling=0.8)
    finally:
        torch.set_float32_matmul_precision(before)
    assert difference(found, expected) < 1e-4


def test_autocast_does_not_reach_the_exponents():
    """Exact: under autocast the same operations run."""
    x, y = clouds(64, 784, torch.float32)
    expected = velocity(x, y, blur=0.5, scaling=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(velocity(x, y, blur=0.5, scaling=0.8), expected)


def test_runs_on_tensors_without_values():
    """Shapes only: FakeTensorMode has no values to branch on."""
    with FakeTensorMode():
        v = velocity(torch.empty(9, 4), torch.empty(7, 4), blur=0.5, scaling=0.8, diameter=10.0)
    assert (v.shape, v.dtype) == ((9, 4), torch.float32)


def test_keeps_no_graph_and_changes_no_input():
    """Exact: buffers are written in place, the points never."""
    x, y = clouds(20, 2)
    copies = x.clone(), y.clone()
    v = velocity(x.requires_grad_(), y, blur=0.5, scaling=0.8)
    assert not v.requires_grad and torch.equal(x, copies[0]) and torch.equal(y, copies[1])


# Errors

GOOD = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "x, y, named",
    [
        (torch.zeros(3, 1, 28, 28), GOOD, ["x", "(3, 1, 28, 28)", "flatten"]),
        (GOOD, torch.zeros(3, 28, 28), ["y", "(3, 28, 28)", "flatten"]),
        (torch.zeros(3), GOOD, ["x", "(3,)", "(points, dimensions)"]),
        (torch.zeros(0, 2), GOOD, ["x", "(0, 2)", "(points, dimensions)"]),
        (GOOD, torch.zeros(0, 2), ["y", "(0, 2)", "(points, dimensions)"]),
        (GOOD, torch.zeros(3, 5), ["y", "(3, 5)", "(points, 2)"]),
        (GOOD, GOOD.double(), ["y", "torch.float64", "torch.float32"]),
        (GOOD.half(), GOOD, ["x", "torch.float16", "torch.float32"]),
        (GOOD, GOOD.to("meta"), ["y", "meta", "cpu"]),
        (GOOD, torch.tensor([[0.0, math.nan]]), ["finite", "nan"]),
        (torch.tensor([[0.0, -math.inf]]), GOOD, ["finite", "inf"]),
    ],
)
def test_wrong_clouds_are_named_in_one_line(x, y, named):
    with pytest.raises(ValueError) as caught:
        velocity(x, y, blur=0.5, scaling=0.8)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in named), message


@pytest.mark.parametrize(
    "wrong",
    [{"blur": 0.0}, {"blur": -1.0}, {"blur": math.nan}, {"scaling": 0.0}, {"scaling": 1.0}, {"diameter": -1}],
)
def test_wrong_settings_are_named_in_one_line(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"^{name} is {value}, expected .*$"):
        velocity(GOOD, GOOD + 1, **{"blur": 0.5, "scaling": 0.8} | wrong)


def test_overflow_is_an_error_not_a_result():
    """Finite points whose products overflow float32."""
    with pytest.raises(FloatingPointError, match="^velocity is not finite.*float32$"):
        velocity(GOOD + 1e25, GOOD + 1e25 + torch.eye(3, 2), blur=0.5, scaling=0.8, diameter=1.0)


def test_unknown_backend_is_named_in_one_line():
    with pytest.raises(ValueError, match="^backend is 'multiscale', expected one of .*$"):
        geomloss(GOOD, GOOD, 0.5, 0.8, "multiscale")


def test_coinciding_particles_are_refused_where_geomloss_would_crash():
    with pytest.raises(ValueError, match="^all particles coincide.*$"):
        geomloss(GOOD, GOOD + 1, 0.5, 0.8)
