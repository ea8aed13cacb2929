"""The engine: one owner thread that schedules, runs and post-processes generation requests."""
