"""A model being served: loading, health, what requests may ask for, metrics."""
