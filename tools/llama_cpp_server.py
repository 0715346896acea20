"""One model in llama.cpp, driven line by line: the peer's side of compare_llama_cpp.py.

    python llama_cpp_server.py MODEL.gguf THREADS

Reads a JSON list from each line of standard input, ["prefill", tokens] or ["decode", tokens, count], always on an empty
cache, and answers with the seconds that it took: of decoding, those after the prompt, each token being the likeliest.
Needs llama-cpp-python and numpy.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def silent(level, text, data):
    """Takes the place of the library's log."""


class Server:
    def __init__(self, path: str, threads: int) -> None:
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_options = llama_cpp.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), model_options)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def append(self, tokens: list[int]) -> int:
        """The likeliest next token."""
        given = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(given, len(tokens))):
            sys.exit("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def answer(self, what: str, tokens: list[int], count: int = 0) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        started = time.perf_counter()
        token = self.append(tokens)
        if what == "decode":
            started = time.perf_counter()
            for _ in range(count):
                token = self.append([token])
        return time.perf_counter() - started


def main() -> None:
    server = Server(sys.argv[1], int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(server.answer(*json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
