"""OpenAI's Responses dialect, stateless."""
