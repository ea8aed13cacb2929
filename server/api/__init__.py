"""The HTTP API. Only here is FastAPI known."""
