"""Refusals of a router temperature, by the router's name."""

import numpy as np
import torch
from torch import nn
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from router.mask import ExpertMask
from server.model.seam.routing import StepRouting


def routing_with(model_type: str, router: nn.Module) -> StepRouting:
    mask = ExpertMask(np.ones((1, 8), dtype=np.bool_))
    routing = StepRouting(model_type, 1, torch.device("cpu"), mask)
    nn.Module.__init__(router)
    routing.install(0, router)
    return routing


def test_a_scored_top_k_takes_a_temperature() -> None:
    assert routing_with("qwen3_moe", Qwen3MoeTopKRouter.__new__(Qwen3MoeTopKRouter)).temperature_refusal() is None


def test_a_router_of_another_kind_is_named() -> None:
    refusal = routing_with("phimoe", PhimoeTopKRouter.__new__(PhimoeTopKRouter)).temperature_refusal()
    assert refusal is not None
    assert "PhimoeTopKRouter" in refusal


def test_a_router_without_a_rule_is_named() -> None:
    refusal = routing_with("odd", nn.Linear(2, 2)).temperature_refusal()
    assert refusal is not None
    assert "plain linear layer" in refusal
