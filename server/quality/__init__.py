"""Calibration and evaluation: what experts do on known texts, and what a mask costs."""
