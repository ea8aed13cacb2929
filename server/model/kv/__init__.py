"""KV memory in blocks: who holds which block, and the prompts whose blocks can be used again. Knows no tensor."""
