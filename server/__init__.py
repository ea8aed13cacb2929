"""The server: settings, model assembly, engine, HTTP API, metrics and the `deepfew` command."""
