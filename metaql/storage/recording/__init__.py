"""From a training loop to blocks of per-sample gradients.

``recorder`` is what users hold. For each batch, ``sample_gradients`` tells the story: ``capture`` watches the
forward pass for the ``operations`` that have factors, ``alignment`` finds where the samples are, ``layering`` forms
layers, ``sample_blocks`` makes their blocks, ``replayed`` runs what has no factors again, and ``self_check`` compares
with plain autograd. ``trajectory`` does the same along the user's own backward passes.
"""
