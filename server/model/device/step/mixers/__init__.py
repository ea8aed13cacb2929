"""Launches of what stands in the place of attention over keys and values by heads: latents, and layers with a state."""
