"""Networks with samples of real data: VGG16 on CIFAR-10, BERT on AG News; and their per-sample gradients by torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metaql
from bench import data, models

ATTENTION = ("self.query", "self.key", "self.value", "output.dense")


@dataclass(frozen=True)
class Workload:
    """A network and samples for it: ``inputs`` by the names of its arguments, [n, ...] each, and ``targets`` [n]."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    targets: Tensor

    def loss(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return F.cross_entropy(_logits(self.model(**inputs)), targets)

    def batch(self, part: Tensor | slice) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and targets of some samples."""
        return {name: value[part] for name, value in self.inputs.items()}, self.targets[part]

    def batches(self, part: range, size: int) -> list[tuple[Tensor, Any]]:
        """(ids, batch) as a recorder takes them; ids count from 0."""
        places = torch.arange(part.start, part.stop)
        return [(some - part.start, self._for_recorder(some)) for some in places.split(size)]

    def record(
        self, path: Path, splits: Mapping[str, range], layers: Sequence[str] | None, dtype: str = "float32"
    ) -> None:
        """A store with the gradients of these samples at one checkpoint."""
        with metaql.Recorder(self.model, path, layers=layers, dtype=dtype) as recorder:
            recorder.checkpoint()
            for split, part in splits.items():
                recorder.collect(self.batches(part, 32), split)

    def gradients(self, part: range, parameters: Sequence[str]) -> Tensor:
        """The samples' gradients of some parameters, one after another, by torch.func: [n, elements]."""
        fixed = {name: value.detach() for name, value in self.model.named_parameters() if name not in parameters}
        fixed |= dict(self.model.named_buffers())
        chosen = {name: self.model.get_parameter(name).detach() for name in parameters}

        def loss(values: dict[str, Tensor], inputs: dict[str, Tensor], target: Tensor) -> Tensor:
            single = {name: value.unsqueeze(0) for name, value in inputs.items()}
            out = functional_call(self.model, {**fixed, **values}, (), single)
            return F.cross_entropy(_logits(out), target.unsqueeze(0))

        inputs, targets = self.batch(slice(part.start, part.stop))
        if "attention_mask" in inputs:
            # transformers looks into a mask of two dimensions, which vmap does not allow; one of four it leaves alone.
            inputs["attention_mask"] = _every_pair(inputs["attention_mask"])
        # The fused attention has no rule for vmap, which would fall back to a loop.
        with sdpa_kernel(SDPBackend.MATH):
            found = vmap(grad(loss), in_dims=(None, 0, 0))(chosen, inputs, targets)
        return torch.cat([found[name].flatten(1) for name in parameters], dim=1)

    def _for_recorder(self, places: Tensor) -> Any:
        inputs, targets = self.batch(places)
        return (*inputs.values(), targets) if len(inputs) == 1 else {**inputs, "labels": targets}


def vgg(samples: int, width: int = 64, **settings: Any) -> Workload:
    """VGG16 in evaluation mode with so many test images."""
    images, labels = data.cifar10("test")
    model = models.VGG(width, **settings).eval()
    return Workload("VGG16", model, {"images": images[:samples]}, labels[:samples])


def bert(samples: int, length: int, width: int = 768, layers: int = 12) -> Workload:
    """BERT in evaluation mode with so many test texts, of at most ``length`` tokens."""
    texts, classes = data.ag_news("test")
    known = data.vocabulary(texts, 30_522)
    numbers, mask = data.tokens(texts[:samples], known, length)
    model = models.bert(width=width, layers=layers).eval()
    return Workload("BERT", model, {"input_ids": numbers, "attention_mask": mask}, classes[:samples])


def linear(samples: int, width: int) -> Workload:
    """One linear layer with as many outputs as inputs, and random samples."""
    return Workload(
        "linear",
        nn.Sequential(nn.Linear(width, width, bias=False)),
        {"input": torch.randn(samples, width)},
        torch.randint(0, width, (samples,)),
    )


def attention(layer: int) -> list[str]:
    """The modules of the four linears of one of BERT's attention layers."""
    return [f"bert.encoder.layer.{layer}.attention.{name}" for name in ATTENTION]


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def _every_pair(mask: Tensor) -> Tensor:
    """Which positions attend to which: [n, s] => bool [n, 1, s, s]."""
    return mask.bool()[:, None, None, :].expand(-1, -1, mask.shape[1], -1)
