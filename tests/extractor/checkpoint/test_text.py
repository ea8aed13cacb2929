"""Tokenizers and chat templates that could serve nobody are refused before anything is written, also in a dry run."""

import json
import shutil
from pathlib import Path

import pytest

from extractor.checkpoint.checkpoint import Checkpoint
from extractor.errors import CheckpointError
from extractor.planning.selection import SelectionRequest
from extractor.writing.prepare import prepare
from tests.extractor.checkpoints import write_tokenizer

SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture
def checkpoint(qwen_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(qwen_checkpoint, tmp_path / "checkpoint"))


def check(checkpoint: Path) -> None:
    prepare(Checkpoint.open(checkpoint), checkpoint.parent / "store", SelectionRequest()).check_text()


def test_files_of_a_tokenizer_with_and_without_a_chat_template_are_taken(checkpoint: Path) -> None:
    check(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    check(checkpoint)


def test_a_template_that_takes_content_in_parts_is_taken(checkpoint: Path) -> None:
    parts = "{% for part in messages[0].content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(parts)
    check(checkpoint)


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    for name in SIDE_FILES:
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer .* put the tokenizer's files of the model"):
        check(checkpoint)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"version": "1.0", "model": null}'])
def test_a_tokenizer_that_cannot_be_read_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="transformers cannot load its tokenizer"):
        check(checkpoint)


def test_a_tokenizer_that_makes_no_tokens_is_refused(checkpoint: Path) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "BPE", "vocab": {}, "merges": []}
    tokenizer["added_tokens"] = []
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="its tokenizer makes no tokens of 'Hello world'"):
        check(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_generation_config_that_cannot_be_read_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot load its generation_config\.json .*or remove it"):
        check(checkpoint)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(checkpoint: Path) -> None:
    write_tokenizer(checkpoint, num_tokens=65)
    with pytest.raises(CheckpointError, match=r"tokens up to 64, config\.json gives the model 64"):
        check(checkpoint)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in messages %}{{ message.content }", r"TemplateSyntaxError: "),
        ("{{ messages[0].content | nothing }}", r"TemplateAssertionError: No filter named 'nothing'"),
        ("{{ raise_exception('no chats here') }}", r"TemplateError: no chats here"),
        ("<bos>", r"the prompt lacks the message's text"),
        ("{{ messages[1].content }}", r"UndefinedError"),
    ],
)
def test_a_chat_template_that_renders_no_chat_is_refused_with_the_reason(
    checkpoint: Path, template: str, reason: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=rf"its chat template cannot render .*{reason}.*chat_template\.jinja"):
        check(checkpoint)
