"""What the tests of resuming share."""

from pathlib import Path

import pytest

from tests.resume.test_kill import Run


@pytest.fixture(scope="session")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run to its end, to compare with and to copy."""
    run = Run(shards, tmp_path_factory.mktemp("whole") / "run")
    run.finish()
    return run
