"""A checkpoint in the Hugging Face layout: a directory with config.json and safetensors files.

Invariant: every file that a `Checkpoint` names lies in the directory (or in the blobs of the hub cache that the
directory is a snapshot of), and every header was checked. Nothing is unpickled, nothing is imported from the
checkpoint, and no weights are read except the samples of the fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from extractor.checkpoint.quantised import plain_tensors
from extractor.checkpoint.tensor_file import TensorEntry, TensorFile, read_tensor_file
from extractor.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
WEIGHTS_KEY = "transformers_weights"
"""The key of config.json that names the weights file, where it has another name."""
SIDECAR_SUFFIXES = (".json", ".jinja", ".model", ".txt")
MAX_SIDECAR_BYTES = 256 * 2**20
SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 64 * 2**10
MAX_NAMED = 3


def checkpoint_name(location: str, name: str) -> str:
    """`name`, or the hub's name if `location` is a snapshot in the hub's cache, whose folder name is a hash."""
    found = re.search(r"(?:^|[/\\])models--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?$", location)
    return found[1].replace("--", "/") if found else name


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the files that transformers would read, and no others.

    `files` are in name order; if two of them have one tensor, the last counts. `sidecars` are the small files that
    transformers loads; `ignored` is a text about weights that are not read.
    """

    path: Path
    name: str
    location: str
    config: dict[str, Any]
    files: tuple[TensorFile, ...]
    sidecars: tuple[Path, ...]
    ignored: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str], name: str | None = None, location: str | None = None) -> Checkpoint:
        """Open the checkpoint in the directory `path`.

        `name` and `location` say where it came from (by default the directory). Raises CheckpointError when it is not
        a whole checkpoint in safetensors format.
        """
        root = Path(path).resolve()
        if not root.is_dir():
            raise CheckpointError(f"{path} is not a directory; name one with config.json and *.safetensors in it")
        config = _read_json(root, "config.json")
        names, ignored = _weight_files(root, config)
        files = tuple(read_tensor_file(_inside(root, file)) for file in names)
        ignored += _overridden(files)
        name = name or checkpoint_name(str(root), root.name)
        return cls(root, name, location or str(root), config, files, _sidecars(root), tuple(ignored))

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by its name in the checkpoint; quantised tensors appear as their plain tensors."""
        stored = {tensor.name: tensor for file in self.files for tensor in file.tensors}
        return plain_tensors(stored, self.config)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the side files, all headers, and 16 samples of 64 KiB from each weights file.

        Two checkpoints of one architecture differ in it; reading it costs about 1 MiB a file.
        """
        digest = hashlib.sha256(b"deepfew-fingerprint-1\0")
        for path in self.sidecars:
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
        for file in self.files:
            digest.update(f"{file.path.name}\0{file.file_bytes}\0".encode() + file.header)
            descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                room = max(file.file_bytes - len(file.header) - SAMPLE_BYTES, 0)
                for sample in range(SAMPLES_PER_FILE):
                    at = len(file.header) + room * sample // (SAMPLES_PER_FILE - 1)
                    digest.update(os.pread(descriptor, SAMPLE_BYTES, at))
            finally:
                os.close(descriptor)
        return digest.hexdigest()


def resolve_checkpoint(name: str) -> Checkpoint:
    """Open a local directory, or download a model of the hub (safetensors, JSON and tokenizer files only) and open it.

    Raises CheckpointError when there is neither.
    """
    if Path(name).is_dir():
        return Checkpoint.open(name)
    if Path(name).exists():
        raise CheckpointError(f"{name} is a file; name the directory with config.json and *.safetensors in it")
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{name} does not exist; name a directory with config.json and *.safetensors in it, or a model of the "
            "hub as owner/name"
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *(f"*{suffix}" for suffix in SIDECAR_SUFFIXES)]
    try:
        path = snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"])
    except Exception as error:  # the hub's client raises its own, requests', and the system's errors
        raise CheckpointError(
            f"{name} is no local directory and could not be downloaded from the hub ({error}); check the name and the "
            "network, or name a directory"
        ) from error
    return Checkpoint.open(path, name=name, location=f"{name}@{Path(path).name}")


