"""Running contracts that have to fail, and seeing what they say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more threads, and lose much where other programs want the processor."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorder:
    """A plugin of the inner pytest that keeps what failed."""

    def __init__(self) -> None:
        self.failures: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            contract, test = report.nodeid.partition("[")[0].split("::")[-2:]
            self.failures.setdefault((contract, test), report.longreprtext)


@pytest.fixture(scope="module")
def failures(request: pytest.FixtureRequest) -> Mapping[tuple[str, str], str]:
    """(contract class, test) -> what it says, for the `FAULTS` of the test module: contract class, test, words.

    The contract classes are called Contract..., so that only this run, a pytest inside pytest, takes them for tests.
    """
    module: ModuleType = request.module
    recorder, config = Recorder(), request.config
    tests = dict.fromkeys(f"{module.__file__}::{contract.__name__}::{test}" for contract, test, _ in module.FAULTS)
    pytest.main([*tests, "-c", str(config.inipath), "--rootdir", str(config.rootpath), "-o", "addopts=", "-q", "-s",
                 "--import-mode=importlib", "-o", "python_classes=Contract", "-p", "no:cacheprovider",
                 "-p", "no:faulthandler", "-p", "no:timeout", "-p", "no:xdist"], plugins=[recorder])
    return recorder.failures
