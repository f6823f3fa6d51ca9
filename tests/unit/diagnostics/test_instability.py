"""Warnings: each reason once, none in healthy scatter."""

import math
import random

import pytest

from hf_muon.diagnostics.instability import Instability


def said(losses):
    watch = Instability()
    return [text for loss in losses for text in watch.of_loss(loss)]


def scattered(losses, scatter, seed=0):
    draw = random.Random(seed)
    return [loss + draw.gauss(0, scatter) for loss in losses]


FALLING = [8 * 0.97**step + 3 for step in range(150)]


@pytest.mark.parametrize("scatter", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_a_falling_or_flat_loss_is_no_reason(scatter, seed):
    assert said(scattered(FALLING, scatter, seed)) == []
    assert said(scattered([2.0] * 200, scatter, seed)) == []


def test_losses_around_zero_are_no_reason():
    assert said(scattered([0.0] * 200, 0.02)) == []


def test_a_loss_that_loses_half_of_its_gain_is_said_once():
    rising = [FALLING[-1] + 0.2 * step for step in range(30)]
    texts = said(scattered(FALLING + rising, 0.05))
    assert len(texts) == 1
    assert "more than half" in texts[0]


def test_a_loss_that_rises_from_the_start_is_said():
    assert "lost all" in said([5.0, 40.0, 60.0, 50.0, 40.0])[0]


def test_a_recovery_lets_it_be_said_again():
    bump = [FALLING[-1] + 5] * 5
    assert len(said(FALLING + bump + [FALLING[-1]] * 20 + bump)) == 2


def test_a_loss_that_is_not_a_number_is_said_at_once():
    assert said([3.0, math.nan, math.nan]) == ["the loss is nan"]


def test_an_iteration_that_leaves_its_range_and_a_weight_that_is_not_finite_are_said():
    watch = Instability()
    assert watch.of_sample("a", {"weight_rms": 1.0, "factor_largest": 1.3}) == []
    (text,) = watch.of_sample("a", {"weight_rms": 1.0, "factor_largest": 7.0})
    assert "diverges" in text
    assert watch.of_sample("a", {"weight_rms": 1.0, "factor_largest": 7.0}) == []
    assert watch.of_sample("b", {"weight_rms": math.inf}) == ["the weight is no longer finite"]


def test_a_signal_that_is_lost_everywhere_is_said_after_three_samples():
    watch = Instability()

    def look(*ranks):
        return watch.of_all([{"visible_rank": rank} for rank in ranks])

    assert [look(0.0, 0.0) for _ in range(5)] == [[]] * 5  # it never was visible
    assert [look(0.0, 2.0) for _ in range(3)] == [[]] * 3
    assert [look(0.0, 0.0), look(0.0, 0.0)] == [[], []]
    assert "no watched matrix" in look(0.0, 0.0)[0]
    assert look(0.0, 0.0) == []
    assert watch.of_all([{}]) == []