def _weight_files(root: Path, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of the weights files that transformers reads, and in words the ones beside them that it does not.

    It takes the file that config.json names as `transformers_weights`, else the single file, else those of the index.
    """
    told = config.get(WEIGHTS_KEY)
    if told is not None and (
        not isinstance(told, str) or Path(told).name != told or not told.endswith((".safetensors", INDEX_SUFFIX))
    ):
        raise CheckpointError(
            f"{root / 'config.json'} names the weights {told!r} ({WEIGHTS_KEY}), wanted the plain name of a "
            f"*.safetensors or *{INDEX_SUFFIX} file in the same directory; remove the key, or name such a file"
        )
    first = next((name for name in (told, SINGLE_NAME, INDEX_NAME) if name and (root / name).exists()), None)
    if told is not None and first != told:
        raise CheckpointError(f"{root / 'config.json'} names the weights {told}, which are not there; remove the key")
    found = sorted(path.name for path in root.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    if first is None:
        others = f"found {', '.join(found[:3])}" if found else "found no weights"
        raise CheckpointError(
            f"{root} has neither {INDEX_NAME} nor {SINGLE_NAME} ({others}); only safetensors checkpoints in the "
            "Hugging Face layout are read: convert it with transformers' save_pretrained, or download the safetensors "
            "files"
        )
    names = sorted(set(weight_map(root, first).values())) if first.endswith(INDEX_SUFFIX) else [first]
    unread = [name for name in found if name.endswith(".safetensors") and name not in names]
    if first != INDEX_NAME and (root / INDEX_NAME).exists():
        unread.insert(0, INDEX_NAME)
    more = f" and {len(unread) - MAX_NAMED} more" if len(unread) > MAX_NAMED else ""
    ignored = f"{', '.join(unread[:MAX_NAMED])}{more} beside {first}: transformers reads {first} and not those"
    return names, [ignored] if unread else []


def _overridden(files: tuple[TensorFile, ...]) -> list[str]:
    """A text about tensors that are in two files: transformers reads the last."""
    seen: dict[str, Path] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    for tensor in (tensor for file in files for tensor in file.tensors):
        if tensor.name in seen:
            twice.setdefault((seen[tensor.name].name, tensor.path.name), []).append(tensor.name)
        seen[tensor.name] = tensor.path
    return [
        f"{names[0]}{f' and {len(names) - 1} more tensors' * (len(names) > 1)} of {first}: transformers reads those of "
        f"{last}, which has them too"
        for (first, last), names in twice.items()
    ]


def weight_map(root: Path, index: str) -> dict[str, str]:
    """The weights file of each tensor, from an index in `root`: plain names of *.safetensors files.

    Raises CheckpointError when the index is missing, is none, or names anything else.
    """
    found = _read_json(root, index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(
            f"{root / index} has no weight_map, so it is no index of weights; copy or download it again"
        )
    for tensor, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{root / index} puts {tensor} into {file!r}, wanted the plain name of a *.safetensors file in "
                "the same directory; the index is damaged or hostile: do not use this checkpoint"
            )
    return found


def _sidecars(root: Path) -> tuple[Path, ...]:
    """The small files that transformers may load with the weights: no code, no weights, no adapters."""
    names = sorted(
        path.name
        for path in root.iterdir()
        if path.suffix in SIDECAR_SUFFIXES
        and not path.name.startswith((".", "adapter_"))
        and not path.name.endswith(".index.json")
        and path.is_file()
    )
    sidecars = tuple(_inside(root, name) for name in names)
    for name, path in zip(names, sidecars, strict=True):
        if path.stat().st_size > MAX_SIDECAR_BYTES:
            raise CheckpointError(f"{root / name} has more than {MAX_SIDECAR_BYTES} bytes; move it out of the way")
    return tuple(root / name for name in names)


def _read_json(root: Path, name: str) -> dict[str, Any]:
    path = _inside(root, name)
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_SIDECAR_BYTES} bytes; that is no {name}")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); correct it, or copy or download it again") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} is no JSON object; correct it, or copy or download it again")
    return document


def _inside(root: Path, name: str) -> Path:
    """The path of `root/name`, a regular file in `root` or in the blobs of the hub cache that `root` belongs to."""
    path = root / name
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        what = "is a link to a file that is not there" if path.is_symlink() else "is missing"
        raise CheckpointError(f"{path} {what}; copy or download the whole checkpoint") from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be reached ({error}); check its permissions and links") from None
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path} is a link to {real}, outside the checkpoint; put the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file; put the file itself there")
    return path
