"""The transport and what the dialects share: bodies, events, errors, middleware."""
