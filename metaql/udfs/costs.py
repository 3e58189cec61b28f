"""What scoring takes on a machine, in seconds, from floating point operations and numbers that are moved.

The kernels ask here with exact sizes, the planner with estimated ones. Letters: P and Q all positions of the left and
of the right samples, i and o a layer's input and output width, D = i·o the size of its gradient.

    product of matrices [P, k] x [k, Q]     2·P·k·Q flop + (P·k + k·Q) load;  with one column only (P·k + k) stream
    gram        products over i and over o, their P·Q results multiplied and added up
    contract    each right gradient laid out (2·Q·D flop); for each of them a product [P, o] x [o, i], P·i results,
                and for several at a time products [P, i] x [i, o], P·o results, where o is the smaller
    full        both sides laid out, a product over D

Left out: biases, the caches' sizes, and what float64 takes more, which is the same factor for every way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

from metaql.storage.schema import TIED, Layer, parts

# How two samples are multiplied, and how a query's rows are found: the words that EXPLAIN uses too.
GRAM, CONTRACT, FULL = "gram", "contract", "full"
SCAN, PROBE = "scan", "probe"
# How rows are multiplied with preconditioned vectors, where none of these is laid out in the parameters' coordinates.
EIGENBASIS = "eigenbasis"
# Rows that DuckDB hands to a function in one call.
CALL_ROWS = 2048
# Columns of a product with several gradients at a time: wide enough to be made fast, and few enough for the caches.
COLUMNS = 1 << 10
# Numbers of an intermediate result that the kernels make at a time, so that it stays in the processor's caches.
STEP = 1 << 19


@dataclass(frozen=True)
class Constants:
    """Seconds that one thread, or one device, takes for each of these. A number is 4 bytes.

    The values here were measured on 2026-11-20 on a virtual AMD EPYC core; ``metaql calibrate`` measures others.
    """

    flop: float = 1.15e-11  # a multiplication or an addition within a product of matrices
    load: float = 2.2e-10  # a number that such a product reads
    stream: float = 1.5e-10  # a number read once and in order, as in a product with one vector
    result: float = 1.0e-10  # a number of an intermediate result: written, multiplied, added up
    gather: float = 6e-10  # a number copied out of rows that lie apart
    row: float = 5e-8  # each such row, besides
    call: float = 1.5e-5  # a step of a kernel: a few torch operations and what Python does around them
    function: float = 1.2e-4  # a call that DuckDB makes
    # Ways that are taken wherever they exist, whatever they cost. For tests and benches.
    forced: frozenset[str] = frozenset()

    def choose(self, seconds: dict[str, float]) -> str:
        """The cheapest of some ways; of the forced ones, if there are any among them."""
        ways = self.forced & seconds.keys() or seconds.keys()
        return min(sorted(ways), key=lambda way: seconds[way])


SHIPPED = Constants()


@dataclass(frozen=True)
class Side:
    """Samples on one side of a product; ``positions`` is the average number of a sample, None for laid-out ones."""

    samples: float
    positions: float | None

    @property
    def count(self) -> float:
        """All positions."""
        return self.samples * (self.positions or 0)


def stored(layer: Layer, samples: float) -> Side:
    """So many samples as a store keeps them; one position each where samples differ and nobody counted."""
    return Side(samples, None if layer.layout == FULL else layer.positions or 1)


def matrix(costs: Constants, layer: Layer, left: Side, right: Side) -> dict[str, float]:
    """Seconds to multiply every left with every right sample, for each way there is."""
    found = {FULL: _laid_out(costs, layer, left) + _laid_out(costs, layer, right)}
    found[FULL] += product(costs, left.samples, layer.width, right.samples)
    if left.positions is not None and right.positions is not None:
        found[GRAM] = gram(costs, layer, left.count, right.count)
    if left.positions is not None:
        found[CONTRACT] = _laid_out(costs, layer, right) + _contract_matrix(costs, layer, left.count, right.samples)
    elif right.positions is not None:
        found[CONTRACT] = _contract_matrix(costs, layer, right.count, left.samples)
    return found


def against(costs: Constants, layer: Layer, left: Side, positions: float | None) -> dict[str, float]:
    """Seconds to multiply with one vector that is there laid out, and with so many positions as factors."""
    ways = matrix(costs, layer, left, Side(1, None))
    if positions is not None:
        way = _by_factors(left)
        ways[way] = matrix(costs, layer, left, Side(1, positions))[way]
    return ways


def saved(costs: Constants, layer: Layer, left: Side, positions: float) -> float:
    """Seconds that multiplying with one vector takes less when it is laid out than by so many positions of factors.

    Without laying it out, which is done once.
    """
    ways = against(costs, layer, left, positions)
    by_factors = ways.pop(_by_factors(left))
    if costs.forced & {_by_factors(left), *ways}:
        return -inf if _by_factors(left) in costs.forced else inf
    return by_factors - min(ways.values())


def _by_factors(left: Side) -> str:
    """What a vector's factors are multiplied by: other factors, or gradients."""
    return CONTRACT if left.positions is None else GRAM


