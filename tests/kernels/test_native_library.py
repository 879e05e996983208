"""How the native library is found, forced and done without."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.__main__ as benchmarks
from petalite.errors import InvalidArgument
from petalite.kernels import native
from petalite.kernels.native import VARIABLE, library


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = native.library()
    instructions = None if before is None else before.instructions
    library.cache_clear()
    yield
    library.cache_clear()
    if instructions is not None:
        again = native.library()
        assert again is not None
        again.choose(instructions)


needs_library = pytest.mark.skipif(
    library() is None, reason="no native kernels are built, or torch's are forced"
)


def test_torch_is_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(VARIABLE, "torch")
    assert library() is None and not caplog.records


@pytest.mark.parametrize("name", ["avx513", "native,avx2", "TORCH"])
@needs_library
def test_unknown_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(InvalidArgument, match=f"{VARIABLE}={name}.*known are .*scalar"):
        library()


@needs_library
def test_every_instruction_set_can_be_forced_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    assert found is not None
    for name, runs in found.instruction_sets().items():
        library.cache_clear()
        monkeypatch.setenv(VARIABLE, name)
        if runs:
            forced = library()
            assert forced is not None and forced.instructions == name
        else:
            with pytest.raises(InvalidArgument, match="this processor does not run"):
                library()


@needs_library
def test_a_processor_without_what_is_forced_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "avx2")
    monkeypatch.setattr(
        native.Library, "instruction_sets", lambda self: {"avx512": False, "avx2": False, "scalar": True}
    )
    with pytest.raises(InvalidArgument, match="does not run avx2; it runs scalar"):
        library()


def test_without_a_library_torch_serves_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    with caplog.at_level(logging.INFO):
        assert library() is None and library() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "make native" in caplog.text
    library.cache_clear()
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(InvalidArgument, match="make native"):
        library()


@needs_library
def test_a_library_of_other_sources_or_of_none_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    built = next(iter(native._FOLDER.glob("kernels.*so")))
    shutil.copy(built, tmp_path)
    (tmp_path / "common.h").write_text("// changed since")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    assert library() is None and "other sources" in caplog.text
    library.cache_clear()
    (tmp_path / built.name).unlink()  # what is loaded stays as it was
    (tmp_path / built.name).write_bytes(b"\x7fELF, and then nothing")
    assert library() is None


@needs_library
def test_benchmarks_refuse_a_library_of_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would measure torch's kernels. Those who want that say so."""
    monkeypatch.setenv(VARIABLE, "")
    shutil.copy(next(iter(native._FOLDER.glob("kernels.*so"))), tmp_path)
    (tmp_path / "common.h").write_text("// changed since")
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu", "--only", "no such part"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    refusal = capsys.readouterr().err
    assert "other sources" in refusal and "make native" in refusal and f"{VARIABLE}=torch" in refusal
    library.cache_clear()
    monkeypatch.setenv(VARIABLE, "torch")
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "no part" in capsys.readouterr().err


@needs_library
def test_no_team_of_more_threads_than_the_system_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    found = library()
    assert found is not None
    assert found.team(2) is found.team(2) and found.team(2) is not found.team(1)
    monkeypatch.setattr(
        found, "functions", type("Refusing", (), {"petalite_team_new": lambda self, n: None})()
    )
    with pytest.raises(InvalidArgument, match="no 77 threads"):
        found.team(77)
