"""The proof at start takes each family that the step computes, and refuses a model that computes anything else."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from torch import nn
from transformers import PretrainedConfig

from server.model.device.capture import NotCapturableError
from server.model.device.capture.modules import moe_blocks
from server.model.device.capture.pack import decode_shape
from server.model.device.capture.parts import gate_kind, packed_norm
from server.model.device.capture.proof import prove
from server.model.device.step.parts import SILU, GateKind
from server.model.device.step.weights import DecodeShape
from tests.families.checkpoints import FAMILIES, is_installed, random_model
from tests.server.model.device.captured import DEVICE, TUNING
from tests.server.model.device.families import CAPTURED, model_of


def shape_of(model: Any) -> DecodeShape:
    return decode_shape(model, intermediate=16, max_rows=2, max_tokens=64)


def distance(model: Any) -> float:
    return prove(model, shape_of(model), torch.device(DEVICE), TUNING)


@pytest.mark.parametrize(
    "name", ["mixtral in a window", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in CAPTURED)]
)
def test_a_captured_family_is_proved_without_reading_its_weights(name: str) -> None:
    assert distance(model_of(name).to("meta")) < 1e-5


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.causal and is_installed(name)])
def test_every_other_family_is_refused_with_a_reason(family: str) -> None:
    captured = {wanted.family or name for name, wanted in CAPTURED.items()}
    try:
        model = random_model(family)
    except (ValueError, RuntimeError) as error:
        pytest.skip(f"no model of these sizes: {error}")
    if family in captured:
        assert moe_blocks(model)
        return
    with pytest.raises(NotCapturableError, match=r"\w{3}"):
        prove(model, decode_shape(model, intermediate=24, max_rows=1, max_tokens=32), torch.device(DEVICE), TUNING)


def times(factor: float) -> Callable[..., Any]:
    """A forward hook that scales the result."""
    return lambda module, inputs, output: output * factor


def scale_embedding(model: Any) -> None:
    model.model.embed_tokens.register_forward_hook(times(1.01))


def scale_residual(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(times(0.99))


def cap_logits(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: 5 * (output / 5).tanh())


def add_norm(model: Any) -> None:
    norm = nn.functional.normalize
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: norm(output, dim=-1))


def other_epsilon(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon *= 10


def wider_window(model: Any) -> None:
    """The forward makes its masks for a window of one token more than the config says."""
    body, config = model.model, model.config

    class Wider(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return value + 1 if name == "sliding_window" and value else value

    forward = type(body).forward

    class Body(type(body)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            own, kind = self.config, type(self.config)
            own.__class__ = Wider
            try:
                return forward(self, *args, **kwargs)
            finally:
                own.__class__ = kind

    body.__class__ = Body


def unpacked_bias(model: Any) -> None:
    """A projection adds a bias by another name."""
    projection = model.model.layers[1].self_attn.v_proj

    class Biased(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + self.shift  # type: ignore[operator]

    projection.shift = nn.Parameter(torch.zeros(projection.out_features))
    projection.__class__ = Biased


def no_rotation(model: Any) -> None:
    """The last layer, of the same modules and settings as the first, does not rotate."""
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    class Unrotated(type(attention)):  # type: ignore[misc]
        def forward(self, hidden_states: Any, position_embeddings: Any, *args: Any, **kwargs: Any) -> Any:
            cos, sin = position_embeddings
            still = (torch.ones_like(cos), torch.zeros_like(sin))
            return forward(self, hidden_states, still, *args, **kwargs)

    attention.__class__ = Unrotated


def turned_in_pairs(model: Any) -> None:
    """Queries and keys rotate neighbouring elements instead of halves: as if their order were another."""
    for name in ("q_proj", "k_proj"):
        projection = getattr(model.model.layers[0].self_attn, name)
        head_dim = model.model.layers[0].self_attn.head_dim
        order = torch.arange(projection.out_features).view(-1, 2, head_dim // 2).transpose(1, 2).flatten()
        projection.register_forward_hook(lambda module, inputs, output, order=order: output[..., order])


OTHERS = {
    "an embedding that is scaled": ("mixtral", scale_embedding),
    "a residual that is scaled": ("mixtral", scale_residual),
    "capped logits": ("mixtral", cap_logits),
    "another norm": ("mixtral", add_norm),
    "another epsilon": ("mixtral", other_epsilon),
    "another window": ("mixtral in a window", wider_window),
    "another window in some layers": ("qwen2_moe partly in windows", wider_window),
    "weights that are not packed": ("mixtral", unpacked_bias),
    "a layer without rotation": ("qwen3_moe", no_rotation),
    "rotation of neighbours": ("mixtral", turned_in_pairs),
}


@pytest.mark.parametrize(
    "other", [pytest.param(name, marks=pytest.mark.exhaustive if at else ()) for at, name in enumerate(OTHERS)]
)
def test_a_model_that_computes_something_else_is_refused(other: str) -> None:
    name, change = OTHERS[other]
    model = model_of(name)
    change(model)
    with pytest.raises(NotCapturableError, match="away from transformers"):
        distance(model)


@pytest.mark.exhaustive
def test_layers_that_do_not_rotate_are_detected_without_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.device.capture.families._FAMILIES", {})
    with pytest.raises(NotCapturableError, match="away from transformers"):
        distance(model_of("exaone_moe"))


def test_a_part_is_what_it_computes() -> None:
    """Whatever it is called, and by whichever family."""
    mixtral, gpt_oss = model_of("mixtral"), model_of("gpt_oss")
    experts = [model.model.layers[0].mlp.experts for model in (mixtral, gpt_oss)]
    assert [gate_kind(one, 16, "layer 0") for one in experts] == [SILU, GateKind(1.702, 7.0, 1.0)]
    experts[0].act_fn = nn.GELU()
    with pytest.raises(NotCapturableError, match="layer 0: MixtralExperts gates by a product"):
        gate_kind(experts[0], 16, "layer 0")


class ZeroCentred(nn.Module):
    """A norm as Gemma and Qwen3-Next have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(size)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (value * (1.0 + self.weight.float())).type_as(x)


