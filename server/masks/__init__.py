"""Masks for requests, and their expected price."""
