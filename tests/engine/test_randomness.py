import torch

from repro.randomness import derive_seed, generator, seed_global_generators


def test_a_seed_depends_on_every_part_and_its_type():
    parts = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", "1"), (0, "a"), (0, "a/1"), (0, "a", 1, "")]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_a_seed_is_the_same_in_every_process_and_fits_the_generator():
    """The value was computed once; Python's own hash() would change from process to process."""
    assert derive_seed(0, "velocity_field", "step", 17) == 20264976
    assert all(0 <= derive_seed(k) < 2**32 for k in range(100))


def test_streams_of_neighbouring_steps_are_uncorrelated():
    """10,000 pairs: a correlation above 0.05 would be five standard deviations off."""
    first, second = (torch.randn(10_000, generator=generator(0, "step", k)) for k in (0, 1))
    assert abs(float((first * second).mean())) < 0.05


def test_global_generators_are_seeded_together():
    import random

    import numpy as np

    def draw():
        seed_global_generators(3, "here")
        return random.random(), np.random.rand(), float(torch.rand(()))

    assert draw() == draw()
