"""`torchchat generate --profile`."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tc_eager", reason="tc-eager is not installed")
Run = Callable[..., Any]


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_written_and_the_answer_is_the_same(name: str, torchchat: Run, testdata: Path, tmp_path: Path
                                                      ) -> None:
    run = ("generate", testdata / "hf/stories260K", "--device", "cpu", "-d", "fp16", "--prompt", "Once",
           "--temperature", "0", "--max-new-tokens", "6", "--json")
    plain, traced = torchchat(*run), torchchat(*run, "--profile", tmp_path / name)
    assert json.loads(traced.out)["token_ids"] == json.loads(plain.out)["token_ids"]
    content = (tmp_path / name).read_bytes()
    trace = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
    labels = [event.get("name") for event in trace["traceEvents"]]
    assert labels.count("torchchat: decode") == 5  # the first of the six tokens comes of the prompt
    assert labels.count("torchchat: prefill") == 1
    assert "for 5 tokens" in traced.err
    assert "aten::" in traced.err
    assert f"written: {tmp_path / name}" in traced.err


@pytest.mark.parametrize(("path", "code", "message"), [
    ("trace.txt", 2, "expected a file that ends in .json"), ("/no/such/folder/trace.json", 1, "there is no folder")])
def test_a_trace_that_cannot_be_written_is_told_before_anything_is_loaded(path: str, code: int, message: str,
                                                                         torchchat: Run) -> None:
    done = torchchat("generate", "--prompt", "Hi", "--profile", path)
    assert done.code == code
    assert message in done.err
    assert done.out == ""
