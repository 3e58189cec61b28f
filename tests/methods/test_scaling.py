"""Scaling of inputs: what pollution, constants and huge values do to it."""

import torch

from metaql.methods.scaling import STRAIGHT, scaling_of


def test_median_and_quartiles_of_each_feature():
    numbers = torch.arange(101, dtype=torch.float64)
    rows = torch.stack([numbers, numbers * 1000 + 1e9], 1)
    scaled = scaling_of(rows, channels=True)(rows)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled[:, 0], scaled[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled[:, 0], ((numbers - 50) / (50 / 1.349)).float())


def test_a_huge_value_moves_no_other_and_stays_in_reach():
    torch.manual_seed(0)
    rows = torch.randn(200, 1, dtype=torch.float64)
    plain = scaling_of(rows, channels=True)(rows)
    polluted = torch.cat([rows, torch.tensor([[1e300]], dtype=torch.float64)])
    scaled = scaling_of(polluted, channels=True)(polluted)
    torch.testing.assert_close(scaled[:-1], plain, rtol=0.05, atol=0.05)
    assert STRAIGHT < float(scaled[-1]) < 1000


def test_constants_become_zero_and_rare_values_are_scaled_by_themselves():
    rows = torch.zeros(100, 2)
    rows[:5, 1] = 10
    scaled = scaling_of(rows, channels=True)(rows)
    assert not scaled[:, 0].any()
    assert 1 < float(scaled[0, 1]) < 10


def test_channels_alone_or_all_together():
    torch.manual_seed(0)
    rows = torch.randn(50, 2, 7)
    rows[:, 1] *= 100
    apart, together = (scaling_of(rows, channels)(rows) for channels in (True, False))
    assert 0.5 < float(apart[:, 1].std()) < 2
    assert float(together[:, 1].std()) > 4 * float(together[:, 0].std())


def test_no_pixel_stands_for_all_of_many_images():
    """With a border of zeros, whose distance to that of the next image divides any round stride."""
    images = torch.zeros(100_000, 4, 4)
    images[:, :, 1:] = torch.rand(100_000, 4, 3, generator=torch.Generator().manual_seed(0))
    scaling = scaling_of(images, channels=False)
    few = scaling_of(images[:5000], channels=False)
    torch.testing.assert_close(scaling.deviation, few.deviation, rtol=0.02, atol=0)
    torch.testing.assert_close(scaling.centre, few.centre, rtol=0.02, atol=0)
