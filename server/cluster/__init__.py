"""Many replicas of a server on Ray Serve, and the choice of the one that is warm for a request."""
