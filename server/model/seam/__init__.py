"""The parts that replace transformers' own in its model: experts, routing, attention and its masks."""
