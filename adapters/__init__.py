"""What a user of one framework touches.

`safe_core.adapters.torch` wraps a torch.optim optimizer, `safe_core.adapters.optax` a
gradient transformation. Both bind the same `safe_core.Method`; neither is imported here.
"""
