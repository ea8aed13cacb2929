"""The choice of deep experts to extract."""
