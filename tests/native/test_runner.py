"""`torchchat-run` answers as torchchat does, with the same file."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import exporter

KINDS = ("pt2", "pte")
SEEDS = range(200)


def run(program: Path, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300,
                          check=False, errors="surrogateescape")


def answer(program: Path, *arguments: object) -> dict[str, Any]:
    done = run(program, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_text_of_the_260k_model(kind: str, runner: Path, stories260k: Callable[[str], Path],
                                           testdata: Path) -> None:
    done = run(runner, stories260k(kind), "--prompt", "", "--temperature", "0", "--max-new-tokens", "200")
    golden = (testdata / "golden/stories260K/runc_t0_n200.txt").read_text("utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, golden, "")  # nothing that libraries write


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_ids_of_tinystories(kind: str, runner: Path, tinystories: Callable[[str], Path],
                                       testdata: Path) -> None:
    golden = json.loads((testdata / "golden/TinyStories-656K/greedy_ids.json").read_text("utf-8"))
    for case in golden["prompts"]:
        prompt, ids = case["prompt"], case["ids"]
        wanted = ids[len(case["prompt_ids"]):]
        found = answer(runner, tinystories(kind), "--prompt", prompt, "--temperature", "0", "--max-new-tokens",
                       len(wanted))
        assert found["token_ids"] == [token for token in wanted if token != 2]  # which ends it


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_two_hundred_seeds_are_those_of_python(kind: str, native: Path, stories260k: Callable[[str], Path]
                                                          ) -> None:
    check_seeds(native, stories260k(kind))


def check_seeds(native: Path, file: Path) -> None:
    """One process of each side for all of them: `--num-samples` keeps them apart by stream, as the seeds do here by
    number."""
    from torchchat_core.conversation import encode_plain
    from torchchat_core.generation import FinishedEvent, TokenSequence, generate
    from torchchat_core.generation_options import GenerationOptions, SamplingOptions
    from torchchat_core.pipeline import ModelRequest, open_model
    from torchchat_core.plugins import load_registry

    expected = []
    with open_model(ModelRequest(model=str(file)), load_registry()) as opened:
        sequence = TokenSequence(opened.model.session())
        prompt = encode_plain("One day", opened.text_format.tokenizer)
        for seed in SEEDS:
            options = GenerationOptions(sampling=SamplingOptions(seed=seed, temperature=0.9, top_p=0.95),
                                        max_new_tokens=24)
            events = list(generate(sequence, prompt, opened.text_format, options))
            expected.append(next(list(event.token_ids) for event in events if isinstance(event, FinishedEvent)))
    done = run(native / "torchchat-seeds", file, "One day", len(SEEDS), 24)
    assert done.returncode == 0, done.stderr
    assert [[int(token) for token in line.split()] for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(("scheme", "groups"), [("embedding:int4", 32), ("embedding:int8", 0)])
def test_quantised_files_in_bfloat16_give_the_ids_of_python(scheme: str, groups: int, native: Path, testdata: Path,
                                                            tmp_path: Path) -> None:
    """Activations are rounded to integers here: a number that differs in its last bit would change the ids."""
    recipe = {scheme: {"groupsize": groups}, "linear:int4": {"groupsize": 32}}
    exported = exporter(tmp_path, str(testdata / "hf/stories260K"), "--quantize", json.dumps(recipe), dtype="bf16")
    check_seeds(native, exported("pt2"))


LONGROPE = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 40,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}


@pytest.mark.parametrize("kind", KINDS)
def test_short_and_long_sequences_of_longrope_models(kind: str, runner: Path, testdata: Path, tmp_path: Path,
                                                     torchchat: Callable[..., Any]) -> None:
    """A .pt2 has both frequencies, and the sequence's limit decides; a .pte has those of its own limit."""
    folder = tmp_path / "model"
    shutil.copytree(testdata / "hf/stories260K", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": LONGROPE}), "utf-8")
    file = exporter(tmp_path, str(folder), "--max-seq-length", "128")(kind)
    beginnings = []
    for length in (8, 100):  # within 40 positions, and beyond
        asked = ("--prompt", "Once upon a time there was a girl", "--temperature", "0", "--max-new-tokens", length)
        expected = json.loads(torchchat("generate", file, *map(str, asked), "--json").out)
        assert answer(runner, file, *asked)["token_ids"] == expected["token_ids"]
        beginnings.append(expected["token_ids"][:8])
    assert (beginnings[0] != beginnings[1]) == (kind == "pt2")


@pytest.mark.parametrize("kind", ["so", "pte"])
def test_a_conversation_is_that_of_python(kind: str, runner: Path, embedded: Callable[[str], Path],
                                          torchchat: Callable[..., Any]) -> None:
    file = embedded(kind)
    messages = "What is a plugin?\nHow do I quantise?\n<|end|> is a text\n"
    flags = ("--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "30")
    found = run(runner, file, "--chat", *flags, stdin=messages)
    expected = torchchat("chat", file, *flags, stdin=messages.encode())
    assert (found.returncode, found.stdout.strip()) == (0, expected.out.strip())
    found = run(runner, file, "--chat", "--json", *flags, stdin=messages)
    expected = torchchat("chat", file, "--json", *flags, stdin=messages.encode())
    ours, theirs = ([without_times(json.loads(line)) for line in lines.splitlines()]
                    for lines in (found.stdout, expected.out))
    assert ours == theirs


PROMPT = ("--prompt", "How do I export a model?", "--max-new-tokens", "40", "--json")


@pytest.mark.parametrize("flags", [
    ("--seed", "3"), ("--seed", "18446744073709551615", "--top-k", "5"), ("--seed", "1", "--raw"),
    ("--temperature", "0", "--system", "Be brief."),
    ("--seed", "1", "--temperature", "1.5", "--top-p", "0.9", "--min-p", "0.01"),
    ("--temperature", "0", "--repetition-penalty", "1.3"), ("--temperature", "0", "--stop", "the"),
    ("--temperature", "0", "--stop", "\n", "--stop", "a m"), ("--system", "", "--temperature", "0", "--raw"),
])
def test_one_prompt_is_answered_as_by_python(flags: tuple[str, ...], runner: Path, embedded: Callable[[str], Path],
                                             torchchat: Callable[..., Any]) -> None:
    expected = json.loads(torchchat("generate", embedded("pte"), *PROMPT, *flags).out)
    found = json.loads(run(runner, embedded("pte"), *PROMPT, *flags).stdout)
    assert without_times(found) == without_times(expected)
    assert found["stats"].keys() == expected["stats"].keys()


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    """What two programs have to agree on."""
    counts = {name: answer["stats"][name] for name in ("prompt_tokens", "prefilled_tokens", "new_tokens")}
    return {**answer, "stats": counts}


def test_threads_do_not_change_the_answer(runner: Path, embedded: Callable[[str], Path]) -> None:
    answers = [answer(runner, embedded("pte"), "--prompt", "Hi", "--temperature", "0", "--max-new-tokens", "9",
                      "--threads", threads)["token_ids"] for threads in (1, 2)]
    assert answers[0] == answers[1]


def test_the_cache_is_kept_from_turn_to_turn(native: Path, embedded: Callable[[str], Path]) -> None:
    done = run(native / "torchchat-turns", embedded("pte"))
    assert done.returncode == 0, done.stderr
    prompts, prefilled = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert prefilled[0] == prompts[0]
    assert all(new < whole / 2 for new, whole in zip(prefilled[1:], prompts[1:], strict=True))


def test_a_stop_string_ends_the_answer(runner: Path, stories260k: Callable[[str], Path]) -> None:
    found = answer(runner, stories260k("pte"), "--prompt", "Once", "--temperature", "0", "--stop", "Lily", "--stop=zzz")
    assert found["finish_reason"] == "stop"
    assert "Lily" not in found["text"]
    assert found["text"].endswith("named ")


@pytest.mark.parametrize(("damage", "said"), [
    (lambda data: data[: len(data) // 2], "its end is missing"),
    (lambda _: b"", "is empty"),
    (lambda _: b"GGUF" + bytes(10_000), "not written by torchchat"),
    (lambda data: data.replace(b"vocab_size", b"vocab_sise"), "manifest is not what its checksum says"),
    (lambda data: data[:4000] + bytes([data[4000] ^ 1]) + data[4001:], "changed after it was written"),
])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_damaged_ends_with_a_sentence(kind: str, damage: Callable[[bytes], bytes], said: str,
                                                     runner: Path, stories260k: Callable[[str], Path],
                                                     tmp_path: Path) -> None:
    damaged = tmp_path / f"damaged.{kind}"
    damaged.write_bytes(damage(stories260k(kind).read_bytes()))
    done = run(runner, damaged, "--prompt", "x")
    assert done.returncode == 1
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
