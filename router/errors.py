"""The errors of routing, as one tree.

    RouterError
    ├── MaskError                an invalid mask: unreadable, of experts that do not exist, or with an empty layer
    ├── LedgerError              a usage file that cannot be read, or that belongs to another checkpoint
    └── UnsupportedGatingError   no exact masked counterpart of a router is known

Every message says what is wrong, what was found, what was expected and what to do.
"""


class RouterError(Exception):
    """Base of everything that this package raises on purpose."""


class MaskError(RouterError):
    """An invalid mask: unreadable text, an expert id that does not exist, or a layer without experts."""


class LedgerError(RouterError):
    """A usage file that cannot be read, or that belongs to another checkpoint."""


class UnsupportedGatingError(RouterError):
    """No exact masked counterpart of this router is known."""
