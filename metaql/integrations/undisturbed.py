"""A look at a model in training, after which the training goes on as if nobody had looked."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

SEED = 0


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and autograd is on; after it modes and random numbers are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = _random_states()
    model.eval()
    try:
        # Lightning saves checkpoints while it validates, in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        _restore(states)


def begin_random_numbers() -> None:
    """Starts the global random number generators anew, always alike."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


def renewed(source: Any) -> Any:
    """A shallow copy of a collator or dataset, whose own random number generators begin anew, always alike.

    The original draws on as if it had not been used.
    """
    if not hasattr(source, "__dict__"):
        return source
    twin = copy.copy(source)
    for name, value in vars(source).items():
        # transformers puts collators into one that leaves columns out.
        if name == "data_collator":
            twin.__dict__[name] = renewed(value)
        elif (fresh := _fresh(value)) is not None:
            twin.__dict__[name] = fresh
    return twin


def keeps_generators(source: Any) -> bool:
    """Whether there are random number generators among its attributes."""
    return any(_fresh(value) is not None for value in getattr(source, "__dict__", {}).values())


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).manual_seed(SEED)
    if isinstance(value, np.random.Generator):
        return np.random.default_rng(SEED)
    if isinstance(value, np.random.RandomState):
        return np.random.RandomState(SEED)
    return random.Random(SEED) if isinstance(value, random.Random) else None


def _random_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
