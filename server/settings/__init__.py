"""Settings: one frozen object from flags, environment and file."""
