"""The closed form of the distance-based positions."""

import pytest
import torch

from saccade.errors import ConfigError
from saccade.gaze.oat_position import (
    NOWHERE,
    DistancePosition,
    TablePosition,
    distance_gram,
    distance_loss,
    distance_table,
    sinusoid_grid,
)
from tests.helpers import assert_close, randn


def test_closed_form_beats_the_optimised_table():
    assert distance_loss(distance_table(14, 86), 2.0) < 1e-12
    assert distance_loss(randn(14, 86), 2.0) > 0.01


def test_continuous_form_equals_the_table_at_whole_numbers():
    continuous = DistancePosition(258, 14, radius=8.764)
    looked_up = TablePosition(continuous.table(), 258)
    places = torch.cartesian_prod(torch.arange(14.0), torch.arange(14.0), torch.arange(2.0))
    assert_close(continuous(places), looked_up(places), atol=2e-5)
    assert not continuous(torch.tensor([NOWHERE, NOWHERE, 0.0]))[:172].any()
    assert not looked_up(torch.tensor([NOWHERE, NOWHERE, 0.0]))[:172].any()


def test_continuous_form_keeps_distances_between_cells():
    position = DistancePosition(258, 14, radius=1.0)
    line = torch.linspace(0, 13, 131, dtype=torch.float64)
    codes = position(torch.stack([line, line * 0, line * 0], -1))[:, :86].double()
    kernel = torch.exp(-((line[:, None] - line) ** 2) / 8)
    assert (codes @ codes.T - kernel).abs().max() < 2e-5


def test_similarity_of_two_places_is_a_sum_of_gaussians():
    position = DistancePosition(60, 10, radius=1.0)
    one, other = position(torch.tensor([[2.5, 7.0, 0.0], [4.0, 6.0, 1.0]]))
    expected = sum(torch.exp(torch.tensor(-d * d / 8)) for d in (1.5, 1.0, 1.0))
    assert_close(one @ other, expected, atol=1e-4)


def test_cells_that_float64_cannot_tell_apart():
    with pytest.raises(ConfigError, match="smaller sigma"):
        distance_table(40, 60, sigma=20.0)
    with pytest.raises(ConfigError, match="cannot be exact for 9 positions"):
        distance_table(9, 8)
    with pytest.raises(ConfigError, match="Unknown sinusoid 'sine'"):
        sinusoid_grid("sine", 12)


def test_gram_is_one_on_the_diagonal():
    gram = distance_gram(5, 2.0)
    assert torch.equal(gram.diagonal(), torch.ones(5, dtype=torch.float64))
    assert torch.equal(gram, gram.T)
