"""Routes about the server itself and its store."""
