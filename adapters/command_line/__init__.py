"""The command line, ``safe-core``: look at checkpoints, measure and prune transformers.

Each command is a thin layer over functions that can be called from Python as well:
`inspect_checkpoint`, `perplexity` and `prune_folder`.
"""
