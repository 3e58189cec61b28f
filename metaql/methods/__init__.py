"""What turns gradients into answers: numbers and tensors only; nothing here knows SQL or a store.

- ``hydra``: what each step of a training run adds to HYDRA's influence
- ``lancet``: labels from few labels, and which rows to ask for next
- the others: curvature and its inverse, for influence functions
"""
