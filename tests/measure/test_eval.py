"""lm-eval's tasks: made up here, scored by hand, and beside lm-eval's own model of transformers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchchat_core.errors import TorchchatError
from torchchat_core.measure.answering import Prompt, answers
from torchchat_core.measure.likelihood import Request, likelihoods
from torchchat_core.pipeline import ModelRequest, OpenedModel, open_model
from torchchat_core.plugins import load_registry

pytest.importorskip("tc_eager", reason="tc-eager is not installed")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")
Run = Callable[..., Any]
COMMON = ("--device", "cpu", "-d", "fp32", "--executor", "eager")
QUESTIONS = ["Once upon a time, there was a", "Lily and Tom went to the", "The big dog was very"]
CHOICES = [" little girl", " big tree", " park to play", " happy"]


@pytest.fixture(autouse=True)
def _kept_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setenv("TORCHCHAT_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data-sets")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def opened(testdata: Path) -> Any:
    """The larger one of the real models."""
    request = ModelRequest(model=str(testdata / "hf/TinyStories-656K"), device="cpu", dtype="fp32", executor="eager")
    with open_model(request, load_registry()) as found:
        yield found


def _made_task(folder: Path, name: str, documents: list[dict[str, Any]], **settings: Any) -> None:
    """A task in a folder for --include-path; JSON is YAML."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(json.dumps({
        "task": name, "dataset_path": "json", "test_split": "test", "metadata": {"version": 1.0},
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, **settings}), encoding="utf-8")


def _metric(name: str, higher: bool, aggregation: str = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


# ---- beside transformers ------------------------------------------------------------------------------------------


def test_word_perplexity_is_that_of_lm_evals_own_model_on_the_same_folder(testdata: Path, torchchat: Run, tmp_path: Path
                                                                         ) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast  # AutoTokenizer's drops what has no token, such as line ends

    stories = (testdata / "text/tinystories_2MiB.txt").read_text(encoding="utf-8")[:20_000].split("<|endoftext|>")
    wiki = (testdata / "text/wikitext2-test.raw").read_text(encoding="utf-8")[:12_000]  # longer than a window
    documents = [{"text": text.strip()} for text in [*stories[:-1], wiki] if text.strip()]
    metrics = [_metric("word_perplexity", False, "weighted_perplexity"),
               _metric("bits_per_byte", False, "bits_per_byte")]
    _made_task(tmp_path, "made_texts", documents, output_type="loglikelihood_rolling", doc_to_text="",
               doc_to_target="{{text}}", metric_list=metrics)
    done = torchchat("eval", testdata / "hf/TinyStories-656K", *COMMON, "--tasks", "made_texts", "--include-path",
                     tmp_path, "--json")
    ours = json.loads(done.out)["results"]["made_texts"]
    folder = testdata / "hf/TinyStories-656K"
    as_written = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|start_story|>",
                                         eos_token="<|end_story|>", pad_token="<unk>")
    other = HFLM(pretrained=str(folder), tokenizer=as_written, device="cpu", dtype="float32", add_bos_token=False)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    theirs = simple_evaluate(model=other, tasks=["made_texts"], task_manager=manager,
                             log_samples=False)["results"]["made_texts"]
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4)


# ---- by hand ------------------------------------------------------------------------------------------------------


