"""The interface of everything that runs a model step by step over rows of KV memory, and the plain data of a step.

A row holds the tokens of one sequence. `prefill` appends a chunk of one prompt, `decode` one token to each of several
rows. Three classes implement `Runner`: `host.runner.HostRunner`, `host.sequence_runner.SequenceRunner` and
`device.running.runner.DeviceRunner`. Invariant: a call that raises leaves rows, leases and records as they were, so the
engine may go on with other sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expert_store.adapter import Adapter
from expert_store.errors import StoreError
from expert_store.residency.cache import CacheStatistics
from expert_store.store import Store
from router.ledger import StepRecord
from router.mask import ExpertMask
from server.errors import ServerError
from server.model.kv.rows import KvRows
from server.model.kv_memory import MemoryBalance, MemoryShares
from server.model.seam.observation import ExpertOutputs, OutputObserver
from server.model.seam.routing import RowShare, StepRouting

DecodePath = Literal["auto", "device", "host"]
CachePolicy = Literal["lru", "lfu"]


@dataclass(frozen=True)
class RunnerOptions:
    """Options for loading and running a store; `server.settings.schema.ModelSettings` describes them to users.

    Attributes:
        device, dtype: of compute.
        path: the decode path, for `load_runner`: the device or the host looks up and fetches the experts.
        max_rows: most sequences at once.
        max_tokens: most tokens of a row; the runner may lower them to what KV memory holds, not below `least_tokens`.
        least_tokens: None: as `max_tokens`.
        kv_memory_bytes: of the blocks of KV memory, for all rows; None leaves it to the decode path: at most what all
            rows need, on the device-driven path also at most a share of the free memory and what slots leave.
        num_slots: slots a layer; wins over `slots_memory_bytes`. With neither, every available expert gets a slot on
            the host-driven path, and slots take the free memory of the device on the device-driven one.
        slots_memory_bytes: for the slots of all layers.
        host_memory_bytes: bound on the page-locked host tier of a GPU; None has none.
        mask: narrows the experts that the store has.
        cache_policy: of eviction.
        kept_experts: most used experts a layer that keep their slots.
        batch_invariant: a row's bits do not depend on the other rows of the batch; this costs some speed.
        memory_balance: whether slots and KV memory lend one another memory while serving, where that is possible.
        prefix_cache: keep the blocks of prompts that were read, for prompts that begin alike.
        resident_bias: lambda of cache-aware routing, of the device-driven path alone; 0: off.
        adapters: whether the adapters of the store are loaded, for rows that are masked.
    """

    device: torch.device
    dtype: torch.dtype
    path: DecodePath = "auto"
    max_rows: int = 1
    max_tokens: int = 256
    least_tokens: int | None = None
    kv_memory_bytes: int | None = None
    num_slots: int | None = None
    slots_memory_bytes: int | None = None
    host_memory_bytes: int | None = None
    mask: ExpertMask | None = None
    cache_policy: CachePolicy = "lru"
    kept_experts: int = 0
    batch_invariant: bool = True
    memory_balance: MemoryBalance = "fixed"
    prefix_cache: bool = True
    resident_bias: float = 0.0
    adapters: bool = True


class Residency(Protocol):
    """The state of the expert slots, for metrics and status; any thread may read it."""

    @property
    def page_table(self) -> npt.NDArray[np.int32]:
        """Slot of each expert, -1 where it has none: [L, E]."""

    def statistics(self) -> CacheStatistics:
        """A copy of the counters since start."""

    def check_integrity(self) -> None:
        """Raise SlotsError if the page table and the slots' owners disagree."""

    def close(self) -> None:
        """Stop the reading threads. The slots' memory is freed with the object."""


@dataclass
class SelectiveModel:
    """A trunk whose experts come from slots.

    Attributes:
        model: transformers' model; its experts and routers are ours.
        tokenizer: of the checkpoint.
        store: holds the experts on disk; cache: holds those in slots; routing: chooses among them.
        device, dtype: of compute.
        eos_token_ids: tokens that end a generation.
        context_tokens: most tokens that the model was made for.
        observer: records the norms of the experts' outputs; None while nothing collects them.
        source_problem: the reason why the store has no source attached; None if it has one.
        adapters: those of the store that rows may have, by name.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    store: Store
    cache: Residency
    routing: StepRouting
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: frozenset[int]
    context_tokens: int
    source_problem: str = "it was not looked for"
    observer: OutputObserver | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """MoE layers, L."""
        return self.store.manifest.model.num_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the logits, V."""
        return int(self.model.config.get_text_config().vocab_size)

    def close(self) -> None:
        """Stop the cache's threads and close the store's files."""
        self.cache.close()
        self.store.close()


