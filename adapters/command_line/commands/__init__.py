"""The commands of ``safe-core`` for checkpoints and transformers, one per file."""
