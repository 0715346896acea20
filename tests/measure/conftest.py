"""Comparisons made by hand, and the command line with few runs, so that tests do not measure speed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchchat_core.measure import comparing
from torchchat_core.measure.comparing import Comparison, Refused, Row
from torchchat_core.measure.divergence import Divergence
from torchchat_core.measure.perplexity import Perplexity
from torchchat_core.measure.rates import Rate, Rates, Spread, measure_rates
from torchchat_core.measure.text import MeasuredText
from torchchat_core.quantization.recipe import RecipeReport
from torchchat_core.specs import LayerReport


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None: ...


@pytest.fixture
def few_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Speed is measured with a few tokens; no settings of the user, and a cache folder of its own."""
    quick = functools.partial(measure_rates, prompt_tokens=4, new_tokens=2, repeats=2)
    monkeypatch.setattr(comparing, "measure_rates", quick)
    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    for module in ("products", "measure.divergence"):
        monkeypatch.setattr(f"torchchat_core.{module}.cache_folder", lambda: tmp_path / "cache")


def made_rates(decode: Rate, prefill: Rate | None = None) -> Rates:
    """Rates of a few tokens."""
    return Rates(prefill=prefill or decode, decode=decode, first_token=Spread(median=0.5, lowest=0.25, highest=1.0),
                 warm_up=1.0, prompt_tokens=4, new_tokens=2, repeats=2)


@pytest.fixture
def made_row() -> Callable[..., Row]:
    """Makes a row: a name, bytes, mean KL divergence, and the range of its decoding speed."""

    def make(name: str = "made", size: int = 100, kl: float = 0.1, decode: tuple[float, float] = (10.0, 10.0),
             perplexity: float = 5.0, report: RecipeReport | None = None) -> Row:
        rate = Rate(median=sum(decode) / 2, lowest=decode[0], highest=decode[1])
        return Row(name=name, executor="eager", device="cpu", dtype="fp32", bytes=size, report=report,
                   rates=made_rates(rate),
                   perplexity=Perplexity(mean_nll=float(torch.tensor(perplexity).double().log()), tokens=7),
                   divergence=Divergence(mean_kl=kl, top_1=0.9, tokens=7))

    return make


HOSTILE = '<script>alert("$x_1$")</script>\'&'


@pytest.fixture
def hostile(made_row: Callable[..., Row]) -> Comparison:
    """A comparison whose every name is markup."""
    layer = LayerReport(name=HOSTILE, scheme=None, bytes_before=3, bytes_after=3, reason=HOSTILE)
    report = RecipeReport(layers=(layer,), bytes_before=3, bytes_after=3)
    rows = (made_row("unquantised", 1000, 0.0), made_row(HOSTILE, 500, 0.2, (5.0, 20.0), 6.0, report))
    return Comparison(model=HOSTILE, text=MeasuredText(name=HOSTILE, content="abc", read=3, whole=3), window=256,
                      rows=rows, refused=(Refused(name=HOSTILE, reason=HOSTILE, fix=HOSTILE),))