def _by_hand(opened: OpenedModel, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation, and whether it is greedy, from logits of the whole."""
    tokenizer = opened.text_format.tokenizer
    start = [tokenizer.bos_id] if tokenizer.adds_bos else []
    before, whole = [*start, *tokenizer.encode(context)], [*start, *tokenizer.encode(context + continuation)]
    session: Any = opened.model.session()
    rows = session.score(whole).double().log_softmax(-1)
    session.close()
    places = range(len(before), len(whole))
    return (sum(float(rows[place - 1, whole[place]]) for place in places),
            all(int(rows[place - 1].argmax()) == whole[place] for place in places))


def test_a_multiple_choice_task_scores_as_computed_by_hand(opened: OpenedModel, testdata: Path, torchchat: Run,
                                                           tmp_path: Path) -> None:
    documents = [{"question": question, "choices": [choice.strip() for choice in CHOICES], "answer": answer}
                 for question, answer in zip(QUESTIONS, (0, 2, 3), strict=True)]
    _made_task(tmp_path, "made_choice", documents, output_type="multiple_choice", doc_to_text="{{question}}",
               doc_to_target="answer", doc_to_choice="choices", metric_list=[_metric("acc", True)])
    done = torchchat("eval", testdata / "hf/TinyStories-656K", *COMMON, "--tasks", "made_choice", "--include-path",
                     tmp_path, "--json")
    scores = [[_by_hand(opened, question, choice)[0] for choice in CHOICES] for question in QUESTIONS]
    right = [row.index(max(row)) == document["answer"] for row, document in zip(scores, documents, strict=True)]
    found = json.loads(done.out)
    assert found["results"]["made_choice"]["acc,none"] == pytest.approx(sum(right) / 3)
    assert sum(right) > 0
    assert found["torchchat"]["model"].endswith("TinyStories-656K")
    assert found["torchchat"]["executor"] == "eager"
    assert set(found["torchchat"]["versions"]) == {"torchchat", "torch", "lm_eval"}


def test_a_task_with_answers_has_the_manually_computed_score(testdata: Path, torchchat: Run, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchchat_core.cli.progress_bars.LOG_DELAY", 0.0)
    answered = json.loads(torchchat("generate", testdata / "hf/TinyStories-656K", *COMMON, "--raw", "--prompt",
                                    QUESTIONS[0], "--temperature", "0", "--max-new-tokens", "12", "--stop", ",",
                                    "--json").out)["text"]
    documents = [{"question": QUESTIONS[0], "answer": answered.strip()},
                 {"question": QUESTIONS[1], "answer": "nothing"},
                 {"question": QUESTIONS[2], "answer": "of the kind"}]
    _made_task(tmp_path, "made_answer", documents, output_type="generate_until", doc_to_text="{{question}}",
               doc_to_target="{{answer}}", metric_list=[{**_metric("exact_match", True), "ignore_case": False}],
               filter_list=[{"name": "none", "filter": [{"function": "remove_whitespace"},
                                                        {"function": "take_first"}]}],
               generation_kwargs={"until": [","], "max_gen_toks": 12, "do_sample": False})
    done = torchchat("eval", testdata / "hf/TinyStories-656K", *COMMON, "--tasks", "made_answer", "--include-path",
                     tmp_path, "--output", tmp_path / "out.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out.json").read_text())["results"]["made_answer"]["exact_match,none"] \
        == pytest.approx(1 / 3)
    assert "made_answer" in done.out
    assert "it/s]" not in done.err  # bars of other libraries
    assert "answers (3 steps)" in done.err
    assert "exact_match" in done.out


def test_likelihoods_of_requests_that_share_a_beginning_are_those_of_each_alone(opened: OpenedModel) -> None:
    tokenizer = opened.text_format.tokenizer
    pairs = [(question, choice) for question in QUESTIONS for choice in CHOICES]
    start = (tokenizer.bos_id,) if tokenizer.adds_bos else ()
    requests = []
    for question, choice in pairs:
        count, whole = len(start) + len(tokenizer.encode(question)), (*start, *tokenizer.encode(question + choice))
        requests.append(Request(whole[:count], whole[count:]))
    found = likelihoods(opened.model, requests, 128, "made")
    for (question, choice), each in zip(pairs, found, strict=True):
        expected, greedy = _by_hand(opened, question, choice)
        assert each.log_probability == pytest.approx(expected, abs=1e-4)
        assert each.greedy == greedy
    assert math.isclose(likelihoods(opened.model, [requests[0]], 128, "made")[0].log_probability,
                        found[0].log_probability, abs_tol=1e-5)


def test_of_a_context_that_is_too_long_the_end_is_kept_and_a_continuation_that_is_too_long_is_refused() -> None:
    assert Request((1, 2, 3, 4), (5, 6)).within(3) == Request((3, 4), (5, 6))
    assert Request((1, 2), (5, 6)).within(3) == Request((1, 2), (5, 6))
    with pytest.raises(TorchchatError, match="a continuation of 4 tokens is to be scored; the model holds 3"):
        Request((1,), (2, 3, 4, 5)).within(3)


def test_answers_that_are_made_together_are_those_made_one_after_the_other(opened: OpenedModel) -> None:
    import dataclasses

    from torchchat_core.generation_options import GenerationOptions, SamplingOptions

    tokenizer = opened.text_format.tokenizer
    prompts = [Prompt((1, *tokenizer.encode(text)), GenerationOptions(
        sampling=SamplingOptions(temperature=0.0), max_new_tokens=count, stop=(".",)))
        for count, text in zip((3, 20, 9, 1) * 3, [*QUESTIONS, "Sam"] * 3, strict=True)]
    alone = dataclasses.replace(opened, executor=dataclasses.replace(opened.executor, abilities=frozenset({"score"})))
    assert "batch" in opened.executor.abilities
    together = answers(opened, prompts, "made")
    assert together == answers(alone, prompts, "made")
    assert len(set(together)) > 3
    assert not any("." in text for text in together)


def test_answers_that_are_drawn_are_the_same_again_with_the_same_seed_and_different_from_each_other(
        testdata: Path, torchchat: Run, tmp_path: Path) -> None:
    documents = [{"question": QUESTIONS[0]}] * 3  # the same prompt three times
    (tmp_path / "made_drawn_seen.py").write_text(
        "def seen(document, results):\n    return {'answer': results[0]}\n\n"
        "def joined(items):\n    return '|'.join(items)\n")
    _made_task(tmp_path, "made_drawn", documents, output_type="generate_until", doc_to_text="{{question}}",
               doc_to_target="", generation_kwargs={"until": ["."], "max_gen_toks": 12, "do_sample": True},
               metric_list=[])
    task = json.loads((tmp_path / "made_drawn.yaml").read_text())
    (tmp_path / "made_drawn.yaml").write_text("\n".join([
        *(f"{key}: {json.dumps(value)}" for key, value in task.items() if key != "metric_list"),
        "process_results: !function made_drawn_seen.seen", "metric_list:", "  - metric: answer",
        "    aggregation: !function made_drawn_seen.joined", "    higher_is_better: true", ""]))

    def drawn(*more: str) -> str:
        done = torchchat("eval", testdata / "hf/TinyStories-656K", *COMMON, "--tasks", "made_drawn", "--include-path",
                         tmp_path, "--json", *more)
        found: str = json.loads(done.out)["results"]["made_drawn"]["answer,none"]
        return found

    first = drawn()
    assert len(set(first.split("|"))) == 3
    assert drawn() == first
    assert drawn("--seed", "7") != first


# ---- what cannot be -----------------------------------------------------------------------------------------------


def test_settings_of_tasks_become_ours_and_unknown_ones_are_refused() -> None:
    from torchchat_core.measure.evaluation import NEW_TOKENS, generation_options

    plain = generation_options({"until": "\n\n"}, {"temperature": 0.6, "repetition_penalty": 1.1})
    assert (plain.stop, plain.max_new_tokens, plain.sampling.temperature) == (("\n\n",), NEW_TOKENS, 0.0)
    assert plain.sampling.repetition_penalty == 1.0
    greedy = generation_options({"until": ["a", ""], "do_sample": False, "temperature": 0.7, "max_gen_toks": 5}, {})
    assert (greedy.stop, greedy.max_new_tokens, greedy.sampling.temperature) == (("a",), 5, 0.0)
    assert generation_options({"temperature": 0.7, "top_k": 3}, {}).sampling.top_k == 3
    with pytest.raises(TorchchatError, match="generates with 'num_beams', which torchchat does not know"):
        generation_options({"num_beams": 4}, {})


def test_what_a_task_that_draws_does_not_say_is_as_lm_evals_own_model_has_it() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers import GenerationConfig

    from torchchat_core.measure.evaluation import generation_options

    theirs = GenerationConfig._get_default_generation_params()
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    drawn = generation_options({"do_sample": True}, {}, seed=5).sampling
    assert {name: getattr(drawn, name) for name in names} == {name: theirs[name] for name in names}
    assert drawn.seed == 5
    drawn = generation_options({"do_sample": True, "temperature": 0.2}, {"temperature": 0.6, "top_p": 0.9}).sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.2, 0.9, 50)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--include-path", "/no/such/folder"), "there is no folder '/no/such/folder'"),
    (("--tasks", "mine", "--include-path", "MADE"), "the data of mine cannot be read: Unable to find '/no/such.jsonl'"),
    (("--output", "/no/such/folder/out.json"), "there is no folder"),
    ((), "the data of wikitext is not available: Couldn't reach 'EleutherAI/wikitext_document_level' on the Hub; there "
         "is no network (it is unplugged), and the data is not cached here"),
])
def test_what_cannot_be_evaluated_is_told_in_one_sentence(arguments: tuple[str, ...], message: str, torchchat: Run,
                                                          monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchchat_core.measure import evaluation

    monkeypatch.setattr(evaluation, "connection_fault", lambda _host, _port: "it is unplugged")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    _made_task(tmp_path, "mine", [], output_type="multiple_choice", doc_to_text="a", doc_to_target="0",
               doc_to_choice=["a", "b"], dataset_kwargs={"data_files": {"test": "/no/such.jsonl"}})
    done = torchchat("eval", *COMMON, *(word.replace("MADE", str(tmp_path)) for word in arguments))
    assert done.code == 1
    assert message in next(line for line in done.err.splitlines() if line.startswith("error: "))
    assert "Traceback" not in done.err


def test_a_task_that_there_is_not_is_refused_with_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchchat_core.measure import evaluation

    monkeypatch.setattr(evaluation, "TaskManager", lambda **_given: SimpleNamespace(all_tasks=["wikitext", "arc_easy"]))
    with pytest.raises(TorchchatError, match="lm-eval has no task 'wikitexd'") as told:
        evaluation.Wish(tasks=("arc_easy", "wikitexd")).manager()
    assert told.value.fix == "did you mean wikitext?"


def test_no_task_at_all_is_wrong_usage(torchchat: Run) -> None:
    done = torchchat("eval", "--tasks", ",")
    assert done.code == 2
    assert "--tasks names no task" in done.err


def test_a_task_in_a_folder_of_its_own_is_found_without_reading_all_the_others() -> None:
    from torchchat_core.measure.evaluation import Wish

    assert Wish(tasks=("wikitext",)).manager().all_tasks == ["wikitext"]
    assert set(Wish(tasks=("wikitext", "hellaswag")).manager().all_subtasks) == {"wikitext", "hellaswag"}


def test_without_lm_eval_it_says_how_to_get_it(torchchat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchchat_core.cli import evaluate

    monkeypatch.setattr(evaluate, "find_spec", lambda _name: None)
    done = torchchat("eval")
    assert done.code == 1
    assert "try: pip install 'torchchat-core[eval]'" in done.err


# ---- user data in place of a task's ------------------------------------------------------------------------


WIKI = " \n = First = \n \n Some text , with words . \n \n = = Section = = \n \n More .\n = Second = \n \n The end .\n"


def test_a_plain_text_is_split_into_pages_as_in_lm_evals_wikitext(tmp_path: Path) -> None:
    from torchchat_core.measure.own_data import documents_of

    (tmp_path / "wiki.raw").write_text(WIKI)
    pages = [document["page"] for document in documents_of(tmp_path / "wiki.raw")]
    assert [page.strip().split("\n")[0].strip() for page in pages] == ["= First =", "= Second ="]
    assert "= = Section = =" in pages[0]
    (tmp_path / "plain.txt").write_text("No headings here.\n\nNone.")
    assert len(documents_of(tmp_path / "plain.txt")) == 1


def test_the_pages_of_wikitext_2_are_62(testdata: Path) -> None:
    from torchchat_core.measure.own_data import documents_of

    assert len(documents_of(testdata / "text/wikitext2-test.raw")) == 62


def test_the_default_task_needs_no_network_with_data(testdata: Path, torchchat: Run, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval does not ask git for a commit either, which prints an error outside of a repository."""
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: pytest.fail("git is asked"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network is used"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wiki.raw").write_text(WIKI)
    done = torchchat("eval", testdata / "hf/TinyStories-656K", *COMMON, "--data", "wiki.raw", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["n-samples"]["wikitext"]["effective"] == 2
    assert found["torchchat"]["data"] == "wiki.raw"
    assert found["results"]["wikitext"]["word_perplexity,none"] > 1


@pytest.mark.parametrize(("content", "name", "message"), [
    ("", "a.raw", "is empty"), ("{", "a.jsonl", "is not JSON: .* at line 1, column 2"),
    ("[]", "a.json", "no documents"),
    ("3\n", "a.jsonl", "no documents"), ('{"nothing": 1}\n', "a.jsonl", "failed with the documents in"),
])
def test_invalid_data_is_reported(content: str, name: str, message: str, testdata: Path, torchchat: Run, tmp_path: Path
                                   ) -> None:
    (tmp_path / name).write_text(content)
    done = torchchat("eval", testdata / "hf/stories260K", *COMMON, "--data", tmp_path / name)
    assert done.code == 1
    assert re.search(message, done.err), done.err
    assert "try: " in done.err


def test_data_requires_one_task_and_an_existing_file(torchchat: Run) -> None:
    done = torchchat("eval", "embedded", "--tasks", "wikitext,hellaswag", "--data", "x")
    assert (done.code, "--data works with one task" in done.err) == (2, True)
    done = torchchat("eval", "embedded", "--data", "/nonexistent/x")
    assert (done.code, "--data: the file '/nonexistent/x' does not exist" in done.err) == (1, True)
