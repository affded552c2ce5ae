"""The commands of ``safe-core`` for checkpoints and transformers, one in each file."""
