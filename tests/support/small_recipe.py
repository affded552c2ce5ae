"""A recipe that runs in a second, for tests to change."""

from __future__ import annotations

from importlib.resources import files

__all__ = ["OWN", "RECIPES", "TINY", "changed"]

TINY = """
title = "Tiny"
frameworks = ["torch"]
sparsities = [0.8, 0.9]
seeds = [0, 1]

[data]
name = "digits"
train_images = 96
label_noise = [0.0, 0.5]

[model]
name = "lenet-300-100"
width = 0.05

[training]
epochs = 2
batch_size = 32
learning_rate = 0.1
weight_decay = 1e-4

[[methods]]
method = "dense"

[[methods]]
method = "safe"
label = "SAFE"
penalty = { "0.8" = 1e-2, default = 1e-1 }
penalty_schedule = "cosine"
dual_update_interval = 2
"""
OWN = TINY.replace("dual_update_interval = 2", "training = { epochs = 3, batch_size = 16 }")
RECIPES = sorted(p.name for p in (files("safe_core.study") / "recipes").iterdir())


def changed(old: str, new: str) -> str:
    assert old in TINY
    return TINY.replace(old, new)
