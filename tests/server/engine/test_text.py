from itertools import chain
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from server.engine.request import SamplingParams
from server.engine.text import Detokenizer, Vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "models" / "tiny-moe")


def pieces(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...] = (), **sampling: Any
) -> tuple[list[str], Detokenizer]:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    given_out, detokenizer = given(tokenizer, ids, stop=stop, **sampling)
    return [piece for piece, _ in told(given_out)], detokenizer


def given(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], prompt: str = "Prompt: ", **sampling: Any
) -> tuple[list[list[tuple[str, bytes]]], Detokenizer]:
    """Texts and bytes that were given out after each token."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(Vocabulary(tokenizer), prompt_ids, SamplingParams(**sampling))
    given_out = []
    for left, token in reversed(list(enumerate(reversed(ids)))):
        detokenizer.add(token)
        is_last = detokenizer.stop_string is not None or left == 0
        if is_last:
            detokenizer.finish()
        given_out.append(list(detokenizer.give()))
        if is_last:
            break
    return given_out, detokenizer


def told(given_out: list[list[tuple[str, bytes]]]) -> list[tuple[str, bytes]]:
    return list(chain.from_iterable(given_out))


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
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


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerBase:
    """Words begin with a space in the vocabulary, unknown characters are bytes, as in Llama's tokenizers."""
    words = ["<unk>", "<s>", "</s>", "[TOOL_CALLS]", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words += ["▁Hello", "▁world", "lo", "▁[", "{", "é", "H", "e", "l", "o"]
    backend = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase, *names: str) -> list[int]:
    return list(tokenizer.convert_tokens_to_ids(names))


def test_a_word_keeps_its_leading_space_unless_it_begins_all_text(sentencepiece: PreTrainedTokenizerBase) -> None:
    ids = ids_of(sentencepiece, "▁Hello", "▁world")
    assert given(sentencepiece, ids, "H")[1].text == " Hello world"
    for prompt in ("", "<s>"):
        given_out, detokenizer = given(sentencepiece, ids, prompt)
        assert detokenizer.text == "Hello world"
        assert told(given_out) == [("Hello", b"Hello"), (" world", b" world")]


def test_bytes_of_sentencepiece_tokens_are_those_of_the_text(sentencepiece: PreTrainedTokenizerBase) -> None:
    vocabulary = Vocabulary(sentencepiece)
    names = ["▁Hello", "lo", "é", "<0xE2>", "<0x0A>", "▁", "</s>", "[TOOL_CALLS]"]
    spelled = [vocabulary.bytes_of(token) for token in ids_of(sentencepiece, *names)]
    assert spelled == [b" Hello", b"lo", b"\xc3\xa9", b"\xe2", b"\n", b" ", b"</s>", b"[TOOL_CALLS]"]


@pytest.mark.parametrize("text", ["☃", "🦊", "é"])
def test_a_part_of_a_character_has_its_own_bytes(
    tokenizer: PreTrainedTokenizerBase, sentencepiece: PreTrainedTokenizerBase, text: str
) -> None:
    fallback = ids_of(sentencepiece, *(f"<0x{byte:02X}>" for byte in text.encode()))
    byte_level = tokenizer(text, add_special_tokens=False).input_ids
    for tokens, ids in ((sentencepiece, fallback), (tokenizer, byte_level)):
        given_out, detokenizer = given(tokens, ids)
        assert [piece for piece, _ in told(given_out)] == [""] * (len(ids) - 1) + [text]
        assert b"".join(spelled for _, spelled in told(given_out)) == text.encode()
        assert detokenizer.text == text


