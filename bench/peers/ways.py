"""All ways of scoring, by name, in the order of the tables."""

from __future__ import annotations

from bench.peers import bergson, captum, dattri, kronfluence, metaql, torch_func, trak
from bench.peers.way import Way

WAYS: dict[str, Way] = {
    way.name: way for module in (metaql, torch_func, captum, kronfluence, dattri, trak, bergson) for way in module.WAYS
}
