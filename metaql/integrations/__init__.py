"""Callbacks for the libraries that people train with: ``transformers`` and ``lightning``.

Each is one file named after its library, which is imported there and nowhere else; metaql requires neither. Both
give a ``RecorderCallback`` for the library's ``Trainer``:

- ``recording``: what the callbacks share, from the arguments they are made with to a checkpoint and its collections
- ``samples``: what a data loader reads, in the dataset's own order, so that indices are the sample ids
- ``undisturbed``: the training goes on as if nobody had looked
- ``model_losses``: samples' own losses for models that compute one loss for a batch (transformers)
"""
