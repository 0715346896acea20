"""Sessions over a program in a .pte file.

A program holds the KV cache of one sequence. Several sessions take turns in it: the used part of the cache is copied
out when another one goes on, and back in. One session, which is what a conversation has, never copies anything.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_executorch.machine import large_pages, serial_products
from tc_executorch.runtime import bindings, messages
from torchchat_core.artifacts import Manifest, open_artifact
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.sequence_limits import check_append, check_tokens, session_limit
from torchchat_core.specs import LoadRequest

FORWARD, SCORE = "forward", "score"
AGAIN = "export the model again"


class ExecutorchExecutor:
    """Implements `specs.Executor` with the ability `score`."""

    def load(self, request: LoadRequest) -> ExecutorchModel:
        if request.artifact is None:
            raise TorchchatError("the executor 'executorch' runs .pte files, and was given none",
                                 "write one with `torchchat export MODEL --output-pte-path FILE`")
        manifest = open_artifact(request.artifact).manifest
        if manifest.kind != "executorch":
            raise TorchchatError(f"{request.artifact.name} is of the kind {quoted(manifest.kind)}; the executor "
                                 "'executorch' runs .pte files")
        return ExecutorchModel(request.artifact, manifest)


class Method:
    """A loaded method of a program: its own KV cache, and the session that it belongs to now."""

    def __init__(self, method: Any, name: str, manifest: Manifest) -> None:
        config = manifest.config
        self.steps = step_length(method.method_meta(), name, config.vocab_size)
        self.owner: ExecutorchSession | None = None
        self._method = method
        parts = [f"{part}.{layer}" for layer in range(config.num_layers) for part in ("keys", "values")]
        self.caches: list[Tensor] = [method.get_attribute(part) for part in parts]  # its own memory, not copies
        wanted = (1, manifest.max_seq_length, config.num_kv_heads, config.head_dim)
        if any(tuple(cache.shape) != wanted or cache.dtype != torch.float32 for cache in self.caches):
            raise TorchchatError(f"the KV cache of the method {quoted(name)} is not float32 {list(wanted)}, as the "
                                 "manifest "
                                 "says", AGAIN)

    def run(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits [1, vocab] or, of the method "score", [n, vocab] of one step."""
        try:
            self._method.set_inputs([torch.tensor([list(tokens)]), torch.tensor([position])])
            with serial_products():
                self._method.execute()
            logits: Tensor = self._method.get_outputs(False)[0]  # its own memory, which the next step writes to
        except RuntimeError as error:
            raise TorchchatError(f"ExecuTorch stopped: {_first_line(error)}", AGAIN) from error
        # Not by `clone`: its threads would still wait for work, on ExecuTorch's cores, in the next step.
        return torch.from_numpy(logits.numpy().copy())


def step_length(meta: Any, name: str, vocab_size: int) -> int:
    """How many tokens the method takes at once. Raises `TorchchatError` for one that is not of our making."""
    inputs = [list(meta.input_tensor_meta(index).sizes()) for index in range(meta.num_inputs())]
    outputs = [list(meta.output_tensor_meta(index).sizes()) for index in range(meta.num_outputs())]
    fitting = (len(inputs) == 2 and len(inputs[0]) == 2 and inputs[0][0] == 1 and inputs[1] == [1]
               and len(outputs) == 1 and outputs[0][1:] == [vocab_size])
    if not fitting:
        raise TorchchatError(f"the method {quoted(name)} takes {inputs} and gives {outputs}, which is not what the "
                             "manifest "
                             "says", AGAIN)
    return int(inputs[0][1])


