"""A model of the hub as a checkpoint without its weights: headers by range requests, side files whole.

Invariant: of a weights file its beginning alone is fetched: the header, at least 100 kB. The file that stands for it
has the real header and size and is sparse behind them, so all that reads headers alone takes it for the checkpoint.
Nothing is written outside the temporary directory, whatever names the model's index has.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from extractor.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, weight_map
from extractor.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

HEADER_THREADS = 8


@contextmanager
def described_checkpoint(name: str) -> Iterator[Checkpoint]:
    """The checkpoint of the hub's model `name` (owner/name), valid until the context ends; its weights read as zeros.

    Raises:
        CheckpointError: the hub has no such model in safetensors format, or cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download

    with tempfile.TemporaryDirectory(prefix="deepfew-fit-") as temporary:
        root = Path(temporary)
        with _asking(name):
            snapshot_download(
                name, allow_patterns="*.json", ignore_patterns=["*/*", "tokenizer*", "vocab*"], local_dir=root
            )
        files = sorted(set(weight_map(root, INDEX_NAME).values())) if (root / INDEX_NAME).is_file() else [SINGLE_NAME]
        with _asking(name), ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="hub-header") as threads:
            headers = list(threads.map(partial(HfApi().parse_safetensors_file_metadata, name), files))
        for file, header in zip(files, headers, strict=True):
            _write_header(header, root / file)
        yield Checkpoint.open(root, name=name, location=name)


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Raise the errors of the hub's client as CheckpointError. Only calls of the client belong inside."""
    try:
        yield
    except Exception as error:  # the client raises its own, its transport's, and the system's errors
        raise CheckpointError(
            f"{name} is no local directory and could not be described by the hub ({error}); check the name and the "
            "network, or name a directory"
        ) from error


def _write_header(metadata: SafetensorsFileMetadata, path: Path) -> None:
    """Write the header of a weights file of the hub, and make the file as long as the weights are.

    Raises CheckpointError where its offsets are no sizes of a file, which the client does not check.
    """
    tensors = metadata.tensors
    entries = {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in tensors.items()
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        try:
            stream.truncate(8 + len(header) + max((info.data_offsets[1] for info in tensors.values()), default=0))
        except (TypeError, IndexError, OverflowError, OSError) as error:
            raise CheckpointError(
                f"{path.name} of the hub has offsets that are no sizes of a file ({error}): do not use this checkpoint"
            ) from error
