"""From a training loop to blocks of per-sample gradients.

``recorder`` is what users hold. For each batch, ``sample_gradients`` tells the story: ``batch_run`` runs it, while
``capture`` watches for the ``operations`` that have factors; ``examination`` finds where the samples are and compares
with plain autograd, and the ``plan`` that it makes holds for all batches of the kind; ``layering`` forms layers,
``sample_blocks`` makes their blocks, and ``replayed`` runs what has no factors again. ``trajectory`` does the same
along the user's own backward passes.
"""
