"""The input: a checkpoint, and the assignment of its tensors to experts."""
