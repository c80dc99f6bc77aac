"""What several tests of the recipes start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from biasloss_ext.cli import main
from tests.recipes.tiny import Fails


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs a command that has to fail, beside which nothing may be written; returns its sentence."""

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def call(command: str) -> str:
        before = files()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["biasloss", *command.split()])
        with pytest.raises(SystemExit) as exit_:
            main()
        said = capsys.readouterr().err
        assert exit_.value.code == 2, said
        assert said.startswith("biasloss: ")
        assert said.count("\n") == 1
        assert files() == before
        return said.removeprefix("biasloss: ")

    return call
