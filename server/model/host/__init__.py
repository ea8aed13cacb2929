"""The host-driven path: the reference on every device."""
