"""The program ``safe-core``: prune transformers, inspect checkpoints and measure perplexity.

Each command calls one function, which also works from Python: `inspect_checkpoint`,
`perplexity` or `prune_folder`.
"""
