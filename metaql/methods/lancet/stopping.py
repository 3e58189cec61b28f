"""When to stop asking (§10.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass

# The loss of a network that can't tell labelled rows from unlabelled ones.
ALIKE = 2 * math.log(2)
# The loss counts as near that from so much less on.
NEAR = 0.03
LEAST_WEIGHT = 0.05
# Fewer labels than this for each direction that the points spread in look like any distribution. On HAR, in four
# or five directions, 150 random labels still gained 2 points over 75.
LABELS_PER_DIRECTION = 25


@dataclass(frozen=True)
class Stop:
    """The paper's two conditions and one more with their numbers, None without labels or without unlabelled rows.

    ``loss`` is mean(w·CE_u) + mean(CE_l), which nears 2 ln 2 = 1.386 as labelled and unlabelled rows become alike;
    ``smallest_weight`` is that of the row with the fewest labelled neighbours. ``alike`` and ``covered`` say whether
    each is met, ``enough`` whether there are labels enough to tell, and ``now`` whether all are, or nothing is left.
    """

    loss: float | None
    smallest_weight: float | None
    alike: bool
    covered: bool
    enough: bool
    now: bool


def stop_by(loss: float, smallest_weight: float, labels: int, directions: int) -> Stop:
    """What follows from the distribution matching network's loss and weights."""
    alike, covered = loss > ALIKE - NEAR, smallest_weight > LEAST_WEIGHT
    enough = labels >= LABELS_PER_DIRECTION * directions
    return Stop(loss, smallest_weight, alike, covered, enough, alike and covered and enough)
