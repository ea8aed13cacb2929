"""The errors of a store, as one tree.

    StoreError
    ├── ManifestError            the manifest is missing, malformed, of an unknown version or contradicts itself
    ├── ShardCorruptError        a file of the store is not what the manifest says it is
    ├── ExpertUnavailableError   the store holds no such expert
    └── SlotsError               the slots cannot do what was asked of them

Every message says what is wrong, what was found, what was wanted and what to do.
"""


class StoreError(Exception):
    """Base of everything that this package raises on purpose.

    Attributes:
        expert: the (layer, expert) whose span could not be read, where one is to blame.
    """

    expert: tuple[int, int] | None = None


class ManifestError(StoreError):
    """The manifest cannot be read, has an unknown version, or contradicts itself or the files around it."""


class ShardCorruptError(StoreError):
    """A file named by the manifest is truncated, altered, swapped or missing; the message names it."""


class ExpertUnavailableError(StoreError):
    """An expert was asked for that is not in the store (or does not exist in the model at all)."""


class SlotsError(StoreError):
    """Too little memory for the slots, a slot asked for while all are leased, or a lease misused."""
