"""Modules and scripts are found on a real path as an interpreter finds them, and none is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.launcher.options import parse_options
from runtime.launcher.plan import Facts
from runtime.launcher.prepare import prepare
from runtime.launcher.sources import MAX_BYTES, FoundSources

EXPLODES = "raise RuntimeError('imported')"


def test_local_modules_are_found_without_running_them(tmp_path: Path) -> None:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg" / "__init__.py").write_text(EXPLODES)
    (tmp_path / "mypkg" / "mod.py").write_text("x = 'é'\n")
    sources = FoundSources(str(tmp_path))
    package, module = sources.module("mypkg"), sources.module("mypkg.mod")
    assert package is not None
    assert (package.source, package.local, package.package) == (EXPLODES, True, True)
    assert module is not None
    assert (module.source, module.local, module.package) == ("x = 'é'\n", True, False)
    assert sources.module("mypkg.gone") is None
    assert sources.module("mypkg.mod.deeper") is None
    assert "mypkg" not in sys.modules


def test_namespace_packages_and_modules_without_source_are_found(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "inner.py").write_text("")
    sources = FoundSources(str(tmp_path))
    space, builtin = sources.module("space"), sources.module("sys")
    assert space is not None
    assert (space.source, space.package, space.local) == (None, True, True)
    assert sources.module("space.inner") is not None
    (tmp_path / "space" / "deeper").mkdir()
    (tmp_path / "space" / "deeper" / "mod.py").write_text("y = 1\n")
    deeper, mod = sources.module("space.deeper"), sources.module("space.deeper.mod")
    assert deeper is not None
    assert (deeper.source, deeper.package) == (None, True)
    assert mod is not None
    assert mod.source == "y = 1\n"
    assert builtin is not None
    assert builtin.source is None
    assert not builtin.local


def test_the_standard_library_and_installed_packages_are_not_local(tmp_path: Path) -> None:
    sources = FoundSources(str(tmp_path))
    for name in ("json", "pytest"):
        found = sources.module(name)
        assert found is not None
        assert not found.local
        assert not found.requires_torch


def test_a_distribution_that_needs_torch_is_known_by_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    for name, needs in {
        "needs": "Requires-Dist: numpy\nRequires-Dist: torch>=2.0\n",
        "may_need": 'Requires-Dist: torch>=2.0; extra == "torch"\n',
        "other": "Requires-Dist: torchvision\nRequires-Dist: torch-geometric\n",
        "bare": "Requires-Dist: torch\n",
    }.items():
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("")
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\n{needs}")
    monkeypatch.syspath_prepend(str(site))
    sources = FoundSources(str(tmp_path / "elsewhere"))
    found = {name: sources.module(name) for name in ("needs", "may_need", "other", "bare")}
    assert {name: module is not None and module.requires_torch for name, module in found.items()} == {
        "needs": True, "may_need": False, "other": False, "bare": True,
    }  # fmt: skip


def test_scripts_are_found_from_the_workers_directory_and_their_folder_goes_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "t.py").write_text("import helper")
    (tmp_path / "sub" / "helper.py").write_text("inner = 1")
    (tmp_path / "helper.py").write_text("outer = 1")
    sources = FoundSources("/").at(str(tmp_path))
    script = sources.script("sub/t.py")
    assert script is not None
    assert script.source == "import helper"
    assert sources.script("gone.py") is None
    assert sources.script("sub") is None
    (tmp_path / "sub" / "__main__.py").write_text("")
    assert sources.script("sub") is not None
    inner, outer = sources.beside("sub/t.py").module("helper"), sources.module("helper")
    assert inner is not None
    assert outer is not None
    assert (inner.source, outer.source) == ("inner = 1", "outer = 1")


def test_what_is_no_source_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text("#" * (MAX_BYTES + 1))
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    sources = FoundSources(str(tmp_path))
    for name in ("big", "binary"):
        found = sources.module(name)
        assert found is not None
        assert found.source is None


def prepared(folder: Path, job: str) -> dict[str, object]:
    """What each role of the job file preloads."""
    facts = Facts("j", str(folder), files={"job.toml": job})
    plan = prepare(parse_options(["--job", "job.toml"], {}), facts, FoundSources(str(folder)))
    return {name: role.preload for name, role in plan.job.roles.items()}


def test_every_missing_entry_of_a_job_is_named(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text("def run(cfg): ...\n")
    text = '[roles.a]\nentry = "mod:run"\n[roles.b]\nentry = "other.py"\n[roles.c]\nentry = "mod:gone"\n'
    text += '[roles.d]\nentry = "mod:gone"\npython = "/other/python"\n'
    text += '[roles.e]\nentry = "mod:run"\nworkdir = "nowhere"\n'
    with pytest.raises(ConfigError) as raised:
        prepared(tmp_path, text)
    assert str(raised.value).split("\n") == [
        "role b: script other.py: no such file",
        "role c: entry mod:gone: mod has no 'gone'",
        "role e: workdir nowhere: no such directory",
    ]


def test_what_a_role_preloads_is_found_unless_it_says_so_itself(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text("import torch\ndef run(cfg): ...\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.py").write_text("import json\n")
    text = '[roles.a]\nentry = "mod:run"\n[roles.b]\nentry = "other.py"\nworkdir = "sub"\n'
    text += '[roles.c]\nentry = "sub/other.py"\npreload = ["json"]\n'
    assert prepared(tmp_path, text) == {"a": ("torch",), "b": (), "c": ("json",)}
