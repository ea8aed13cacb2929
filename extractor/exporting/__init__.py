"""Writes pruned checkpoints from stores."""
