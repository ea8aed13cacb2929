"""Checkpoint in, store out: which bytes are a deep expert, which to take, and writing them so that nothing is lost."""
