import numpy as np
import pytest

from router.errors import MaskError
from router.mask import ExpertMask, parse_experts


def test_ids_and_ranges_are_read_sorted_and_once() -> None:
    assert parse_experts("12, 0-3,2") == (0, 1, 2, 3, 12)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-2", "1,,2", "0-70000", "1.5", "²", "٣", "0-٧"])
def test_what_is_no_list_of_experts_is_refused(text: str) -> None:
    with pytest.raises(MaskError, match="experts"):
        parse_experts(text)


def test_an_expert_that_does_not_exist_is_named() -> None:
    with pytest.raises(MaskError, match="expert 8 does not exist: the model has experts 0 to 7"):
        ExpertMask.same_in_every_layer([3, 8], num_layers=2, num_experts=8)


def test_masks_combine_to_what_both_allow() -> None:
    both = ExpertMask.same_in_every_layer([1, 2], 2, 4) & ExpertMask.same_in_every_layer([2, 3], 2, 4)
    assert np.flatnonzero(both.allowed[1]).tolist() == [2]
    assert both.num_allowed.tolist() == [1, 1]
    assert not both.is_full


def test_a_layer_without_experts_is_refused() -> None:
    allowed = np.ones((3, 4), dtype=np.bool_)
    allowed[1] = False
    with pytest.raises(MaskError, match="no expert of layer 1"):
        ExpertMask.of(allowed)


def test_a_mask_cannot_be_changed() -> None:
    mask = ExpertMask.of(np.ones((1, 2), dtype=np.bool_))
    with pytest.raises(ValueError, match="read-only"):
        mask.allowed[0, 0] = False
