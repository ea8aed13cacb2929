"""The device-driven decode path: a whole step as one CUDA graph, with no host synchronisation inside."""
