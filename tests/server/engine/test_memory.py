"""Memory that ends while serving: which request fails, and that the others answer as if it had not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.engine.engine import Engine
from server.engine.request import MemoryExhaustedError
from server.model.host.runner import HostRunner
from server.model.host.sequence_runner import SequenceRunner
from tests.server.engine.clients import Client

SHORT = ["Once upon a time", "Der Hund ist"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize("runner_type", [HostRunner, SequenceRunner])
@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError(NO_MEMORY),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_where_memory_ends_in_a_step_one_request_fails_and_the_engine_goes_on(
    make_engine: Callable[..., Engine], runner_type: type[HostRunner | SequenceRunner], failure: Exception
) -> None:
    engine = make_engine(runner_type=runner_type)
    wanted = Client(engine, SHORT[0], **OPTIONS)
    wanted.result()
    calls = 0
    model = engine.runner.model.model
    forward = model.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise failure
        return forward(*args, **kwargs)

    model.forward = failing
    clients = [Client(engine, SHORT[0], **OPTIONS) for _ in range(2)]
    for client in clients:
        client.ended.wait(60)
    failed = [client for client in clients if client.events and hasattr(client.events[-1], "error")]
    (one,) = failed
    assert isinstance(one.error(), MemoryExhaustedError)
    assert "ended (" in str(one.error())
    (other,) = [client for client in clients if client is not one]
    other.result()
    assert other.token_ids == wanted.token_ids
    assert engine.status().state == "ready"
    assert engine.status().kv_tokens == 0


def test_what_is_no_want_of_memory_still_ends_the_engine(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the shapes do not fit")

    engine.runner.model.model.forward = broken
    Client(engine, SHORT[0], **OPTIONS).error()
    assert engine.status().state == "failed"
