"""The weight of an error in each input channel of every expert: made from calibration, and kept in the store.

A store that was made with weights keeps them in its trunk, so that experts that are added later, or compared with the
checkpoint, get the same bits. Invariant: the file depends on the statistics alone.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from extractor.encoding.names import is_second
from extractor.errors import ExtractError
from extractor.statistics.channels import ChannelSquares

Float = npt.NDArray[np.float32]

FILE_NAME = "trunk/importance.safetensors"
PRIOR_PICKS = 16
"""Picks whose channels are all alike, added to those that were seen: few picks tell channels badly."""


@dataclass(frozen=True)
class Importance:
    """Weights of squared errors: of each layer, for the columns of an expert's first matrix [H], and of its second, for
    each expert [E, I]. Only the relation between the columns of one matrix means something.
    """

    first: tuple[Float, ...]
    second: tuple[Float, ...]

    @classmethod
    def of(cls, channels: ChannelSquares) -> Importance:
        """Raises ExtractError if calibration saw nothing of a layer."""
        if not all(squares.size for squares in (*channels.input, *channels.inner)):
            raise ExtractError("the statistics saw no tokens in some layer: calibrate on more text")
        second = []
        for inner, picks in zip(channels.inner, channels.picks, strict=True):
            means = np.array([math.fsum(row) / len(row) for row in inner])
            prior = np.where(picks > 0, PRIOR_PICKS * means / np.maximum(picks, 1), 1.0)
            second.append((inner + prior[:, None]).astype(np.float32))
        return cls(tuple(squares.astype(np.float32) for squares in channels.input), tuple(second))

    @classmethod
    def read(cls, path: Path, sha256: str) -> Importance:
        """The weights in the file of that hash. Raises ExtractError if it is another file or cannot be read."""
        try:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != sha256:
                raise ValueError("its hash is another one")
        except (ValueError, OSError) as error:
            raise ExtractError(
                f"{path} has not the weights that the store's experts were made with ({error}): restore it, or extract "
                "into an empty directory"
            ) from error
        arrays = load(content)
        layers = range(len(arrays) // 2)
        return cls(*(tuple(arrays[f"{name}.{layer}"] for layer in layers) for name in ("first", "second")))

    @cached_property
    def content(self) -> bytes:
        """The bytes of the file."""
        sides = (("first", self.first), ("second", self.second))
        return save({f"{name}.{layer}": array for name, arrays in sides for layer, array in enumerate(arrays)})

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def of_matrix(self, layer: int, expert: int, name: str) -> Float:
        """The weights of the columns of one matrix, by the name of its parameter."""
        return self.second[layer][expert] if is_second(name) else self.first[layer]
