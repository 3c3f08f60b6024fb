"""data/draws.py: every draw is a function of (seed, purpose, position), and draws are independent."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora.data import draws

PURPOSES = ("noise", "posterior", "timestep")


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.integers(1, 50))
def test_each_epoch_is_a_permutation(seed, epoch, count):
    start = epoch * count
    assert sorted(draws.picture_at(seed, start + i, count) for i in range(count)) == list(range(count))


def test_epochs_differ():
    orders = {tuple(draws.picture_at(0, epoch * 20 + i, 20) for i in range(20)) for epoch in range(10)}
    assert len(orders) == 10


def test_order_of_asking_does_not_matter():
    asked = [(purpose, position) for purpose in PURPOSES for position in range(50)]
    forward = {key: draws.gaussian(7, *key, (3,)) for key in asked}
    backward = {key: draws.gaussian(7, *key, (3,)) for key in reversed(asked)}
    assert all(torch.equal(forward[key], backward[key]) for key in asked)


def test_different_purposes_positions_and_seeds_are_independent():
    n = 20_000
    streams = [draws.gaussian(s, purpose, p, (n,)) for s in (0, 1) for purpose in PURPOSES for p in (0, 1)]
    correlation = np.corrcoef(torch.stack(streams).numpy())
    # The correlation of independent streams has deviation 1/√n = 0.007; 66 pairs stay below 5 of them.
    assert np.abs(correlation - np.eye(len(streams))).max() < 5 / n**0.5


def test_neighbouring_positions_never_overlap():
    # A long draw at one position must not run into the numbers of the next one.
    long = draws.gaussian(0, "noise", 5, (100_000,))
    assert not torch.isin(draws.gaussian(0, "noise", 6, (10,)), long).any()


def test_the_distributions_are_what_they_say():
    noise = draws.gaussian(0, "noise", 0, (200_000,))
    assert abs(noise.mean()) < 0.01  # four deviations of the mean of 200 000 draws
    assert abs(noise.std() - 1) < 0.01
    assert noise.dtype == torch.float32
    times = [draws.integer(0, "timestep", p, 0, 10) for p in range(2000)]
    assert set(times) == set(range(10))
    assert all(0 <= draws.uniform(0, "mirror", p) < 1 for p in range(1000))
