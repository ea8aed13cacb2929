"""Statistics of the experts on known texts, and the price of a mask."""
