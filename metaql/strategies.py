"""How each layer of a product is going to be scored, and what else would do: the kernels' own choice, foretold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from metaql.catalogue import Stretch
from metaql.physical import Operand, Score
from metaql.storage.schema import Layer
from metaql.udfs import costs
from metaql.udfs.sources import StoreSource


@dataclass(frozen=True)
class Layered:
    """How one layer is scored: seconds for each way there is, and what the chosen one computes and reads."""

    layer: Layer
    ways: dict[str, float]
    way: str
    flops: float
    bytes: float


def by_layer(
    score: Score, layers: Iterable[Layer], machine: costs.Constants, row_bytes: Callable[[Layer], int]
) -> list[Layered] | None:
    """The ways to compute a score, layer by layer; None where the numbers of rows are not known."""
    right = score.right or score.left
    if score.rows.value is None or score.left.rows.value is None or right.rows.value is None:
        return None
    left, right = (score.left, right) if score.left.rows.value >= right.rows.value else (right, score.left)
    return [_layered(score, left, right, layer, machine, row_bytes(layer)) for layer in layers]


def reading(layers: Iterable[Layer], machine: costs.Constants, every: float, rows: float) -> dict[str, float]:
    """Seconds to score so many of a split's rows with one vector: all of them in order, or those as they come."""
    terms = [(layer, costs.stored(layer, 1).positions, None) for layer in layers if layer.input_width is not None]
    if not terms:
        return {costs.SCAN: 0.0, costs.PROBE: 0.0}
    return costs.prices(machine, terms).ways(every, min(rows / max(every, 1), 1.0))


def stretch(source: StoreSource, machine: costs.Constants, split: str, rows: float) -> Stretch | None:
    """A split's rows at its newest checkpoint, if they are one collection and to score them all costs less."""
    found = [one for one in source.store.manifest.collections if one.split.lower() == split and one.checkpoint]
    newest = [one for one in found if one.checkpoint == max(each.checkpoint or 0 for each in found)]
    if len(newest) != 1:
        return None
    ways = reading(source.space.layers, machine, newest[0].rows, rows)
    if machine.choose(ways) != costs.SCAN:
        return None
    return Stretch(source.store.id, newest[0].first_row, newest[0].rows)


def _layered(
    score: Score, left: Operand, right: Operand, layer: Layer, machine: costs.Constants, row_bytes: int
) -> Layered:
    pairs, many, few = score.rows.value or 0, left.rows.value or 0, right.rows.value or 0
    sides = _side(layer, left), _side(layer, right)
    if score.right is None or pairs < many * few / 2:
        ways = costs.pairs(machine, layer, pairs, sides[0].positions, sides[1].positions)
        touched = 2 * pairs
    elif few <= 1:
        ways = costs.against(machine, layer, sides[0], _factors(layer, right))
        touched = many
    else:
        ways = costs.matrix(machine, layer, *sides)
        touched = many + few
    way = machine.choose(ways)
    flops = _flops(way, layer, pairs, sides[0], _factors(layer, right) or 1)
    return Layered(layer, ways, way, flops, touched * row_bytes)


def _side(layer: Layer, operand: Operand) -> costs.Side:
    if operand.gathered.value == 1:
        return costs.stored(layer, operand.rows.value or 0)
    return costs.Side(operand.rows.value or 0, None)


def _factors(layer: Layer, operand: Operand) -> float | None:
    """The positions of a sum of samples, as long as it has factors at all."""
    own = costs.stored(layer, 1).positions
    return None if own is None or operand.gathered.value is None else own * operand.gathered.value


def _flops(way: str, layer: Layer, pairs: float, left: costs.Side, positions: float) -> float:
    """Multiplications and additions."""
    if way == costs.FULL or layer.input_width is None:
        return 2 * pairs * layer.width
    own = left.positions or 1
    if way == costs.CONTRACT:
        return 2 * pairs * own * layer.width
    return 2 * pairs * own * positions * sum(costs.factor_widths(layer))
