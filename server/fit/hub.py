"""A model of the hub as a checkpoint without its weights: headers by range requests, side files whole.

Invariant: of a weights file its beginning alone is fetched: the header, at least 100 kB. The file that stands for it
has the real header and size and is sparse behind them, so all that reads headers alone takes it for the checkpoint.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from extractor.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from extractor.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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
        try:
            snapshot_download(
                name, allow_patterns="*.json", ignore_patterns=["*/*", "tokenizer*", "vocab*"], local_dir=root
            )
            files = _weight_files(root)
            with ThreadPoolExecutor(HEADER_THREADS, thread_name_prefix="hub-header") as threads:
                list(threads.map(lambda file: _write_header(HfApi(), name, file, root / file), files))
        except Exception as error:  # the hub's client raises its own, its transport's, and the system's errors
            raise CheckpointError(
                f"{name} is no local directory and could not be described by the hub ({error}); check the name and "
                "the network, or name a directory"
            ) from error
        yield Checkpoint.open(root, name=name, location=name)


def _weight_files(root: Path) -> list[str]:
    index = root / INDEX_NAME
    if not index.is_file():
        return [SINGLE_NAME]
    return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))


def _write_header(api: HfApi, name: str, file: str, path: Path) -> None:
    """Write the header of a weights file of the hub, and make the file as long as the weights are."""
    tensors = api.parse_safetensors_file_metadata(name, file).tensors
    entries = {
        tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        for tensor, info in tensors.items()
    }
    header = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + max((info.data_offsets[1] for info in tensors.values()), default=0))
