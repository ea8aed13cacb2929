"""What experts did on known texts, and the price of a mask."""
