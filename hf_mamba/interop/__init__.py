"""Checkpoints for everyone: formats, loading, conversion, Auto classes, saved states, the model card and the Hub."""
