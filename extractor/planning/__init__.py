"""Which deep experts to extract."""
