"""cleanlab's two answers to given labels and predicted probabilities, in the environment that has it.

python -m bench.peers.cleanlab GIVEN.npz FOUND.npz
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def answer(labels: Any, probabilities: Any) -> dict[str, Any]:
    """``quality`` of each label, float [n], and whether it is an ``issue``, bool [n], both by cleanlab's defaults."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    return {
        "quality": get_label_quality_scores(labels, probabilities),
        "issue": find_label_issues(labels, probabilities, n_jobs=1),
    }


def main() -> None:
    """Reads ``labels`` int [n] and ``probabilities`` float [n, classes]; writes what ``answer`` found."""
    given, found = sys.argv[1:]
    with np.load(given) as asked:
        answered = answer(asked["labels"], asked["probabilities"])
    np.savez(found, **answered)


if __name__ == "__main__":
    main()
