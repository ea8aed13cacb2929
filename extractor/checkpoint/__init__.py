"""The input: a checkpoint and how its tensors form experts."""
