"""Fixtures that several tests of checkpoints share."""

import pytest

from qlora_jax.checkpoints.gguf import GGUF
from tests.checkpoints.gguf_files import File


@pytest.fixture
def opened(tmp_path):
    """Writes a File or bytes, opens it; closes what it opened."""
    sources = []

    def open_file(file: File | bytes) -> GGUF:
        path = tmp_path / "model.gguf"
        path.write_bytes(file if isinstance(file, bytes) else file.tobytes())
        sources.append(GGUF(path))
        return sources[-1]

    yield open_file
    for source in sources:
        source.close()
