"""Rows and labels that can't be trained on, and why."""

from __future__ import annotations

from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.rows import require_finite


def require_labels(features: Tensor, labelled: Tensor, is_anomaly: Tensor | None) -> None:
    if labelled.shape[1:] != features.shape[1:]:
        raise QueryError(
            f"labelled rows have shape {list(labelled.shape[1:])}, and the rows to train on {list(features.shape[1:])}"
        )
    if is_anomaly is None or is_anomaly.shape != labelled.shape[:1]:
        raise QueryError("is_anomaly must have one value for each labelled row")
    require_finite(labelled, "labelled features")
    anomalies = int(is_anomaly.sum())
    if anomalies in (0, len(labelled)):
        raise QueryError(
            f"all {len(labelled)} labelled rows are {'anomalies' if anomalies else 'normal'}: label at least one row "
            f"that is {'normal' if anomalies else 'an anomaly'}, since they are told apart by both"
        )


def require_scores(scores: object, detector: str) -> None:
    """QueryError unless a detector of one's own scores two rows by two numbers that it can learn to change."""
    must = f"detector '{detector}' must score rows [n, …] by finite numbers of shape [n]; for 2 rows it returned"
    if not isinstance(scores, Tensor):
        raise QueryError(f"{must} {type(scores).__name__}")
    if scores.shape != (2,) or not scores.is_floating_point() or not scores.isfinite().all():
        raise QueryError(f"{must} {scores.dtype} of shape {list(scores.shape)}")
    if not scores.requires_grad:
        raise QueryError(
            f"detector '{detector}' has nothing to learn: its scores must depend on a parameter of its module with "
            "requires_grad, without detach or no_grad"
        )
