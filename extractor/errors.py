"""The errors of extraction, as one tree.

    ExtractError
    ├── CheckpointError          the input is missing, damaged, or not a checkpoint that this program reads
    ├── UnsupportedFamilyError   a dense model, or a family that is not supported
    ├── SelectionError           an impossible expert, count, budget or plan
    ├── TargetError              the store's directory holds something else, or another extraction is running
    ├── DiskFullError            too little room on the disk
    └── MismatchError            a store differs from its checkpoint

Every message says what is wrong, what was found, what was expected and what to do.
"""


class ExtractError(Exception):
    """Base of everything that this package raises on purpose."""


class CheckpointError(ExtractError):
    """The checkpoint is missing, truncated, inconsistent, or in a format that is not read."""


class UnsupportedFamilyError(ExtractError):
    """The model has no experts to extract, or belongs to a family that is not supported."""


class SelectionError(ExtractError):
    """The selection names experts that do not exist, takes nothing, or contradicts the plan."""


class TargetError(ExtractError):
    """The target directory holds something that must not be overwritten."""


class DiskFullError(ExtractError):
    """The disk has no room for what is to be written; what was finished stays and the next run continues."""


class MismatchError(ExtractError):
    """A store and the checkpoint that it was compared with differ."""
