"""Vision studies: networks, data sets, label noise, corruptions, attacks and a runner.

Installed as `safe_core.study`. NumPy draws all random numbers from seeds, so both frameworks
start from the same weights and see the same images.
"""
