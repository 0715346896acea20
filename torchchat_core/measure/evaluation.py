"""Tasks of lm-eval (EleutherAI's harness) on any runtime. Imported only where `torchchat eval` runs: it is large."""

from __future__ import annotations

import functools
import logging
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval import utils as windows
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from torchchat_core import __version__
from torchchat_core.errors import TorchchatError, UsageError, did_you_mean, quoted, quoted_path
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.measure.answering import Prompt, answers
from torchchat_core.measure.likelihood import Request, likelihoods
from torchchat_core.measure.own_data import FIX, documents_of, in_place_of_the_data_set
from torchchat_core.network import connection_fault, hub_endpoint
from torchchat_core.pipeline import OpenedModel

NEW_TOKENS = 256  # of an answer, where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names that tasks have for it
LOADERS = ("datasets", "huggingface_hub", "httpx", "httpx2", "requests", "aiohttp")  # whose errors are about data
TALKATIVE = ("lm_eval", "huggingface_hub", "datasets")  # loggers: what they warn of while they retry, the error says
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
TRANSFORMERS = {"temperature": 1.0, "top_k": 50}  # what its generate() draws with where neither task nor model says
SEED = 1234  # lm-eval's own
TASKS = Path(lm_eval.tasks.__file__).parent  # where lm-eval has them


class TorchchatLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types of its own for it
    """lm-eval's view of an opened model.

    A text begins with BOS where the tokenizer says so; a whole text that is scored (`loglikelihood_rolling`) follows
    BOS, or the end token where there is none, and BOS itself is not scored.
    """

    def __init__(self, opened: OpenedModel, seed: int = SEED) -> None:
        """`seed`: of answers that are drawn."""
        super().__init__()
        opened.executor.require("score")
        self._opened = opened
        self._seed = seed
        self._tokenizer = opened.text_format.tokenizer

    @property
    def eot_token_id(self) -> int:
        token = self._tokenizer.eos_id if self._tokenizer.eos_id is not None else self._tokenizer.bos_id
        if token is None:
            raise TorchchatError("the tokenizer has neither a token to begin a text with nor one to end it")
        return token

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id if self._tokenizer.bos_id is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self._opened.max_seq_length

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm-eval keeps requests."""
        return self._opened.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        """Token ids; with BOS unless `add_special_tokens` is False, or the tokenizer does not begin texts with it."""
        ids = self._tokenizer.encode(string)
        begins = add_special_tokens is not False and self._tokenizer.adds_bos and self._tokenizer.bos_id is not None
        return [self.prefix_token_id, *ids] if begins else ids

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_others: Any
                              ) -> list[tuple[float, bool]]:
        wanted = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = likelihoods(self._opened.model, wanted, self.max_length, "log-likelihoods")
        return [(each.log_probability, each.greedy) for each in found]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002
        """Log-probabilities of continuations, and whether greedy decoding would give them."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log-probabilities of whole texts: windows as long as the model takes, the last one with a full context."""
        wanted, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in windows.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                context, continuation = windows.make_disjoint_window(pair)
                wanted.append(Request(tuple(context), tuple(continuation)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, each in zip(owners, likelihoods(self._opened.model, wanted, self.max_length, "perplexity"),
                               strict=True):
            totals[owner] += each.log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Answers up to a stop string; of a prompt that is too long, the end is taken."""
        prompts = []
        for request in requests:
            text, settings = request.args
            options = generation_options(settings, self._opened.text_format.defaults, self._seed)
            room = self.max_length - (options.max_new_tokens or NEW_TOKENS)
            if room < 1:
                raise TorchchatError(f"a task asks for {options.max_new_tokens} tokens; the model holds "
                                     f"{self.max_length} with the prompt", "leave the task out")
            prompts.append(Prompt(tuple(self.tok_encode(text)[-room:]), options))
        return answers(self._opened, prompts, "answers")


def generation_options(settings: Mapping[str, Any], defaults: Mapping[str, Any], seed: int = SEED
                       ) -> GenerationOptions:
    """A task's settings as ours: greedy unless it says otherwise.

    What a task that draws does not say is taken from the model's `defaults`, and then from transformers' own, as
    lm-eval's `hf` model does. Raises `TorchchatError` for unknown settings.
    """
    known = {"until", "do_sample", *LENGTHS, *SAMPLING}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TorchchatError(f"a task generates with {quoted(unknown[0])}, which torchchat does not know; known are "
                             f"{', '.join(sorted(known))}", did_you_mean(unknown[0], known))
    until = settings.get("until") or []
    asked = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    draws = settings.get("do_sample")
    if draws is None:
        draws = asked.get("temperature", 0) > 0
    chosen = {**TRANSFORMERS, **defaults, "seed": seed, **asked} if draws else {"temperature": 0.0}
    length = next((settings[name] for name in LENGTHS if settings.get(name) is not None), NEW_TOKENS)
    return GenerationOptions(sampling=SamplingOptions(**chosen), max_new_tokens=int(length),
                             stop=tuple(each for each in ([until] if isinstance(until, str) else until) if each))


# ---- tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be evaluated."""

    tasks: tuple[str, ...]
    limit: float | None = None  # documents of each task; below 1 a share of them
    shots: int | None = None  # examples before each question; None: as the task says
    include: Path | None = None  # folder of tasks of one's own
    data: Path | None = None  # file with documents that replace the task's data set; for a single task
    seed: int | None = None  # of examples, of documents that are drawn, and of answers; None: lm-eval's own

    @property
    def seeds(self) -> dict[str, int]:
        """As lm-eval takes them."""
        names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        return {} if self.seed is None else dict.fromkeys(names, self.seed)

    def manager(self) -> TaskManager:
        """Knows all tasks. Raises `TorchchatError` for names of tasks that there are not."""
        if self.include is not None and not self.include.is_dir():
            raise TorchchatError(f"--include-path: there is no folder {quoted_path(str(self.include))}",
                                 "name the folder of the tasks' YAML files")
        if self.include is not None:
            own = TaskManager(include_path=str(self.include), include_defaults=False)
            if set(self.tasks) <= set(own.all_tasks):  # reading all of lm-eval's own takes ten seconds
                return own
        elif folders := [path for name in self.tasks if (path := TASKS / name).is_dir()]:  # with tasks of that name
            some = TaskManager(include_path=[str(path) for path in folders], include_defaults=False)
            if set(self.tasks) <= set(some.all_subtasks):  # groups and tags may have members elsewhere
                return some
        manager = TaskManager(include_path=str(self.include) if self.include is not None else None)
        for name in self.tasks:
            if name not in manager.all_tasks:
                raise UsageError(f"--tasks: lm-eval has no task {quoted(name)}", did_you_mean(name, manager.all_tasks)
                                     or "lm-eval ls tasks lists them; --include-path takes a folder of your own")
        return manager


def evaluate(opened: OpenedModel, wish: Wish, manager: TaskManager, recipe: str | None = None) -> dict[str, Any]:
    """lm-eval's results, with what they are of.

    Raises `TorchchatError` where the data of a task cannot be had, and for tasks that the model cannot do.
    """
    fault = None
    documents = documents_of(wish.data) if wish.data is not None else None
    data = in_place_of_the_data_set(documents) if documents is not None else nullcontext()
    network = offline_without_network() if documents is None else nullcontext()
    try:
        with quiet(TALKATIVE), own_bars(), without_git(), data, network as fault:
            found = simple_evaluate(model=TorchchatLM(opened, SEED if wish.seed is None else wish.seed),
                                    tasks=list(wish.tasks), num_fewshot=wish.shots, limit=wish.limit,
                                    task_manager=manager, log_samples=False, **wish.seeds)
    except TorchchatError:
        raise
    except Exception as error:
        if documents is not None:
            raise TorchchatError(f"the task {', '.join(wish.tasks)} failed with the documents in {wish.data}: "
                                 f"{type(error).__name__}: {str(error).strip():.200}", FIX) from error
        if not _is_about_data(error):
            raise
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        first = first.removesuffix(" (OfflineModeIsEnabled)")
        if not any(isinstance(each, ConnectionError) for each in _chain(error)):
            raise TorchchatError(f"the data of {', '.join(wish.tasks)} cannot be read: {first:.200}",
                                 "see what the task's dataset_path and dataset_kwargs say") from error
        offline = f"; there is no network ({fault}), and the data is not cached here" if fault is not None else ""
        raise TorchchatError(f"the data of {', '.join(wish.tasks)} is not available: {first:.200}{offline}",
                             "connect to the network once to download it, or use --data with a file of documents, "
                             "--include-path with a task of your own, or torchchat perplexity") from error
    if found is None:
        raise TorchchatError("lm-eval gave no results")
    ours = {"model": opened.name, "executor": opened.executor.name, "device": opened.model.device,
            "dtype": opened.model.dtype, "recipe": recipe, "schemes": list(opened.schemes),
            "max_seq_length": opened.max_seq_length, "data": str(wish.data) if wish.data is not None else None,
            "versions": _versions()}
    return {**found, "torchchat": ours}


@contextmanager
def quiet(names: Sequence[str]) -> Iterator[None]:
    """Within it, these loggers tell errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def without_git() -> Iterator[None]:
    """Keep lm-eval from asking git for the commit of the current folder in the block.

    The commit is meaningless here, and outside a repository git prints "fatal: not a git repository".
    """
    before = lm_eval.evaluator.get_git_commit_hash
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        lm_eval.evaluator.get_git_commit_hash = before


@contextmanager
def own_bars() -> Iterator[None]:
    """Within it, lm-eval prepares documents, and `datasets` reads files, without bars of their own beside ours."""
    shown, bar = not datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def offline_without_network() -> Iterator[str | None]:
    """Within it, where the hub cannot be reached, only kept data is looked for: trying again takes minutes. Gives why
    it cannot be reached."""
    fault = connection_fault(*hub_endpoint()) if not urllib.request.getproxies() else None
    if fault is None:
        yield None
        return
    places = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        yield fault
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _is_about_data(error: BaseException) -> bool:
    """Whether it, or what it came from, is a failure to read files or to reach the network."""
    return any(isinstance(each, OSError) or type(each).__module__.partition(".")[0] in LOADERS
               for each in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"torchchat": __version__, **{name: version(name) for name in ("torch", "lm_eval")}}
