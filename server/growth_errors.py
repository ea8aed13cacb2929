"""What can go wrong while a store grows; apart, so that the command line can name it without loading torch."""


class GrowthError(ValueError):
    """A store that cannot grow as asked."""
