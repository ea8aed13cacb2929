"""Makes the experts of a checkpoint smaller: matrix by matrix, from 16 bits to encoded rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expert_store.encoding import RowEncoding
from expert_store.manifest import Making
from expert_store.rows import pack_rows
from extractor.encoding.importance import Importance
from extractor.encoding.names import MADE, ExpertsDtype, encoding_of, is_second
from extractor.encoding.quantise import quantise
from extractor.errors import CheckpointError


@dataclass(frozen=True)
class Maker:
    """Makes experts in the encoding `experts_dtype`; without an `importance` all errors weigh alike."""

    experts_dtype: ExpertsDtype
    importance: Importance | None = None

    @classmethod
    def of(cls, experts_dtype: ExpertsDtype, importance: Importance | None = None) -> Maker | None:
        """None if the experts stay as shipped or in 16 bits."""
        return cls(experts_dtype, importance) if experts_dtype in MADE else None

    @property
    def making(self) -> Making:
        """The record of a store's manifest."""
        return Making(self.experts_dtype, None if self.importance is None else self.importance.sha256)

    def encoding(self, name: str, columns: int) -> RowEncoding:
        """The encoding of a matrix, by its parameter's name. Raises ExtractError if none has so many columns."""
        return encoding_of(MADE[self.experts_dtype][is_second(name)], columns)

    def rows(self, layer: int, expert: int, name: str, matrix: Tensor) -> Tensor:
        """The encoded rows, uint8 [O, row_bytes], of a matrix [O, N] with output rows first.

        Raises CheckpointError for values that cannot be encoded.
        """
        encoding = self.encoding(name, matrix.shape[1])
        importance = None if self.importance is None else self.importance.of_matrix(layer, expert, name)
        try:
            return pack_rows(encoding, quantise(matrix, encoding, importance))
        except ValueError as error:
            raise CheckpointError(
                f"{name} of expert {expert} of MoE layer {layer} cannot be made {self.experts_dtype}: {error}; get the "
                "checkpoint again, or extract with --experts-dtype 16bit"
            ) from error
