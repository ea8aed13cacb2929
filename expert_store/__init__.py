"""Deep experts on disk, in host memory and in device slots."""
