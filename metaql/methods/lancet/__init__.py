"""LANCET: labels from few labels, and which rows to ask a person for next.

An embedding brings labelled and unlabelled rows of a class together, a linear model on it spreads the labels, a
distribution matching network says which rows have no labelled neighbour, and when it is enough.

- ``fit`` makes a round with ``Settings`` and returns a ``Fitted``; ``Progress`` is what its callback is given
- ``weights`` and ``select`` are the round's two later steps by themselves, for any embedding
- ``opinions`` makes one label of what several annotators say
- ``register_network`` makes other networks known
"""

from metaql.methods.lancet.annotators import Opinions, opinions
from metaql.methods.lancet.fitted import Epoch, Fitted
from metaql.methods.lancet.matching_network import weights
from metaql.methods.lancet.networks import register_network
from metaql.methods.lancet.rounds import fit
from metaql.methods.lancet.selection import select
from metaql.methods.lancet.settings import Progress, Settings
from metaql.methods.lancet.stopping import Stop

__all__ = [
    "Epoch",
    "Fitted",
    "Opinions",
    "Progress",
    "Settings",
    "Stop",
    "fit",
    "opinions",
    "register_network",
    "select",
    "weights",
]
