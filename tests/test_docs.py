"""What the documents say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from torchchat_core import hookspecs
from torchchat_core.models.catalogue import load_catalogue
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


def gated_names(text: str) -> set[str]:
    """Return the gated models of the catalog that the commands in a text use."""
    gated = {name for entry in load_catalogue() if entry.gated
             for name in (entry.alias, entry.reference.removeprefix("hf:"), entry.reference.rpartition("/")[2])}
    commands = "\n".join(re.findall(r"torchchat(?:-run)? [a-z].*", text)).replace("llama2.c", "")
    return {name for name in gated if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", commands)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_example_uses_a_gated_model(document: Path) -> None:
    assert gated_names("torchchat chat llama3\ntorchchat-run x.pt2") == {"llama3"}
    assert gated_names(document.read_text(encoding="utf-8")) == set()


def test_the_answers_of_the_embedded_model_name_no_gated_model() -> None:
    book = tomllib.loads((ROOT / "tools/embedded_model/questions.toml").read_text(encoding="utf-8"))
    told = [line for intent in book["intent"] for line in (*intent["answers"], *intent["keywords"])]
    assert gated_names("\n".join([*told, f"torchchat chat {book['defaults']['model']}"])) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
