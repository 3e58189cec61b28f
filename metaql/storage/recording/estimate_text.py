"""An estimate as people read it: a table, totals, and what would make the recording smaller."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from metaql.storage.schema import Layer

if TYPE_CHECKING:
    from metaql.storage.recording.estimate import Estimate

# Layers beyond these are summed up in one line.
_MOST_LINES = 24
# A layer's share that is worth a word, and how many of them get one.
_LARGE = 0.2
_MOST_LARGE = 2


def table(estimate: Estimate) -> str:
    """The estimate, a line for each of its largest layers; no line ends in a newline."""
    chosen = sorted(estimate.layers, key=lambda one: -one.bytes_per_sample)[:_MOST_LINES]
    rows = [
        (one.layer, one.kind, one.layout, _number(one.positions), size(one.bytes_per_sample), one.bytes, one.share)
        for one in estimate.layers
        if one in chosen
    ]
    rest = [one for one in estimate.layers if one not in chosen]
    others = [
        (f"{len(rest)} smaller layers", sum(one.bytes_per_sample for one in rest)),
        ("inputs", estimate.inputs_per_sample),
        ("ids, losses, labels", estimate.rows_per_sample),
    ]
    samples = estimate.samples
    rows += [
        (
            name,
            "",
            "",
            "",
            size(each),
            None if samples is None else round(each * samples),
            each / estimate.bytes_per_sample,
        )
        for name, each in others
        if each
    ]
    cells = [("layer", "kind", "layout", "positions", "a sample", "in all", "share")]
    cells += [(*row[:5], "" if row[5] is None else size(row[5]), _percent(row[6])) for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(7)]
    return "\n".join([*(_line(row, widths) for row in cells), "", *_totals(estimate), *estimate.suggestions])


def suggestions(estimate: Estimate, layers: Sequence[Layer], trainable: Iterable[str]) -> tuple[str, ...]:
    """What would make the recording smaller, in words, with the arguments to give to the recorder."""
    found, names = [], list(trainable)
    large = [one for one in sorted(estimate.layers, key=lambda one: -one.share) if one.share >= _LARGE]
    recorded = {each.name for layer in layers for each in layer.parameters}
    for count in range(1, min(len(large), _MOST_LARGE, len(layers) - 1) + 1):
        out = [one.layer for one in large[:count]]
        left = recorded - {each.name for layer in layers if layer.name in out for each in layer.parameters}
        saved = sum(one.share for one in large[:count])
        patterns = list(_patterns(names, left, ""))
        found.append(f"Leaving out {' and '.join(map(repr, out))} saves {_percent(saved)}: layers={patterns}")
    if estimate.dtype != "bfloat16":
        saved = 1 - estimate.bfloat16_bytes_per_sample / estimate.bytes_per_sample
        found.append(f"dtype='bfloat16' saves {_percent(saved)}; gradients then have two to three digits.")
    if estimate.inputs_per_sample > _LARGE * estimate.bytes_per_sample:
        found.append(f"inputs=False saves {_percent(estimate.inputs_per_sample / estimate.bytes_per_sample)}.")
    return tuple(found)


def size(count: float) -> str:
    """Bytes for people: 12.3 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count:.0f} B"


def _totals(estimate: Estimate) -> list[str]:
    if estimate.bytes is None or estimate.bfloat16_bytes is None or estimate.seconds is None:
        lines = [
            f"{size(estimate.bytes_per_sample)} for each sample; the data does not tell how many there are. "
            f"{size(estimate.free)} are free.",
            f"{_time(estimate.seconds_per_batch)} for a batch of {estimate.batch_size} (measured), and writing.",
        ]
    else:
        fits = "" if estimate.fits else ", so it does NOT fit"
        lines = [
            f"{estimate.samples:,} samples take {size(estimate.bytes)}; {size(estimate.free)} are free{fits}.",
            f"About {_time(estimate.seconds)}: {_time(estimate.seconds_per_batch)} for a batch of "
            f"{estimate.batch_size} (measured), and writing at {size(estimate.written_per_second)} a second (assumed).",
        ]
    return [
        *lines,
        f"Memory beyond the model: {size(estimate.memory)} for a batch (measured), and up to {size(estimate.buffers)} "
        "that wait for the disk.",
    ]


def _patterns(names: Sequence[str], wanted: set[str], prefix: str) -> Iterable[str]:
    """The shortest names of modules and parameters, in the model's order, that stand for the wanted ones alone."""
    for part in dict.fromkeys(name.removeprefix(prefix).split(".")[0] for name in names):
        below = [name for name in names if name == prefix + part or name.startswith(f"{prefix}{part}.")]
        if wanted.issuperset(below):
            yield prefix + part
        elif wanted.intersection(below):
            yield from _patterns([name for name in below if name != prefix + part], wanted, f"{prefix}{part}.")


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _number(positions: float | None) -> str:
    return "" if positions is None else f"{positions:,.4g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    words = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    return "  ".join([*words, *(cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True))])


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
