"""What can go wrong while a store grows or shrinks; apart, so that others can name it without loading torch."""


class GrowthError(ValueError):
    """A store that cannot grow or shrink as asked.

    GrowthError
      GrowthBusyError       it is growing, shrinking or reloading already
      NothingToGrowError    it has every expert, or its byte budget holds no more
      GrowthSourceError     the checkpoint that it came from is not where it was
    """


class GrowthBusyError(GrowthError):
    """One change of a store at a time."""


class NothingToGrowError(GrowthError):
    """No expert is missing that may be added."""


class GrowthSourceError(GrowthError):
    """The source checkpoint is not there."""