def test_norms_are_packed_as_they_round() -> None:
    plain, last = model_of("mixtral").model.norm.bfloat16(), model_of("gpt_oss").model.norm.bfloat16()
    centred = ZeroCentred(64).bfloat16()
    assert packed_norm(plain, "here") is plain.weight
    assert packed_norm(last, "here").dtype == torch.float32
    assert torch.equal(packed_norm(centred, "here"), 1.0 + centred.weight.float())
    layer = nn.LayerNorm(64).bfloat16()
    layer.bias.data.normal_()
    assert torch.equal(packed_norm(layer, "here"), torch.stack([layer.weight, layer.bias]).float())
    with pytest.raises(NotCapturableError, match="here: GroupNorm is no norm"):
        packed_norm(nn.GroupNorm(4, 64), "here")


@pytest.mark.exhaustive
def test_a_layer_that_differs_in_a_setting_is_among_those_that_are_run() -> None:
    model = random_model("mixtral", num_hidden_layers=5, head_dim=32)
    model.model.layers[2].input_layernorm.variance_epsilon = 0.5
    with pytest.raises(NotCapturableError, match="away from transformers"):
        distance(model)
    model.model.layers[2].self_attn.scaling *= 2
    with pytest.raises(NotCapturableError, match="layers scale the scores of attention by different factors"):
        distance(model)


def test_angles_that_change_with_the_length_are_refused_where_they_would() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = random_model("mixtral", head_dim=32, rope_parameters=rope, max_position_embeddings=32)
    with pytest.raises(NotCapturableError, match="turns by other angles"):
        distance(model)


def test_layers_of_one_part_are_refused_by_name() -> None:
    with pytest.raises(
        NotCapturableError, match="layer 0 has one part, NemotronHMamba2Mixer, and the captured step wants"
    ):
        shape_of(random_model("nemotron_h"))


def test_a_model_without_what_the_step_reads_is_refused_by_name() -> None:
    bare = SimpleNamespace(config=PretrainedConfig(hidden_size=64))
    with pytest.raises(NotCapturableError, match=r"config has no num_attention_heads.*rms_norm_eps"):
        decode_shape(bare, intermediate=16, max_rows=1, max_tokens=8)