@dataclass(frozen=True)
class Prices:
    """Seconds of scoring rows against one vector, over all layers: all rows in order, or some that lie apart."""

    scan_call: float
    scan_row: float
    probe_call: float
    probe_row: float

    def scan(self, rows: float) -> float:
        """So many rows that follow one another."""
        return self.scan_call + rows * self.scan_row

    def probe(self, rows: float) -> float:
        """So many rows that lie apart, at a time."""
        return self.probe_call + rows * self.probe_row

    def ways(self, rows: float, share: float) -> dict[str, float]:
        """Seconds to score a share of rows, 0 to 1, that a table has in no particular place, for each way."""
        return {SCAN: self.scan(rows), PROBE: rows / CALL_ROWS * self.probe(share * CALL_ROWS)}


def prices(costs: Constants, terms: Iterable[tuple[Layer, float | None, float | None]]) -> Prices:
    """The prices where each layer has so many positions a row, and a vector of so many; None where laid out."""
    terms = tuple(terms)
    scan = [_one_vector(costs, terms, rows, apart=False) for rows in (1, CALL_ROWS)]
    probe = [_one_vector(costs, terms, rows, apart=True) for rows in (1, CALL_ROWS // 8)]
    scan_row, probe_row = (scan[1] - scan[0]) / (CALL_ROWS - 1), (probe[1] - probe[0]) / (CALL_ROWS // 8 - 1)
    return Prices(scan[0] - scan_row, scan_row, probe[0] - probe_row, probe_row)


def _one_vector(
    costs: Constants, terms: tuple[tuple[Layer, float | None, float | None], ...], rows: int, apart: bool
) -> float:
    seconds = 0.0
    for layer, own, other in terms:
        left = Side(rows, own)
        ways = against(costs, layer, left, other)
        seconds += ways[costs.choose(ways)] + (gathered(costs, layer, left) if apart else 0.0)
    return seconds


def pairs(costs: Constants, layer: Layer, count: float, left: float | None, right: float | None) -> dict[str, float]:
    """Seconds to multiply so many pairs of samples with these positions each (None: laid out), for each way."""
    sides = Side(count, left), Side(count, right)
    width = count * layer.width
    found = {FULL: sum(_laid_out(costs, layer, side) for side in sides) + 2 * width * costs.stream + costs.call}
    if left is not None and right is not None:
        numbers = count * (left + right) * sum(factor_widths(layer))
        steps = _steps(2 * count * left * right * layer.groups)
        found[GRAM] = count * _gram(costs, layer, left, right) + numbers * costs.load + steps * costs.call
    if left is not None or right is not None:
        factored, other = sides if left is not None else sides[::-1]
        flops = 2 * factored.count * _weights(layer) * costs.flop
        found[CONTRACT] = _laid_out(costs, layer, other) + flops + width * costs.stream + costs.call
    return found


def gram(costs: Constants, layer: Layer, left: float, right: float) -> float:
    """Seconds to multiply all these positions of one side with all of the other, and to add the products up."""
    i, o = factor_widths(layer)
    operands = left + right if right > 1 else left
    rate = costs.load if right > 1 else costs.stream
    numbers = operands * (i + o) * rate
    return _gram(costs, layer, left, right) + numbers + _steps(2 * left * right * layer.groups) * costs.call


def _gram(costs: Constants, layer: Layer, left: float, right: float) -> float:
    if layer.kind == TIED:
        return _tied_gram(costs, layer, left, right)
    products = left * right
    return products * (2 * sum(factor_widths(layer)) * costs.flop + 2 * layer.groups * costs.result)


def _tied_gram(costs: Constants, layer: Layer, left: float, right: float) -> float:
    """Each part with each: where they differ, a product over the width, and a number of the prefix picked."""
    ours, theirs = _shares(layer, left), _shares(layer, right)
    alike = sum(_gram(costs, part, one, other) for (part, one), (_, other) in zip(ours, theirs, strict=True))
    (_, projection), (table, looked_up) = ours
    crossed = projection * theirs[1][1] + looked_up * theirs[0][1]
    return alike + crossed * (2 * factor_widths(table)[1] * costs.flop + costs.gather + 2 * costs.result)


def _shares(layer: Layer, positions: float) -> list[tuple[Layer, float]]:
    """The parts of a tied layer, each with its positions where the projection has so many."""
    each = (layer.looked_up or 0) / max(layer.positions or 0, 1)
    projection, table = parts(layer)
    return [(projection, positions), (table, positions * each)]


def contract(costs: Constants, layer: Layer, positions: float) -> float:
    """Seconds to multiply so many positions with one laid-out gradient, and to add the products up."""
    if layer.kind == TIED:
        return sum(contract(costs, part, count) for part, count in _shares(layer, positions))
    i, o = factor_widths(layer)
    if layer.kind == "embedding":
        # Every position reads its own row of the table.
        seconds = positions * (costs.row + o * (costs.gather + costs.stream))
        return seconds + _steps(positions * o) * costs.call
    narrow, wide = min(i, o), max(i, o)
    seconds = positions * (
        2 * _weights(layer) * costs.flop + narrow * costs.load + wide * (costs.stream + costs.result)
    )
    return seconds + _weights(layer) * costs.load + _steps(positions * wide) * costs.call


def _contract_matrix(costs: Constants, layer: Layer, positions: float, gradients: float) -> float:
    """Seconds to multiply so many positions with each of some laid-out gradients."""
    if layer.kind in (TIED, "embedding") or layer.groups > 1 or gradients <= 1:
        return gradients * contract(costs, layer, positions)
    narrow, wide = sorted(factor_widths(layer))
    columns = gradients * narrow
    numbers = (positions * max(1.0, columns / COLUMNS) + columns) * wide * costs.load
    results = positions * columns * (costs.stream + costs.result)
    flops = 2 * positions * gradients * _weights(layer) * costs.flop
    return flops + numbers + results + _steps(positions * columns) * costs.call


def turned(costs: Constants, layer: Layer, side: Side) -> float:
    """Seconds to multiply a side's factors, or its gradients from both sides, with square matrices."""
    i, o = factor_widths(layer)
    if side.positions is None:
        return side.samples * (product(costs, o, o, i) + product(costs, o, i, i))
    return product(costs, side.count, i, i) + product(costs, side.count, o, o)


def lay_out(costs: Constants, layer: Layer, positions: float) -> float:
    """Seconds to make one gradient, or a sum of several, of so many positions."""
    if layer.kind == TIED:
        return sum(lay_out(costs, part, count) for part, count in _shares(layer, positions))
    if layer.kind == "embedding":
        o = factor_widths(layer)[1]
        return layer.width * costs.result + positions * (costs.row + o * costs.gather) + costs.call
    flops = 2 * positions * _weights(layer) * costs.flop
    numbers = positions * sum(factor_widths(layer)) * (costs.load + costs.result)
    if layer.kind == "conv":
        # Its patches are made of the input.
        numbers += positions * factor_widths(layer)[0] * costs.gather
    return flops + numbers + layer.width * costs.result + costs.call


def product(costs: Constants, rows: float, inner: float, columns: float) -> float:
    """Seconds of a product of matrices [rows, inner] x [inner, columns]."""
    if min(rows, columns) <= 1:
        return (rows + columns) * inner * costs.stream + costs.call
    numbers = (rows + columns) * inner * costs.load
    return 2 * rows * inner * columns * costs.flop + numbers + costs.call


def gathered(costs: Constants, layer: Layer, side: Side) -> float:
    """Seconds to copy rows that lie apart."""
    # Besides the copying, the rows have to be found: some small operations on their numbers.
    numbers = side.samples * layer.width if side.positions is None else side.count * sum(factor_widths(layer))
    return numbers * costs.gather + side.samples * costs.row + 4 * costs.call


def _laid_out(costs: Constants, layer: Layer, side: Side) -> float:
    """Seconds to lay out every sample of a side; nothing where they are."""
    if side.positions is None:
        return 0.0
    one = lay_out(costs, layer, side.positions)
    return side.samples * (one - costs.call) + costs.call * _steps(side.samples * layer.width)


def factor_widths(layer: Layer) -> tuple[int, int]:
    """Numbers of a position's suffix and prefix in a product; an embedding's suffix is a row to compare.

    With a position of a tied layer go so many of its table.
    """
    assert layer.input_width is not None
    assert layer.output_width is not None
    if layer.kind == TIED:
        (_, _), (_, each) = _shares(layer, 1)
        return round(layer.input_width + each * (1 + layer.input_width)), layer.output_width
    return 1 if layer.kind == "embedding" else layer.groups * layer.input_width, layer.output_width


def _weights(layer: Layer) -> int:
    """Numbers of the weight's gradient."""
    return layer.parameters[0].width


def _steps(numbers: float) -> int:
    return max(1, ceil(numbers / STEP))
