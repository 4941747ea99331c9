"""What several modules tune: a model of bytes that has learned nothing, and questions with their answers."""

from pathlib import Path

import pytest

from conversation_files import save_byte_model, write_answers


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def answers(tmp_path_factory) -> Path:
    return write_answers(tmp_path_factory.mktemp("answers") / "answers.jsonl")
