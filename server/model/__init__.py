"""The model: transformers' trunk, our experts and routing at its seam, KV memory and the runner over them."""
