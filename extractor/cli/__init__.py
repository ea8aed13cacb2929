"""The commands of the extractor."""
