"""Holding back what could be the beginning of a stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.api.openai.stop_filter import StopFilter


def test_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    filter = StopFilter(["\n\n", "END"])
    assert filter.feed("one E") == "one "
    assert filter.feed("N") == ""
    assert filter.feed("T\n") == "ENT"
    assert filter.feed("x") == "\nx"
    assert filter.feed("yEND") == "y"
    assert filter.finish("one ENT\nxyEND", "END") == ""


def test_without_stop_strings_nothing_is_held_back() -> None:
    filter = StopFilter([])
    assert filter.feed("abc") == "abc"
    assert filter.finish("abcd", None) == "d"


@given(
    text=st.text(alphabet="ab", max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_pieces_join_to_the_text_before_the_stop_string_and_never_show_a_part_of_it(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    ends = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    end, stop_text = min(ends) if ends else (len(text), None)
    whole = text[:end]
    wanted = whole.removesuffix(stop_text) if stop_text else whole
    filter, pieces, at = StopFilter(stops), [], 0
    for cut in [*cuts, len(whole)]:
        pieces.append(filter.feed(whole[at : at + cut]))
        at = min(len(whole), at + cut)
        assert wanted.startswith("".join(pieces))
    pieces.append(filter.finish(whole, stop_text))
    assert "".join(pieces) == wanted
