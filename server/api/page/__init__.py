"""The page of the server: chat, the map of experts, and the state of the moment."""
