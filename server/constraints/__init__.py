"""Constraints on generated text: schemas, patterns and tool calls, enforced token by token."""
