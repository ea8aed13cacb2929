"""The output: writing, resuming and verifying a store."""
