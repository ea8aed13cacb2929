"""Chats of all dialects: messages to a prompt, and the text of an answer to its parts."""
