"""What imports what: the contracts, a light `import runtime`, public names that resolve, links that lead somewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import runtime

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run it in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_import_contracts_hold() -> None:
    # In a process of its own: it configures logging, and disables all loggers that there are.
    done = run("import sys, importlinter.cli as cli; sys.exit(cli.lint_imports(no_cache=True))")
    assert done.returncode == 0, done.stdout + done.stderr


def imported_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has after `statement`."""
    done = run(f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


HEAVY = {"torch", "zmq", "numpy", "boto3", "msgpack", "psutil"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import runtime") & (HEAVY | {"asyncio"})


def test_the_launcher_plans_without_anything_heavy() -> None:
    statement = (
        "from runtime.launcher.prepare import prepare\n"
        "from runtime.launcher.options import parse_options\n"
        "from runtime.launcher.plan import Facts\n"
        "prepare(parse_options(['t.py'], {}), Facts('j'))"
    )
    unneeded = {"argparse", "importlib.metadata", "tomllib", "difflib", "subprocess", "asyncio"}
    assert not imported_by(statement) & (HEAVY | unneeded)


def test_the_agent_never_imports_torch() -> None:
    assert not imported_by("import runtime.agent") & {"torch", "numpy", "boto3"}


def test_every_public_name_resolves_and_is_listed() -> None:
    assert len(set(runtime.__all__)) == len(runtime.__all__)
    assert [name for name in runtime.__all__ if getattr(runtime, name, None) is None] == []
    assert set(runtime.__all__) <= set(dir(runtime))


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        runtime.no_such_name  # noqa: B018


# Markdown

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.S)
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(
        part.startswith(".") or part in ("node_modules", "build")
        for part in path.relative_to(ROOT).parts
    )
)


@cache
def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[Path, str]]:
    """Every link that leads somewhere in the project, with its page."""
    found = [
        (page, link) for page in PAGES for link in _LINK.findall(_CODE.sub("", page.read_text()))
    ]
    return [(page, link) for page, link in found if not re.match(r"[a-z]+:", link)]


def test_links_lead_to_files_and_headings_that_exist() -> None:
    broken = []
    assert ROOT / "README.md" in PAGES
    for page, link in links():
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []
