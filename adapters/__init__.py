"""Bind the method to PyTorch and to JAX.

`safe_core.adapters.torch` wraps a torch.optim optimizer, `safe_core.adapters.optax` a
gradient transformation. Both bind the same `safe_core.Method`; neither is imported here.
"""
