"""The device of the device-driven runners under test, the sizes of `small_store`, kernels tuned for the interpreter."""

from __future__ import annotations

import torch

from server.model.device.step.tuning import Tuning

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


LAYERS, EXPERTS, TOP_K = 2, 8, 2  # of `small_store`


# Few programs a kernel: the interpreter runs them one after the other.
TUNING = Tuning(
    qkv_rows=64, output_rows=32, head_rows=1024, gate_rows=8, up_rows=16, down_rows=32, down_columns=32,
    packed_up_rows=32, packed_down_rows=64,
    attention_splits=1, fetchers=1, copy_elements=2048,
)  # fmt: skip
