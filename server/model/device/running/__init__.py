"""The runner over captured steps."""
