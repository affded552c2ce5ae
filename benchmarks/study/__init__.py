"""Parts of vision studies: networks, data sets, label noise, corruptions and attacks.

Installed as `safe_core.study`. Everything random is drawn in NumPy from seeds, so that both
frameworks start from the same weights and see the same images.
"""
