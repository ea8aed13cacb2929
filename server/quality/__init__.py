"""Calibration and evaluation: measures on known texts which experts they use, and the cost of a mask."""
