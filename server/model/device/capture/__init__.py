"""Which models can be captured, and why others cannot."""
