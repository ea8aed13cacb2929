"""`python -m server.cli`, the same as `deepfew`."""

from server.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
