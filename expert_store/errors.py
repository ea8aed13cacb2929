"""The errors of a store, as one tree.

    StoreError
    ├── ManifestError            the manifest is missing, malformed, of an unknown version or contradicts itself
    ├── ShardCorruptError        a file of the store is not what the manifest says it is
    ├── ExpertUnavailableError   the store holds no such expert
    ├── AdapterError             an adapter cannot be read, or is of another checkpoint
    └── SlotsError               the slots, or their memory, do not allow the operation

Every message says what is wrong, what was found, what was expected and what to do.
"""


class StoreError(Exception):
    """Base of everything that this package raises on purpose.

    Attributes:
        expert: the (layer, expert) whose span could not be read; None if the error is not about one expert.
    """

    expert: tuple[int, int] | None = None


class ManifestError(StoreError):
    """The manifest cannot be read, has an unknown version, or contradicts itself or the files around it."""


class ShardCorruptError(StoreError):
    """A file named by the manifest is truncated, altered, swapped or missing; the message names it."""


class ExpertUnavailableError(StoreError):
    """The requested expert is not in the store, or does not exist in the model."""


class AdapterError(StoreError):
    """An adapter cannot be read, is of another checkpoint, or is not in the store."""


class SlotsError(StoreError):
    """There is too little memory for the slots, all slots are leased, or a lease is misused."""
