"""What turns gradients into answers: numbers and tensors only; nothing here knows SQL or a store.

- ``hydra``: what each step of a training run adds to HYDRA's influence
- the others: curvature and its inverse, for influence functions
"""
