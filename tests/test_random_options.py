"""Randomly drawn calls of the recurrence against the float64 reference, outputs and every gradient.

NUMSRU_RANDOM_CASES sets how many are drawn. Most of the time goes into compiling: nearly every case is a new kernel.
"""

import os
import random

import pytest
from cases import Case, assert_matches_reference

from numsru import sru_recurrence


def draw(seed: int) -> Case:
    choose = random.Random(seed).choice
    return Case(
        L=choose([1, 7, 16, 33]),
        B=choose([1, 2, 3, 5]),
        D=choose([1, 2]),
        H=choose([1, 3, 8, 17, 40]),
        version=choose([1, 2]),
        highway=choose(["input", "projected", "none"]),
        nonlinearity=choose(["tanh", "identity", "relu", "selu"]),
        c_0=choose([False, True]),
        mask_c=choose([False, True]),
        placement=choose(["paper", "highway"]),
        padding=choose(["none", "lengths", "mask", "packed"]),
        scale_x=choose([1.0, 0.7]),
    )


@pytest.mark.parametrize("seed", range(int(os.environ.get("NUMSRU_RANDOM_CASES", "8"))))
def test_randomly_drawn_options_match_the_reference(seed):
    assert_matches_reference(sru_recurrence, draw(seed))
