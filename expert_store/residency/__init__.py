"""Experts close to the compute: slots of a device, the host tier before them, and what leaves first."""
