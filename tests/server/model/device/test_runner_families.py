"""The device-driven runner of each captured family against the host-driven one: tokens, and records under masks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton")

from expert_store.paging.frames import HostFrames
from expert_store.store import Store
from extractor.checkpoint.checkpoint import Checkpoint
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from router.mask import ExpertMask
from server.model.device.memory import moving
from server.model.device.running.assembly import load_device_runner
from server.model.device.step import graphs
from server.model.host.assembly import load_model
from server.model.host.sequence_runner import make_runner
from server.model.runner import RowStep, RunnerOptions
from tests.expert_store.canaries import CanaryFrames
from tests.expert_store.test_rows import ENCODINGS
from tests.families.composites import as_omni
from tests.server.model.device.captured import TUNING
from tests.server.model.device.families import everyday, model_of
from tests.server.model.repacked import repack

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
MORE = [
    "gpt_oss", "gpt_oss, mxfp4", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "flint", "exaone_moe", "mellum",
    "ernie4_5_moe", "hunyuan_v1_moe", "granitemoeshared", "minimax_m3_vl_text", "mimo_v2_flash",
    "deepseek_v2", "deepseek_v3", "deepseek_v3 in halves", "glm4_moe_lite", "axk1",
    "gemma4_text", "flex_olmo", "qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "granitemoehybrid",
    "afmoe", "kolibri1", "laguna", "cohere2_moe", "granitemoe_swa", "phimoe",
    "kimi_linear", "bailing_hybrid",
]  # fmt: skip
PROMPT, NUM_TOKENS = [40, 41, 42], 2


def store_of(name: str, where: Path, repository: Path) -> Path:
    """A store of the family's tiny random model, with the bundled checkpoint's tokenizer."""
    name, _, encoding = name.partition(", ")
    model_of(name).save_pretrained(where / "checkpoint")
    if name == "qwen3_omni_moe_thinker":
        as_omni(where / "checkpoint")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(repository / "models" / "tiny-moe" / file, where / "checkpoint")
    prepare(Checkpoint.open(where / "checkpoint"), where / "store", SelectionRequest()).run()
    if not encoding:
        return where / "store"
    rows = dict.fromkeys(("gate_up_proj", "down_proj"), ENCODINGS[encoding])
    return repack(where / "store", where / encoding, rows, transposed=True)


@pytest.mark.parametrize(
    "name",
    everyday(
        ["glm4_moe in groups", "minimax_m2", "olmoe", "qwen2_moe", "dots1", "hy_v3", "solar_open", *MORE],
        quick=("deepseek_v3", "gemma4_text"),
    ),
)
def test_a_captured_family_is_served_as_the_host_driven_path_serves_it(
    name: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of its slots close after the prompts: nobody reads where no memory is."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "Tuning", lambda: TUNING)
        monkeypatch.setattr(moving, "frames_on", lambda device: CanaryFrames)
        monkeypatch.setattr(HostFrames, "frame_bytes", 256)  # of memory for so few experts
    path = store_of(name, tmp_path, repository)
    options = RunnerOptions(
        device=DEVICE, dtype=torch.float32, num_slots=6, max_rows=4, max_tokens=64, least_tokens=32,
        memory_balance="moving",
    )  # fmt: skip
    device = load_device_runner(Store.open(path), options, proof=False)
    host = make_runner(
        load_model(Store.open(path), RunnerOptions(device=DEVICE, dtype=torch.float32, num_slots=4)),
        max_rows=2,
        max_tokens=32,
    )
    shape = device.pages.shape
    allowed = np.ones((shape.num_layers, shape.num_experts), dtype=np.bool_)
    allowed[:, [1, 4, 6]] = False
    masks = [ExpertMask.of(allowed), None]
    rows = {runner: [runner.allocate(), runner.allocate()] for runner in (device, host)}
    for runner in (device, host):
        for row, mask, prompt in zip(rows[runner], masks, (PROMPT, PROMPT[1:]), strict=True):
            runner.prefill(row, prompt, mask=mask)
    if DEVICE.type == "cpu":  # a GPU's frames are too large for so few experts
        assert device.balance is not None
        device.balance._slots.resize(device.balance._least_slots)
    tokens = [50, 51]
    for _ in range(NUM_TOKENS):
        got, wanted = (
            runner.decode([RowStep(*one) for one in zip(rows[runner], tokens, masks, strict=True)])
            for runner in (device, host)
        )
        assert torch.allclose(got.logits, wanted.logits, rtol=1e-3, atol=1e-4)
        tokens = wanted.logits.argmax(dim=-1).tolist()
        assert got.chosen is not None
        assert got.chosen.token.tolist() == tokens
        # Some routers give their picks in no order.
        assert (np.sort(got.record.served_index) == np.sort(wanted.record.served_index)).all()
        assert got.record.missed_mass == pytest.approx(wanted.record.missed_mass, abs=1e-5)
        assert got.share.missed == pytest.approx(wanted.share.missed, abs=1e-5)
        assert got.share.demanded == pytest.approx(wanted.share.demanded, abs=1e-5)
    device.pages.check_integrity(contents=True)
    for runner in (device, host):
        runner.close()
