"""Networks by name: those that a method has for each shape of rows, and those that users register with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.rows import Shape

Build = Callable[[Shape], nn.Module]


class OneChannel(nn.Module):
    """A network for rows [n, h, w] out of one for [n, 1, h, w]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: Tensor) -> Tensor:
        points: Tensor = self.network(rows.unsqueeze(1))
        return points


@dataclass(frozen=True)
class Network:
    """What builds a network, and for rows of how many axes; None for any."""

    build: Build
    axes: tuple[int, ...] | None = None
    wanted: str = ""


class Networks:
    """The networks of ``method``: 'mlp', 'conv1d' and 'conv2d', and what is registered."""

    def __init__(self, method: str, mlp: Build, convolutions: Build) -> None:
        def conv2d(shape: Shape) -> nn.Module:
            return convolutions(shape) if len(shape) == 3 else OneChannel(convolutions((1, *shape)))

        self._method = method
        self._own = {
            "mlp": Network(mlp),
            "conv1d": Network(convolutions, (2,), "series [channels, length]"),
            "conv2d": Network(conv2d, (2, 3), "images [h, w] or [channels, h, w]"),
        }
        self._registered: dict[str, Network] = {}

    def register(self, name: str, build: Build) -> None:
        """Makes the name known, or known for this. QueryError for one of the method's own."""
        if name in self._own:
            raise QueryError(f"'{name}' is the name of a network that is there already: choose another")
        self._registered[name] = Network(build)

    def find(self, name: str) -> Network:
        """How a network of this name is built; QueryError if nobody has registered it."""
        known = self._own | self._registered
        if name not in known:
            raise QueryError(
                f"there is no network '{name}', only {', '.join(known)}. Networks of your own are made known by "
                f"metaql.methods.{self._method}.register_network('{name}', build)"
            )
        return known[name]

    def build(self, name: str, shape: Shape) -> nn.Module:
        """A network of this name for rows of this shape, with fresh weights."""
        network = self.find(name)
        if network.axes is not None and len(shape) not in network.axes:
            raise QueryError(f"network '{name}' takes {network.wanted}, and these rows have shape {list(shape)}")
        return require_module(network.build(shape), f"network '{name}'")


def require_module(built: object, what: str) -> nn.Module:
    """What a registered function has built; QueryError unless it is a module."""
    if not isinstance(built, nn.Module):
        raise QueryError(f"{what} must be built as a torch.nn.Module, not as {type(built).__name__}")
    return built
