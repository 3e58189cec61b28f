"""What turns gradients into answers: curvature and its inverse. Tensors only; nothing here knows SQL or a store."""
