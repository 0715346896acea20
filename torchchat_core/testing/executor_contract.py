"""The contract of an executor that runs models in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchchat_core.models.transformer import Transformer
from torchchat_core.specs import ExecutorInfo, LoadRequest
from torchchat_core.testing.demands import described, options_of
from torchchat_core.testing.session_contract import SessionContract


class ExecutorContract(SessionContract):
    """An executor gives what the reference computation gives, and its sessions behave.

        class TestExecutor(ExecutorContract):
            plugin, name = "my_plugin", "mine"
            variants = ("llama", "tied")  # fewer than models.VARIANTS, where others are not supported
            tolerances = {"fp32": 1e-4}  # of each declared dtype

    Every declared dtype is tested on every declared device that this machine has. An executor of exported files
    alone is tested by the `ExporterContract` of what writes them.
    """

    plugin: str  # the module that the entry point names
    name: str  # of the executor
    options: Mapping[str, Any] = {}  # values of its options, where they are not the defaults

    def executor_info(self) -> ExecutorInfo:
        return described(self.plugin, ExecutorInfo, self.name)

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        info = self.executor_info()
        return info.devices, info.dtypes

    def request(self, module: Transformer, device: str, dtype: str, folder: Path) -> LoadRequest:  # noqa: ARG002
        return LoadRequest(device=device, dtype=dtype, module=module,
                           options=options_of(self.executor_info(), self.options))
