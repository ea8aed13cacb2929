"""Changing the store of a running server."""