@dataclass(frozen=True)
class Choice:
    """Parameters for drawing a row's next token: divide the logits by `temperature`, keep the `top_k` most likely
    tokens (None: all), of them the most likely that reach `top_p` (1: all), and of them those at least `min_p` times as
    likely as the most likely one (0: all). `draw`, uniform in [0, 1), selects one."""

    temperature: float
    top_k: int | None
    top_p: float
    draw: float
    min_p: float = 0.0


MOST_ADJUSTED = 2048
"""Tokens that an `Adjustment` may have, so that a captured step has room for it."""


@dataclass(frozen=True)
class Adjustment:
    """Added to the logits of some tokens before one is chosen: `values` float32 [N] to those of `ids` int32 [N], each
    of them once; minus infinity bans a token. Both change with the next token of their row."""

    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class RowStep:
    """One row's part of a decode step.

    Attributes:
        row: handle from `Runner.allocate`.
        token: to append.
        mask: experts that the row may have; None: the server's mask.
        temperature: divides the logits of its routers.
        fetches: whether experts that the store lacks are read from the source for this row's request.
        choice: parameters for drawing the row's next token; None: take the most likely one.
        adjustment: of the logits, before the choice.
        allowed: gives a bit for each token, uint32 [ceil(V / 32)], low bits first: only those may be chosen. A runner
            that chooses calls it once the step is on its way, so that the work is done meanwhile.
        adapter: name of the adapter that the row has; None: none.
    """

    row: int
    token: int
    mask: ExpertMask | None = None
    temperature: float = 1.0
    fetches: bool = False
    choice: Choice | None = None
    adjustment: Adjustment | None = None
    allowed: Callable[[], npt.NDArray[np.uint32]] | None = None
    adapter: str | None = None

    @property
    def takes_best(self) -> bool:
        """Whether the row's next token is the most likely one of the model."""
        return self.choice is None and self.adjustment is None and self.allowed is None


@dataclass(frozen=True)
class Chosen:
    """The next token of each row, [B] each, in host memory: after its adjustment and among its allowed ones that drawn
    by its `Choice`, else the most likely.

    Attributes:
        token: int64; of equally likely ones the lowest id.
        logit: float32, its logit, without the adjustment.
        normaliser: float32, logsumexp of the row's logits: a logit minus this is a log-probability.
    """

    token: npt.NDArray[np.int64]
    logit: npt.NDArray[np.float32]
    normaliser: npt.NDArray[np.float32]


@dataclass(frozen=True)
class StepOutput:
    """The results of a step.

    Attributes:
        logits: float32 [B, V], of the last token of each row (prefill: B = 1); with `all_logits` [T, V], of all tokens.
        record: its routing, for the usage ledger.
        share: demanded and missed router mass of each row.
        outputs: norms of the experts' outputs over the record's tokens; None if they were not observed.
        chosen: the next token of each row, if the runner chose it in the step; then the caller need not read logits.
    """

    logits: Tensor
    record: StepRecord
    share: RowShare
    outputs: ExpertOutputs | None = None
    chosen: Chosen | None = None

    def select(self, rows: Sequence[int]) -> StepOutput:
        """The same decode step for some of its rows, in the order given."""
        return StepOutput(
            self.logits[list(rows)],
            self.record.select(rows),
            RowShare(self.share.demanded[rows], self.share.missed[rows]),
            None if self.outputs is None else self.outputs.select(rows),
            None
            if self.chosen is None
            else Chosen(self.chosen.token[rows], self.chosen.logit[rows], self.chosen.normaliser[rows]),
        )

    @staticmethod
    def concat(parts: Sequence[StepOutput]) -> StepOutput:
        """Join steps over different rows into one step; a field that is None in a part is None in the result."""
        if len(parts) == 1:
            return parts[0]
        outputs = [part.outputs for part in parts if part.outputs is not None]
        chosen = [part.chosen for part in parts if part.chosen is not None]
        return StepOutput(
            torch.cat([part.logits for part in parts]),
            StepRecord.concat([part.record for part in parts]),
            RowShare(
                np.concatenate([part.share.demanded for part in parts]),
                np.concatenate([part.share.missed for part in parts]),
            ),
            ExpertOutputs.concat(outputs) if len(outputs) == len(parts) else None,
            Chosen(
                np.concatenate([one.token for one in chosen]),
                np.concatenate([one.logit for one in chosen]),
                np.concatenate([one.normaliser for one in chosen]),
            )
            if len(chosen) == len(parts)
            else None,
        )


