from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.engine.text import Detokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "models" / "tiny-moe")


def pieces(tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, tokenizer("Prompt: ").input_ids, stop)
    given_out = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        given_out.append(detokenizer.add(token))
        if detokenizer.stop_string is not None:
            break
    given_out.append(detokenizer.finish())
    return given_out, detokenizer


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    given_out, detokenizer = pieces(tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(given_out) == detokenizer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_character_spread_over_tokens_is_given_out_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    given_out, _ = pieces(tokenizer, "snow ☃ and 🦊")
    assert "\ufffd" not in "".join(given_out)
    assert any("🦊" in piece for piece in given_out)


def test_text_ends_with_the_stop_string_even_inside_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    _, detokenizer = pieces(tokenizer, "one two three four", stop=("wo t", "zzz"))
    assert detokenizer.text == "one two t"
    assert detokenizer.stop_string == "wo t"


def test_the_first_stop_string_to_end_wins(tokenizer: PreTrainedTokenizerBase) -> None:
    _, detokenizer = pieces(tokenizer, "abcdefgh", stop=("defg", "cd"))
    assert detokenizer.text == "abcd"


def test_a_stop_string_across_tokens_is_met(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    _, detokenizer = pieces(tokenizer, text, stop=("fox jumps over",))
    assert detokenizer.text == "The quick brown fox jumps over"
