"""The `deepfew` command and its subcommands."""
