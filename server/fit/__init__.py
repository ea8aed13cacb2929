"""Predicts whether a model fits a machine, where its bytes go, and its speed, from headers and rates alone."""