class ExecutorchModel:
    """Implements `specs.LoadedModel`. Sessions may be used from several threads, which wait for each other."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.vocab_size = manifest.config.vocab_size
        self.max_context = manifest.max_seq_length
        self.device, self.dtype = manifest.target.device, manifest.dtype
        self.lock = threading.RLock()
        self._path, self._manifest = path, manifest
        self._methods: dict[str, Method] = {}
        self._closed = False
        self.method(FORWARD)

    def session(self, limit: int | None = None) -> ExecutorchSession:
        limit = session_limit(limit, self.max_context, "the exported file",
                              "export the model with another --max-seq-length")
        self.method(FORWARD)
        return ExecutorchSession(self, limit)

    def method(self, name: str) -> Method:
        """The method, loaded when it is first used. Raises `TorchchatError` where the model was closed."""
        with self.lock:
            if self._closed:
                raise TorchchatError("the model was closed")
            if name not in self._methods:
                self._methods[name] = self._loaded(name)
            return self._methods[name]

    def close(self) -> None:
        with self.lock:
            for method in self._methods.values():
                if method.owner is not None:
                    method.owner.forget()
            self._methods.clear()
            self._closed = True

    def _loaded(self, name: str) -> Method:
        """Of a program of its own: the methods of one share their memory, KV caches among it."""
        library = bindings()
        with messages() as lines:
            try:
                program = library._load_program(str(self._path),
                                                program_verification=library.Verification.InternalConsistency)
                with large_pages():
                    method = program.load_method(name)
                return Method(method, name, self._manifest)
            except RuntimeError as error:
                failure = error
        raise TorchchatError(f"ExecuTorch cannot load {self._path.name}: {_reason(lines, failure)}",
                             f"{AGAIN}, with the ExecuTorch that is installed") from failure


class ExecutorchSession:
    """Implements `specs.ScoringSession`."""

    def __init__(self, model: ExecutorchModel, limit: int) -> None:
        self.length, self.limit = 0, limit
        self._model = model
        self._method: Method | None = None  # whose KV cache holds the tokens
        self._held: list[Tensor] = []  # while none does: [1, positions, kv_heads, head_dim], keys and values by layers
        self._closed = False

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        return self._append(FORWARD, tokens)[-1][-1]

    def decode(self, token: int) -> Tensor:
        return self._append(FORWARD, [token])[-1][-1]

    def score(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat(self._append(SCORE, tokens))

    def truncate(self, length: int) -> None:
        with self._model.lock:  # another session may be copying this one's tokens out
            if not 0 <= length <= self.length:
                raise TorchchatError(f"a sequence of {self.length} tokens cannot be cut to {length}")
            self.length = length

    def close(self) -> None:
        with self._model.lock:
            self._closed = True
            self.forget()

    def forget(self) -> None:
        """Gives up what it holds."""
        if self._method is not None and self._method.owner is self:  # what another one has by now stays his
            self._method.owner = None
        self._method, self._held = None, []

    def _append(self, name: str, tokens: Sequence[int]) -> list[Tensor]:
        """The logits of each step."""
        with self._model.lock:
            self._check(tokens)
            method = self._model.method(name)
            self._enter(method)
            before, logits = self.length, []
            try:
                for start in range(0, len(tokens), method.steps):
                    step = tokens[start : start + method.steps]
                    logits.append(method.run(step, self.length))
                    self.length += len(step)
            except BaseException:
                self.length = before
                raise
        return logits

    def _check(self, tokens: Sequence[int]) -> None:
        check_append(len(tokens), self.length, self.limit, self._closed,
                     "export the model with more positions: --max-seq-length")
        check_tokens(tokens, self._model.vocab_size)

    def _enter(self, method: Method) -> None:
        """Takes the method's KV cache, after whoever had it has taken his tokens out."""
        if method.owner is self:
            return
        if method.owner is not None:
            method.owner._leave()
        self._leave()
        for cache, held in zip(method.caches, self._held, strict=False):
            cache[:, : held.shape[1]] = held
        method.owner, self._method, self._held = self, method, []

    def _leave(self) -> None:
        if self._method is not None:
            self._held = [cache[:, : self.length].clone() for cache in self._method.caches] if self.length else []
            self._method.owner = None
            self._method = None


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"


def _reason(lines: Sequence[str], error: Exception) -> str:
    """What ExecuTorch wrote last before it gave up, which says more than its exception."""
    told = [line for line in lines if "cpuinfo" not in line]
    return f"{told[0]:.200}" if told else _first_line(error)