def test_every_token_of_the_vocabulary_has_the_bytes_that_its_name_says(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = Vocabulary(tokenizer)
    for name, token in list(tokenizer.get_vocab().items())[::7]:
        if not vocabulary.is_special(token):
            assert vocabulary.bytes_of(token).decode(errors="replace") == tokenizer.decode([token]), name
    assert vocabulary.bytes_of(100_000) == b"", "an id that the tokenizer lacks stands for nothing"


def test_what_is_no_text_reads_as_replacement_characters_and_spoils_nothing_after_it(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    ids = ids_of(sentencepiece, "<0xE2>", "<0x98>", "lo", *["<0x80>"] * 9, "<0xE2>", "<0x98>", "<0x83>", "<0xE2>")
    assert given(sentencepiece, ids)[1].text == "\ufffdlo" + "\ufffd" * 9 + "☃\ufffd"


def test_a_character_that_the_prompt_leaves_open_is_finished(sentencepiece: PreTrainedTokenizerBase) -> None:
    prompt, rest = ids_of(sentencepiece, "▁Hello", "<0xE2>"), ids_of(sentencepiece, "<0x98>", "<0x83>", "lo")
    detokenizer = Detokenizer(Vocabulary(sentencepiece), prompt, SamplingParams())
    texts = []
    for token in rest:
        detokenizer.add(token)
        texts += [piece for piece, _ in detokenizer.give()]
    assert texts == ["", "☃", "lo"]


MARKED = "one<|user|>two"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    assert pieces(tokenizer, MARKED)[1].text == "onetwo"
    assert pieces(tokenizer, MARKED, skip_special_tokens=True)[1].text == "onetwo"
    assert pieces(tokenizer, MARKED, skip_special_tokens=False)[1].text == MARKED


def test_a_format_that_needs_its_markers_keeps_them_unless_told_otherwise(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    ids = ids_of(sentencepiece, "[TOOL_CALLS]", "▁[", "{")
    assert given(sentencepiece, ids)[1].text == "[TOOL_CALLS] [{"
    assert given(sentencepiece, ids, skip_special_tokens=True)[1].text == " [{"


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_stop_string_that_is_a_special_token_matches(
    tokenizer: PreTrainedTokenizerBase, skips: bool, keeps: bool
) -> None:
    ways = {"skip_special_tokens": skips, "include_stop_str_in_output": keeps}
    _, detokenizer = pieces(tokenizer, "one<|user|>two", stop=("<|user|>",), **ways)
    assert detokenizer.stop_string == "<|user|>"
    assert detokenizer.text == ("one<|user|>" if keeps and not skips else "one")
    _, detokenizer = pieces(tokenizer, "one<|user|>two", stop=("e<|user|>tw",), **ways)
    assert detokenizer.stop_string == "e<|user|>tw"
    assert detokenizer.text == (("one<|user|>tw" if not skips else "onetw") if keeps else "on")


def test_a_special_token_that_is_typed_in_several_tokens_matches_too(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [token for part in ("one", "<|", "us", "er|", ">", "two") for token in tokenizer(part).input_ids]
    given_out, detokenizer = given(tokenizer, ids, stop=("<|user|>",), include_stop_str_in_output=False)
    assert (detokenizer.text, detokenizer.stop_string) == ("one", "<|user|>")
    assert "".join(piece for piece, _ in told(given_out)) == "one"


def test_a_stop_string_in_the_text_that_is_given_out_matches_across_a_special_token_left_out(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    _, detokenizer = pieces(tokenizer, MARKED, stop=("netw",), include_stop_str_in_output=False)
    assert detokenizer.text == "o"
    assert pieces(tokenizer, MARKED, stop=("netw",), skip_special_tokens=False)[1].stop_string is None


def test_tokens_that_a_stop_string_cut_off_are_never_told_and_one_cut_in_part_keeps_its_rest(
    sentencepiece: PreTrainedTokenizerBase,
) -> None:
    ids = ids_of(sentencepiece, "▁Hello", "▁world", "<0xF0>", "<0x9F>", "<0xA6>", "<0x8A>", "lo")
    given_out, detokenizer = given(sentencepiece, ids, "H", stop=("rld🦊",), include_stop_str_in_output=False)
    assert told(given_out) == [(" Hello", b" Hello"), (" wo", b" wo")]
    assert given_out[0] == [(" Hello", b" Hello")], "what cannot begin a stop string is given out at once"
    assert detokenizer.text == " Hello wo"
    given_out, _ = given(sentencepiece, ids, "H", stop=("🦊",), include_stop_str_in_output=False)
    assert told(given_out) == [(" Hello", b" Hello"), (" world", b" world")]
    given_out, _ = given(sentencepiece, ids, "H", stop=("ell",), include_stop_str_in_output=True)
    assert told(given_out) == [(" Hell", b" Hell")]


def test_a_beginning_that_becomes_no_stop_string_is_given_out(tokenizer: PreTrainedTokenizerBase) -> None:
    _, detokenizer = pieces(tokenizer, "one two thr", stop=("two three",), include_stop_str_in_output=False)
    assert (detokenizer.text, detokenizer.stop_string) == ("one two thr", None)


def test_no_stop_string_counts_before_the_least_tokens(sentencepiece: PreTrainedTokenizerBase) -> None:
    ids = ids_of(sentencepiece, "lo", "lo", "lo", "lo")
    given_out, _ = given(sentencepiece, ids, stop=("lo",), min_tokens=2, include_stop_str_in_output=False)
    assert "".join(piece for piece, _ in told(given_out)) == "lolo"
    assert given(sentencepiece, ids, stop=("olo",), min_tokens=1)[1].text == "lolo"


def test_an_end_of_sequence_token_ends_a_character_and_is_no_text(sentencepiece: PreTrainedTokenizerBase) -> None:
    begun, end = ids_of(sentencepiece, "<0xE2>", "</s>")
    detokenizer = Detokenizer(Vocabulary(sentencepiece), [begun], SamplingParams(skip_special_tokens=False))
    detokenizer.add(begun)
    detokenizer.add(end, is_end=True)
    detokenizer.finish()
    assert list(detokenizer.give())[-1] == ("\ufffd", b"</s>")


@hypothesis.given(
    parts=st.lists(st.sampled_from(["a", "b", "🦊", "<|user|>"]), max_size=30),
    stops=st.lists(st.text(alphabet="ab🦊", min_size=1, max_size=4), max_size=3),
    keeps=st.booleans(),
)
def test_what_is_given_out_is_the_text_to_the_first_stop_string_and_never_more(
    tokenizer: PreTrainedTokenizerBase, parts: list[str], stops: list[str], keeps: bool
) -> None:
    text = "".join(parts).replace("<|user|>", "")
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    end, begin = min(ends) if ends else (len(text), len(text))
    wanted = text[: end if keeps else begin]
    ids = [token for part in parts for token in tokenizer(part).input_ids]
    given_out, detokenizer = given(tokenizer, ids, stop=tuple(stops), include_stop_str_in_output=keeps)
    given_text = ""
    for now in given_out:
        given_text += "".join(piece for piece, _ in now)
        assert wanted.startswith(given_text)
    assert given_text == wanted == detokenizer.text
    if text == "".join(parts):
        assert b"".join(spelled for _, spelled in told(given_out)) == wanted.encode()
