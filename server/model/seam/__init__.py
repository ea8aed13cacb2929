"""The seam in transformers' model: experts, routing and masks put in its place."""
