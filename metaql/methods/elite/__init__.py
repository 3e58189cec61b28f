"""ELITE: anomaly detection in polluted data, with a handful of labelled rows as validation data.

A row is trained as normal or pushed away by the sign of ⟨∇Ω(x_i), ∇L_v⟩: whether training it as normal lowers the
labelled rows' loss. ``docs/elite.md`` is the guide.

- ``fit`` trains with ``Settings`` and returns a ``Fitted``; ``Progress`` is what its callback is given
- ``candidates`` says which rows to label next
- ``register_detector`` and ``register_network`` make other scores and networks known
- ``meta_gradients`` has ⟨∇Ω(x_i), G⟩ for any module and score
"""

from metaql.methods.elite.candidates import candidates
from metaql.methods.elite.detectors import register_detector
from metaql.methods.elite.fitted import Epoch, Fitted
from metaql.methods.elite.meta_gradients import meta_gradients
from metaql.methods.elite.networks import register_network
from metaql.methods.elite.settings import Progress, Settings
from metaql.methods.elite.training import fit

__all__ = [
    "Epoch",
    "Fitted",
    "Progress",
    "Settings",
    "candidates",
    "fit",
    "meta_gradients",
    "register_detector",
    "register_network",
]