class StepFault(StoreError):
    """A step failed because an expert cannot be read. No row was advanced.

    Attributes:
        cause: the error of reading.
        positions: rows, among those given, whose tokens need the expert; empty where that is unknown.
        is_repeatable: whether the rows that need it may run the step again after the expert was masked.
    """

    def __init__(self, cause: StoreError, positions: Sequence[int], is_repeatable: bool = True) -> None:
        super().__init__(str(cause))
        self.expert = cause.expert
        self.cause = cause
        self.positions = tuple(positions)
        self.is_repeatable = is_repeatable


class StepMemoryError(ServerError):
    """A step failed because memory does not suffice. No row was advanced.

    It has no cause and no context, because their frames would keep the step's tensors in memory.

    Attributes:
        positions: rows, among those given, that must leave before the others can run the step again.
    """

    def __init__(self, message: str, positions: Sequence[int]) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


class Runner(Protocol):
    """Prefill and decode over at most `max_rows` rows of at most `max_tokens` tokens.

    Between `allocate` and the first `prefill` of a prompt, and between its chunks, the caller may append what was read
    before with `kv.reuse`, and after a chunk give it to others with `kv.share`.
    """

    @property
    def kv(self) -> KvRows:
        """The blocks of its rows. A step reserves them itself, and counts the tokens that it wrote."""

    @property
    def cuts_anywhere(self) -> bool:
        """Whether a prompt's bits do not depend on how it is cut into chunks. If they do, `kv.reuse` must end where a
        chunk does."""

    @property
    def model(self) -> SelectiveModel:
        """The model that it runs."""

    @property
    def max_rows(self) -> int:
        """Most sequences at once."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a row."""

    @property
    def decode_path(self) -> Literal["host", "device"]:
        """Whether the host or the device looks up and fetches the experts of a decode step."""

    def shares(self) -> MemoryShares:
        """The memory of slots and KV memory; any thread may ask."""

    def after_step(self) -> None:
        """Move memory between slots and KV memory, if one needs what the other does not; call it between two steps."""

    def allocate(self) -> int:
        """Take a row for a sequence; returns its handle, that of `kv`."""

    def free(self, row: int) -> None:
        """Give a row back."""

    def prefill(
        self,
        row: int,
        tokens: Sequence[int],
        *,
        mask: ExpertMask | None = None,
        adapter: str | None = None,
        temperature: float = 1.0,
        fetches: bool = False,
        all_logits: bool = False,
    ) -> StepOutput:
        """Append `tokens` to a row: at least one, and no more than the row has room for.

        Args:
            mask, adapter, temperature, fetches: see `RowStep`.
            all_logits: return the logits of every token, not only of the last.

        Raises:
            StepFault, StepMemoryError.
            NoBlocksError: the KV memory has no block left.
        """

    def decode(self, steps: Sequence[RowStep]) -> StepOutput:
        """Append one token to each row; logits come in the order of `steps` and are valid until the next `decode`.

        Raises:
            StepFault: an expert cannot be read; the step may be run again for the rows that do not need it.
            StepMemoryError: memory does not suffice; it may be run again without the rows that are named.
            NoBlocksError: the KV memory has too few blocks left; it may be run again when rows were freed.
        """

    def fetch_refusal(self) -> str | None:
        """The reason why this runner cannot read experts that the store lacks from the source during a step; None if it
        can, provided that the store has a source."""

    def prefetch(self, mask: ExpertMask) -> None:
        """Fetch the experts that a mask allows into slots ahead of their use, as far as there are slots."""

    def adopt(self) -> None:
        """Take into use the changes of the store and of routing's mask; call it between two steps, after both."""

    def close(self) -> None:
        """Free what the model holds."""
