"""How many bytes does a sample's gradient take on the disk? Table 1 of the MetaStore paper beside ours.

VGG16 (width 64) with images of CIFAR-10, and BERT-base with texts of AG News; weights are drawn at random. The paper
keeps a layer's input and dC/dy: of a convolution its input map and output map, of a linear layer both vectors of every
position. Attention stands for its four linears together. Exits with 1 when a promise is missed.

    python -m bench.storage
    python -m bench.storage --full               # more samples
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.models import VGG
from bench.report import Report, bars, require, table
from bench.stores import layer_bytes
from bench.workloads import Workload, attention, bert, vgg
from metaql.storage.schema import Layer
from metaql.storage.store import Store

# Header, footer and what stands before each record batch; the rest are numbers.
OVERHEAD = 0.01
COLUMNS = {
    "layer": "layer",
    "full": "full gradient, bytes",
    "paper_size": "paper's factors, bytes",
    "ours": "ours, bytes",
    "ours_half": "ours in bfloat16",
    "paper": "full / paper's (as published)",
    "ratio": "full / ours",
    "ratio_half": "full / ours in bfloat16",
    "why": "smaller than the paper's by",
}


@dataclass(frozen=True)
class Row:
    """A row of the table: the layers that it sums over, and by how much the paper's factors are smaller."""

    name: str
    layers: Sequence[str]
    paper: float | None = None


def rows_of_vgg(workload: Workload) -> list[Row]:
    """Four layers of VGG16."""
    model = workload.model
    assert isinstance(model, VGG)
    convolutions = [(number, model.convolution(number)) for number in (1, 7, 13)]
    published = (0.025, 18.0, 578.0)
    rows = [Row(f"conv{number}", [name], paper) for (number, name), paper in zip(convolutions, published, strict=True)]
    return [*rows, Row("linear1", ["classifier"], 9.8)]


def rows_of_bert(layers: Sequence[int], published: bool) -> list[Row]:
    """Attention of three layers, its query alone, and the classifier; published are figures for 16 positions."""
    rows = []
    for layer in layers:
        four = attention(layer)
        rows.append(Row(f"attention of layer {layer}", four, 24.0 if published else None))
        rows.append(Row(f"query of layer {layer}", four[:1]))
    return [*rows, Row("linear1", ["classifier"], 3.9)] if published else rows


def measure(report: Report, workload: Workload, rows: Sequence[Row], label: str, folder: Path) -> None:
    """Adds the rows of one network; a store of these layers in each precision is written to the folder."""
    names = list(dict.fromkeys(name for row in rows for name in row.layers))
    stores = {}
    for dtype in ("float32", "bfloat16"):
        path = folder / f"{label.replace(' ', '-')}-{dtype}"
        print(f"recording {len(workload.targets)} samples, {label}, {dtype}", flush=True)
        workload.record(path, {"train": range(len(workload.targets))}, [f"{name}.*" for name in names], dtype)
        stores[dtype] = Store.open(path)
    samples, positions = len(workload.targets), next(iter(workload.inputs.values())).shape[1]
    for row in rows:
        layers = [stores["float32"].layer(name) for name in row.layers]
        require(all(map(_is_whole, layers)), f"a layer of {row.name} has other parameters than its weight and bias")
        ours, half = (sum(layer_bytes(stores[dtype], name) for name in row.layers) / samples for dtype in stores)
        full = 4 * sum(layer.width for layer in layers)
        paper_size = 4 * sum(paper_elements(layer, positions) for layer in layers)
        report.add(
            layer=f"{label}, {row.name}",
            full=full,
            paper_size=paper_size,
            ours=ours,
            ours_half=half,
            paper=row.paper,
            paper_computed=full / paper_size,
            ratio=full / ours,
            ratio_half=full / half,
            why=", ".join(gains(stores["float32"], layers, samples, positions)),
        )


def paper_elements(layer: Layer, positions: int) -> int:
    """Numbers that the paper's factors of a sample have; ``positions`` are those of a sentence, padding included."""
    if layer.kind != "conv":
        each = (layer.input_width or 0) + (layer.output_width or 0)
        return each * (1 if layer.positions == 1 else positions)
    # All of VGG's convolutions keep the size of their input.
    channels = layer.parameters[0].shape[1]
    return (channels + (layer.output_width or 0)) * (layer.positions or 0)


def gains(store: Store, layers: Sequence[Layer], samples: int, positions: int) -> list[str]:
    """What makes ours smaller than the paper's factors, without loss."""
    found = []
    if any(layer.layout == "full" for layer in layers):
        found.append("the full layout")
    names = {layer.name for layer in layers}
    segments = [one for each in store.manifest.collections for one in each.segments if one.layer in names]
    dropped = sum(one.statistics.dropped for one in segments)
    if dropped:
        share = dropped / (samples * positions * len(layers))
        found.append(f"{share:.0%} of positions, whose prefix is zero, dropped")
    sharing = {one.layer for one in segments if one.suffix_of in names}
    if sharing:
        found.append(f"the input of {len(sharing) + 1} layers, stored once")
    return found


def _is_whole(layer: Layer) -> bool:
    return len(layer.parameters) == 2


def judge(report: Report) -> None:
    """The promises."""
    limits = [min(row["full"], row["paper_size"]) for row in report.rows]
    worst = max(row["ours"] / limit for row, limit in zip(report.rows, limits, strict=True))
    report.promise(
        "in float32 never more bytes than the paper's factors or the full gradient, whichever is less, and 1 % for"
        " the file's header and footer",
        worst <= 1 + OVERHEAD,
        f"at most {worst:.4f} times",
    )
    half = max(row["ours_half"] / row["ours"] for row in report.rows)
    report.promise("in bfloat16 half of that, and 1 %", half <= 0.5 * (1 + OVERHEAD), f"at most {half:.4f} times")


def plot(report: Report) -> Any:
    """How much smaller than the full gradient: the paper's as computed, ours in both precisions."""
    keys = {"paper_computed": "paper's factors", "ratio": "ours, float32", "ratio_half": "ours, bfloat16"}
    figure, axes = bars(report.rows, "layer", keys, "times smaller than the full gradient")
    axes.axvline(1, color="black", linewidth=0.8)
    return figure


def main() -> int:
    """Prints the table; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="512 and 128 samples, not 128 and 64")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, texts = (512, 128) if options.full else (128, 64)
    report = Report("storage", "How many bytes does a sample's gradient take on the disk?")
    with tempfile.TemporaryDirectory() as folder:
        workload = vgg(images)
        measure(report, workload, rows_of_vgg(workload), "VGG16", Path(folder))
        for length in (16, 64):
            workload = bert(texts, length)
            positions = workload.inputs["input_ids"].shape[1]
            rows = rows_of_bert((1, 6, 11), published=length == 16)
            measure(report, workload, rows, f"BERT, {positions} tokens", Path(folder))
    judge(report)
    report.remark(
        "The paper's 24 for attention is that of 16 positions. With longer texts, in batches padded to the longest,"
        " its factors grow with the padding and ours with the words"
    )
    report.remark(
        "Layers of BERT are counted from 0 as in its modules' names. In the last one only the first position's output"
        " is used, so query and output have one position with a prefix that is not zero"
    )
    report.remark(
        "Query, key and value have the same input. Stored once it takes Din + 3 Dout numbers for a position of the"
        " three in place of 3 (Din + Dout): a third less where Din = Dout, a quarter of attention with its output. The"
        " query's row counts all of the input, which its layer's file holds"
    )
    return report.write([table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
