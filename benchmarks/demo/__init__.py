"""The demo: LeNet-300-100 on handwritten digits, dense, pruned, and trained sparse.

Installed as `safe_core.demo` and run by ``safe-core demo``. `train_torch` and
`train_jax` are complete training loops to copy from.
"""
