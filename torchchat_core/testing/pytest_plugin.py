"""Fixtures for the tests of plugins. pytest loads this module on every start: it imports nothing heavy."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torchchat_core.models.transformer import Transformer
    from torchchat_core.plugins import Registry
    from torchchat_core.testing.models import TinyTokenizer


@pytest.fixture
def tiny_llama() -> Transformer:
    """A Llama of some ten thousand parameters with seeded weights, float32 on the CPU: the same in every run."""
    from torchchat_core.testing.models import seeded, tiny_config

    return seeded(tiny_config())


@pytest.fixture
def make_tiny_model() -> Callable[..., Transformer]:
    """Makes other tiny models: `make_tiny_model(seed=0, **changes)`, with changes of the `ModelConfig`."""
    from torchchat_core.testing.models import seeded, tiny_config

    return lambda seed=0, **changes: seeded(tiny_config(**changes), seed)


@pytest.fixture
def tiny_tokenizer() -> TinyTokenizer:
    """A tokenizer without files whose tokens are bytes, with the control tokens <s>, </s> and <|turn|>."""
    from torchchat_core.testing.models import TinyTokenizer

    return TinyTokenizer()


@pytest.fixture(scope="session")
def golden_tokens() -> Mapping[tuple[int, ...], list[int]]:
    """Prompt -> the likeliest tokens that follow it in `tiny_llama`, by the reference computation."""
    from torchchat_core.testing.models import GOLDEN_COUNT, PROMPTS, greedy_tokens, seeded, tiny_config

    model = seeded(tiny_config())
    return {prompt: greedy_tokens(model, prompt, GOLDEN_COUNT) for prompt in PROMPTS}


@pytest.fixture
def isolated_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    """A registry with core's own offers alone; no environment variable or config file of the user has a say."""
    for name in [name for name in os.environ if name.startswith("TORCHCHAT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "no-config.toml"))
    from torchchat_core import __version__, builtins
    from torchchat_core.plugins import CORE, Registry

    registry = Registry()
    registry.add(builtins, "builtins", CORE, __version__)
    return registry


@dataclass(frozen=True)
class MadePlugin:
    """A plugin as pip would have installed it in a folder of `sys.path`."""

    distribution: str
    module_name: str  # also that of the entry point
    folder: Path

    @property
    def module(self) -> ModuleType:
        """The plugin's module, imported."""
        return importlib.import_module(self.module_name)


@pytest.fixture
def make_plugin(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
                ) -> Iterator[Callable[..., MadePlugin]]:
    """Installs plugins for one test: `make_plugin(source, distribution="made-plugin", version="1.0")`.

    `source` is the text of the plugin's module. The distribution has an entry point, so that `load_registry` finds
    it; after the test it is gone from `sys.path` and `sys.modules`.
    """
    made: list[MadePlugin] = []

    def make(source: str, distribution: str = "made-plugin", version: str = "1.0") -> MadePlugin:
        folder = tmp_path_factory.mktemp("plugin")
        module = distribution.replace("-", "_")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n",
                                       encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[torchchat.v1]\n{module} = {module}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        made.append(MadePlugin(distribution, module, folder))
        return made[-1]

    yield make
    for plugin in made:
        sys.modules.pop(plugin.module_name, None)
