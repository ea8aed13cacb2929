"""The likeness of a request: what is shared by requests that begin alike, and what is not."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.cluster.likeness import BLOCK_BYTES, MAX_BLOCKS, likeness_of, parsed_body, profile_of, words_of


def _chat(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts], **fields}


@given(st.lists(st.text(max_size=300), min_size=1, max_size=6), st.text(max_size=300))
def test_a_longer_conversation_has_the_beginning_of_the_shorter_one(texts: list[str], more: str) -> None:
    before, after = likeness_of(_chat(*texts)), likeness_of(_chat(*texts, more))
    assert after.beginning[: len(before.beginning)] == before.beginning


def test_another_first_block_changes_all_later_hashes() -> None:
    texts = ["x" * 5 * BLOCK_BYTES, "y" + "x" * (5 * BLOCK_BYTES - 1)]
    first, second = (likeness_of({"inputs": text}).beginning for text in texts)
    assert len(first) == len(second) == 5
    assert not set(first) & set(second)


def test_parameters_of_sampling_do_not_count() -> None:
    plain, sampled = ({"prompt": "p" * 600}, {"prompt": "p" * 600, "temperature": 0.3, "max_tokens": 7})
    assert likeness_of(plain).beginning == likeness_of(sampled).beginning


def test_beginnings_differ_with_what_their_keys_and_values_depend_on() -> None:
    prompt = "p" * 600
    plain = likeness_of({"prompt": prompt, "on_missing": None})
    assert plain.beginning == likeness_of({"prompt": prompt}).beginning
    salted = [{"profile": "law"}, {"profile": "art"}, {"adapter": "none"}, {"router_temperature": 2.0}]
    others = {likeness_of({"prompt": prompt, **fields}).beginning for fields in salted}
    assert len(others | {plain.beginning}) == 1 + len(salted)
    assert likeness_of({"prompt": prompt, "pool": 8}).beginning == plain.beginning


def test_a_profile_is_found_in_every_dialect() -> None:
    assert profile_of({"inputs": "a", "parameters": {"profile": "law"}}) == "law"
    assert profile_of({"prompt": "a", "profile": "law"}) == "law"
    assert [profile_of(body) for body in ({}, {"profile": 3}, {"parameters": [1]})] == [None] * 3


def test_keys_are_of_the_conversation_then_the_profile_then_the_beginning() -> None:
    prompt = "p" * 2 * BLOCK_BYTES
    all_keys = likeness_of({"prompt": prompt, "user": "ann", "profile": "law"}).keys
    assert len(all_keys) == 3
    assert all_keys[1:] == likeness_of({"prompt": prompt, "profile": "law"}).keys
    assert all_keys[:1] == likeness_of({"prompt": "short", "metadata": {"user_id": "ann"}}).keys
    assert all_keys[2:] == likeness_of({"prompt": prompt + "q"}).keys
    assert likeness_of({"prompt": "short"}).keys == ()


def test_words_are_those_of_the_end() -> None:
    assert (words_of("Grass is green") == words_of("is GREEN, grass!")).all()
    long = "stone " * 1000 + "river"
    assert words_of(long)[words_of("river")].all()
    assert not words_of("once " + "stone " * 1000)[words_of("once")].any()


def test_a_likeness_is_bounded_and_made_of_anything() -> None:
    assert len(likeness_of({"prompt": "p" * 10_000_000}).beginning) == MAX_BLOCKS
    odd = likeness_of({"messages": {"a": 1}, "prompt": [1, 2], "metadata": 3, "user": ["x"], "system": "\ud800"})
    assert odd.beginning == ()


def test_a_body_that_is_no_object_has_none() -> None:
    assert parsed_body(json.dumps({"prompt": "a"}).encode()) == {"prompt": "a"}
    for body in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        assert parsed_body(body) is None
