"""Compare SAFE without tuning to methods that are tuned for each cell.

``python -m benchmarks.untuned`` trains what is not finished and writes the table and the figure.
"""
