"""The Text Generation Inference dialect."""
