"""What turns gradients into answers: numbers and tensors only; nothing here knows SQL or a store.

- ``hydra``: what each step of a training run adds to HYDRA's influence
- ``elite``: anomaly detectors that are trained on polluted data, with a handful of labels
- ``lancet``: labels from few labels, and which rows to ask for next
- ``rows``, ``scaling``, ``networks``, ``numbers``, ``facilities``, ``random_numbers``, ``taken_apart``: what both need
- the others: curvature and its inverse, for influence functions
"""
