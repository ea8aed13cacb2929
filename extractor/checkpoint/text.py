"""The files that turn text into tokens and chats into prompts: can a store of this checkpoint serve anybody?

Invariant: files that pass give at least one token for plain text, no token that the model has no embedding for, and
where there is a chat template, a prompt that holds the text of a plain chat.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from extractor.checkpoint.text_model import read_config
from extractor.errors import CheckpointError

_TOKENIZER_FILES = ("tokenizer.", "vocab.", "tekken.", "spiece.", "sentencepiece.")
_TEXT = "Hello world"


def check_text(directory: Path, name: str) -> None:
    """Load the tokenizer and render a chat from the files in `directory`; `name` is the checkpoint's, for messages.

    Raises:
        CheckpointError: there is no tokenizer, it needs code of the checkpoint, it cannot be loaded, it makes no tokens
            or others than the model has, or the chat template is broken. A checkpoint without a chat template is taken:
            it completes text.
    """
    names = {path.name for path in directory.iterdir()}
    ranks = next((name for name in sorted(names) if name.startswith("tiktoken.")), None)
    if ranks is not None and "tokenizer.json" not in names:
        raise CheckpointError(
            f"{name} has the tokens of its tokenizer ({ranks}), but splits text into them by code of its own, which "
            "never runs here, and another way to split would give the model other tokens: put a tokenizer.json that "
            "was made from both beside the weights (docs/families.md tells how)"
        )
    if not any(name.startswith(_TOKENIZER_FILES) for name in names):
        raise CheckpointError(
            f"{name} has no tokenizer (no file named like tokenizer.json, tokenizer.model or vocab.json), so its store "
            "could serve nobody: put the tokenizer's files of the model beside the weights"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    except Exception as error:  # tokenizer files can make transformers and its libraries raise anything
        raise CheckpointError(
            f"{name}: transformers cannot load its tokenizer ({_reason(error, directory)}); put the tokenizer's files "
            "of the model beside the weights, as its save_pretrained writes them"
        ) from error
    if not ids:
        raise CheckpointError(
            f"{name}: its tokenizer makes no tokens of {_TEXT!r}; its vocabulary is missing or damaged: put the "
            "tokenizer's files of the model beside the weights"
        )
    rows = int(read_config(directory).get_text_config().vocab_size)
    largest = max(*ids, *_ordinary_ids(tokenizer))
    if largest >= rows:
        raise CheckpointError(
            f"{name}: its tokenizer has tokens up to {largest}, config.json gives the model {rows}; they are of "
            "different models: put the tokenizer's files of this model beside the weights"
        )
    if tokenizer.chat_template:
        _check_template(tokenizer, directory, name)
    if (directory / GENERATION_CONFIG_NAME).exists():
        try:
            GenerationConfig.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the file can make transformers raise anything
            raise CheckpointError(
                f"{name}: transformers cannot load its {GENERATION_CONFIG_NAME} ({_reason(error, directory)}); put the "
                "model's own beside the weights, or remove it"
            ) from error


def _ordinary_ids(tokenizer: Any) -> list[int]:
    """Ids of the vocabulary; added tokens, such as those for images, may be more than the model has."""
    added = set(tokenizer.added_tokens_decoder)
    return [number for number in tokenizer.get_vocab().values() if number not in added] or [0]


def _check_template(tokenizer: Any, directory: Path, name: str) -> None:
    problems = []
    for content in (_TEXT, [{"type": "text", "text": _TEXT}]):
        try:
            chat = [{"role": "user", "content": content}]
            prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template can raise anything
            problems.append(f"it fails with {_reason(error, directory)}")
            continue
        if _TEXT in prompt:
            return
        problems.append("the prompt lacks the message's text")
    raise CheckpointError(
        f"{name}: its chat template cannot render a message of a user, as text ({problems[0]}) or in parts "
        f"({problems[1]}); put the model's own chat_template.jinja beside the weights, or remove it to serve "
        "completions alone"
    )


def _reason(error: Exception, directory: Path) -> str:
    """The error in one line, without the name of the folder that only this check knows."""
    lines = str(error).replace(f"{directory}/", "").strip().splitlines()
    return f"{type(error).__name__}: {(lines or ['no reason given'])[0]}"
