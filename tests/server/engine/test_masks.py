"""Which experts a sequence may have: its own mask within the server's, one object for as long as neither changes."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expert_store.adapter import Adapter
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


def adapters() -> dict[str, Adapter]:
    of_mask = Adapter("0" * 64, L, E, {}, mask=only(0, 1).allowed)
    return {
        "wide": replace(of_mask, mask=None, shares=(0.25, 1.0)),
        "planned": of_mask,
        "narrow": replace(of_mask, mask=None, shares=(0.25, 0.5)),
    }


def test_a_row_has_the_adapter_that_was_made_for_its_mask_and_none_without_a_mask() -> None:
    masks, routing = masks_of_server(ExpertMask(np.ones((L, E), dtype=np.bool_)))
    masks._runner.model.adapters = adapters()
    running, _ = sequence(None)
    assert masks.adapter(running, None) is None
    assert masks.adapter(running, only(0, 1)) == "planned"
    assert masks.adapter(running, only(0, 2)) == "narrow"
    assert masks.adapter(running, only(*range(6))) == "wide"
    assert running.deficit().adapter is None, "nothing was routed"
    assert running.adapter == "wide"
    assert masks.adapter(running, only(0)) is None
    routing.mask = only(0, 1)
    assert masks.adapter(running, None) == "planned", "the server's own mask"
    everything = masks.of(sequence(None, "fetch")[0])
    assert masks.adapter(running, everything) is None


def test_a_request_may_name_an_adapter_or_have_none() -> None:
    masks, _ = masks_of_server(only(0, 1))
    masks._runner.model.adapters = adapters()
    for asked, wanted in (("none", None), ("wide", "wide"), ("auto", "planned")):
        request = GenerationRequest("request", (1,), adapter=asked)
        running = Sequence(request, print, print)
        assert masks.adapter(running, None) == wanted
        assert running.adapter == wanted
