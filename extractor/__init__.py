"""Extracts a store from a checkpoint: finds the bytes of each deep expert, chooses deep experts, writes the files."""
