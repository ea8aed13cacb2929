"""Adapters: distils a whole model into itself under masks, so that any checkpoint can be masked."""
