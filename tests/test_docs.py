"""What the documents say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchchat_core import hookspecs
from torchchat_core.plugins import HOOKS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md"),
                    *ROOT.glob("apps/*/README.md")])


def test_the_generated_documents_are_not_stale() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools/generate_docs.py"), "--check"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}make docs writes them anew"


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_has_a_test(hook: str) -> None:
    text = getattr(hookspecs, hook).__doc__
    assert all(f"\n    {word}:" in text for word in ("When", "Returns", "Since"))
    assert (ROOT / f"docs/plugins/hooks/{hook}.md").exists()
    tests = "".join(path.read_text() for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("plugins/*/tests/*.py")])
    assert hook in tests or f"{HOOKS[hook].__name__}(" in tests


def test_the_specification_has_no_hook_that_the_registry_does_not_know() -> None:
    assert {name for name in dir(hookspecs) if name.startswith("torchchat_")} == set(HOOKS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
