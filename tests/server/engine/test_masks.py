"""Which experts a sequence may have: its own mask within the server's, one object for as long as neither changes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from router.errors import MaskError
from router.mask import ExpertMask
from server.engine.masks import SequenceMasks
from server.engine.request import GenerationRequest
from server.engine.sequence import Sequence

L, E = 2, 8


def masks_of_server(mask: ExpertMask) -> tuple[SequenceMasks, Any]:
    routing = SimpleNamespace(mask=mask)
    runner: Any = SimpleNamespace(model=SimpleNamespace(routing=routing))
    return SequenceMasks(runner), routing


def sequence(own: ExpertMask | None, on_missing: Any = "mask") -> tuple[Sequence, Any]:
    masking: Any = SimpleNamespace(mask=own)
    request = GenerationRequest("request", (1,), masking=masking, on_missing=on_missing)
    return Sequence(request, print, print), masking


def only(*experts: int) -> ExpertMask:
    return ExpertMask.same_in_every_layer(experts, L, E)


def test_own_mask_is_narrowed_once_until_either_changes() -> None:
    masks, routing = masks_of_server(only(0, 1, 2, 3))
    running, masking = sequence(only(2, 3, 4))
    first = masks.of(running)
    assert first is not None
    assert np.flatnonzero(first.allowed[0]).tolist() == [2, 3]
    assert masks.of(running) is first
    masking.mask = only(3, 4)
    second = masks.of(running)
    assert second is not None
    assert np.flatnonzero(second.allowed[0]).tolist() == [3]
    routing.mask = only(3, 4, 5)
    third = masks.of(running)
    assert third is not None
    assert np.flatnonzero(third.allowed[0]).tolist() == [3, 4]


def test_a_mask_that_leaves_nothing_is_told_at_every_step() -> None:
    masks, routing = masks_of_server(only(0))
    running, _ = sequence(only(1))
    for _ in range(2):
        with pytest.raises(MaskError):
            masks.of(running)
    routing.mask = only(0, 1)
    assert masks.of(running) is not None


def test_without_a_mask_of_its_own_a_sequence_has_the_servers_and_one_that_fetches_has_all() -> None:
    masks, _ = masks_of_server(only(0, 1))
    assert masks.of(sequence(None)[0]) is None
    everything = masks.of(sequence(None, "fetch")[0])
    assert everything is not None
    assert everything.is_full
    own = only(5)
    assert masks.of(sequence(own, "fetch")[0]) is own
    whole, _ = masks_of_server(ExpertMask(np.ones((L, E), dtype=np.bool_)))
    assert whole.of(sequence(None, "fetch")[0]) is None
