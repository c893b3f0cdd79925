"""C functions compiled here: kept, shared, and not needed."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from sde_diffusion.networks import native

needs_compiler = pytest.mark.skipif(native._compiler() is None, reason="no C compiler here")
load_native = native.load_native.__wrapped__  # every time anew


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of its own, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SDE_DIFFUSION_NATIVE", raising=False)
    path = tmp_path / "twice.c"
    path.write_text("double twice(double x) { return 2.0 * x; }\n")
    return path


def twice(library: ctypes.CDLL | None) -> float:
    assert library is not None
    library.twice.restype, library.twice.argtypes = ctypes.c_double, [ctypes.c_double]
    return library.twice(21.0)


def compiling_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_compile", lambda *_: pytest.fail("compiled again"))


@needs_compiler
def test_compiled_once_for_each_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert twice(load_native(source)) == 42.0
    (kept,) = native.cache_folder().iterdir()
    assert kept.suffix == ".so" and native.cache_folder().stat().st_mode & 0o77 == 0
    with monkeypatch.context() as patch:
        compiling_is_an_error(patch)
        assert twice(load_native(source)) == 42.0
    source.write_text(source.read_text().replace("2.0 *", "3.0 *"))
    assert twice(load_native(source)) == 63.0
    source.with_name("factor.h").write_text("#define FACTOR 4.0\n")
    source.write_text('#include "factor.h"\ndouble twice(double x) { return FACTOR * x; }\n')
    assert twice(load_native(source)) == 84.0
    source.with_name("factor.h").write_text("#define FACTOR 5.0\n")
    assert twice(load_native(source)) == 105.0
    assert len(list(native.cache_folder().iterdir())) == 4


@needs_compiler
def test_a_damaged_file_is_made_anew(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", lambda command, path: path.write_bytes(b""))
        with pytest.warns(UserWarning, match="file too short"):
            assert load_native(source) is None
    (kept,) = native.cache_folder().iterdir()
    assert twice(load_native(source)) == 42.0 and kept.stat().st_size > 0


@needs_compiler
def test_a_source_that_does_not_compile_is_named_and_leaves_nothing(source: Path) -> None:
    source.write_text("double twice(double x) { return 2.0 * y; }\n")
    with pytest.warns(UserWarning, match=r"twice\.c is not used, computing is slower without: .*twice\.c"):
        assert load_native(source) is None
    assert not list(native.cache_folder().iterdir())


def test_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="there is no C compiler"):
        assert load_native(source) is None


def test_turned_off(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDE_DIFFUSION_NATIVE", "0")
    compiling_is_an_error(monkeypatch)
    assert load_native(source) is None


@needs_compiler
@pytest.mark.parametrize("kind", ["no folder", "others may write", "no home"])
def test_a_cache_that_will_not_do(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    base = tmp_path / "base"
    if kind == "no folder":
        base.write_text("")
    else:
        (base / "sde_diffusion").mkdir(parents=True)
        (base / "sde_diffusion").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    if kind == "no home":

        def nowhere() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", nowhere)
    assert twice(load_native(source)) == 42.0
    assert native.cache_folder() == Path(native._temporary().name)
    assert kind == "no folder" or not list((base / "sde_diffusion").iterdir())


@needs_compiler
def test_the_compiler_that_the_user_names(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.warns(UserWarning, match="there is no C compiler"):
        assert load_native(source) is None
    monkeypatch.setenv(
        "CC", f"{shutil.which('cc') or shutil.which('gcc') or shutil.which('clang')} -Dtwice=twice"
    )
    assert twice(load_native(source)) == 42.0
