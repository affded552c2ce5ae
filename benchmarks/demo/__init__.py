"""The demo: dense, pruned and sparsely trained LeNet-300-100 on handwritten digits.

Installed as `safe_core.demo` and run by ``safe-core demo``. `train_torch` and `train_jax` are
complete training loops to copy from.
"""
