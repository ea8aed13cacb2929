"""Masks for requests and what they are expected to cost."""
