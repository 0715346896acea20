"""What a loaded model and its sessions have to do, wherever they come from.

`ExecutorContract` demands it of models in memory, `ExporterContract` of files. Every comparison is with
`models.reference_logits`: core's transformer over whole rows, in float32 and without a cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.pipeline import has_device
from torchchat_core.specs import ABILITIES, DTYPES, ExecutorInfo, LoadedModel, LoadRequest, Session
from torchchat_core.testing.cases import Case, FewThreads, Running, device_parameter, everywhere
from torchchat_core.testing.demands import demand, refusal
from torchchat_core.testing.memory import demand_no_growth
from torchchat_core.testing.models import PROMPTS, VARIANTS, seeded, tiny_config, variant_config

# A model and a prompt whose weights and whose KV cache are some megabytes, for the sake of measuring memory.
WIDE: Mapping[str, Any] = {"num_layers": 4, "hidden_size": 128, "intermediate_size": 512, "num_heads": 8,
                           "num_kv_heads": 8, "head_dim": 128, "max_context": 512}
WIDE_PROMPT = 256

class SessionContract(FewThreads):
    """The tests of sessions; subclasses say how a model is loaded."""

    variants: Sequence[str] = tuple(VARIANTS)  # of models.VARIANTS: the architectures that the runtime knows
    tolerances: Mapping[str, float] = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # of logits, relative to the largest


    def executor_info(self) -> ExecutorInfo:
        """The description of the executor that runs the models."""
        raise NotImplementedError

    def devices_and_dtypes(self) -> tuple[frozenset[str], frozenset[str]]:
        """Where the models have to run, and in what."""
        raise NotImplementedError

    def request(self, module: Transformer, device: str, dtype: str, folder: Path) -> LoadRequest:
        """What the executor is given for `module`, whose weights are on the device in the dtype.

        `folder` is for whatever files that takes; the same folder comes with the same module only.
        """
        raise NotImplementedError

    def model(self, config: ModelConfig) -> Transformer:
        """The model of a configuration, float32 on the CPU; a contract of quantised models overrides this."""
        return seeded(config)

    def load(self, module: Transformer, device: str, dtype: str, folder: Path) -> LoadedModel:
        """The module, loaded by the executor."""
        module = module.to(device, TORCH_DTYPES[dtype])
        loaded: LoadedModel = self.executor_info().make().load(self.request(module, device, dtype, folder))
        return loaded

    # ---- fixtures -------------------------------------------------------------------------------------------------

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        devices, dtypes = self.devices_and_dtypes()
        in_order = [dtype for dtype in DTYPES if dtype in dtypes]
        demand(devices and in_order, "there is no device and dtype to run on", "declare `devices` and `dtypes`; "
               "those of an exporter and of the executor that reads its files have to meet")
        wide = getattr(metafunc.function, "everywhere", False)
        cases = []
        for device in sorted(devices):
            if has_device(device):
                cases += [Case(variant, device, dtype) for variant in (self.variants if wide else self.variants[:1])
                          for dtype in (in_order if wide else in_order[:1])]
            else:
                cases.append(Case(self.variants[0], device, in_order[0]))
        parameters = [device_parameter(case.device, case) for case in cases]
        if "running" in metafunc.fixturenames:
            metafunc.parametrize("running", parameters, indirect=True, scope="class")
        elif "case" in metafunc.fixturenames:
            metafunc.parametrize("case", parameters)

    @pytest.fixture(scope="class")
    @classmethod
    def running(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
        """The model of one case, loaded once for all tests."""
        case: Case = request.param
        config = variant_config(case.variant)
        folder = tmp_path_factory.mktemp("loaded")
        loaded = cls().load(cls().model(config), case.device, case.dtype, folder)
        reference = cls().model(config).to(TORCH_DTYPES[case.dtype]).float()
        yield Running(case, loaded, reference, cls.tolerances[case.dtype])
        loaded.close()

    # ---- agreement with the reference -----------------------------------------------------------------------------

    @everywhere
    def test_logits_are_those_of_the_reference(self, running: Running) -> None:
        """After a prefill, and after each token that is decoded behind it."""
        for prompt in PROMPTS:
            session = running.model.session()
            tokens = [*prompt, 7, 0, 95, 7, 7]
            expected = running.expected(tokens, session)
            running.compare(session.prefill(prompt), expected[len(prompt) - 1], f"prefill of {len(prompt)} tokens",
                            "compare with models.reference_logits, layer by layer; state the error of the dtype in "
                            "`tolerances`, and in `variants` the architectures that the runtime knows")
            for position in range(len(prompt), len(tokens)):
                running.compare(session.decode(tokens[position]), expected[position], f"decoding token {position + 1}",
                                "look at positions, the mask and what is written to the KV cache; prefill is right")
            session.close()

    @everywhere
    def test_greedy_tokens_are_those_of_the_reference(self, running: Running) -> None:
        """The likeliest token is the same at every step, unless two are nearer to each other than the tolerance."""
        for prompt in PROMPTS:
            session = running.model.session()
            logits, tokens = session.prefill(prompt), list(prompt)
            for _ in range(10):
                tokens.append(int(logits.argmax()))
                logits = session.decode(tokens[-1])
            for position, expected in enumerate(running.expected(tokens, session)[len(prompt) - 1 : -1], len(prompt)):
                chosen, right = tokens[position], int(expected.argmax())
                margin = float((expected[right] - expected[chosen]) / expected.abs().max())
                demand(margin <= running.tolerance, f"after {tokens[:position]} the likeliest token is {chosen}, not "
                       f"{right} ({running.case})", "compare the logits with models.reference_logits; "
                       "test_logits_are_those_of_the_reference shows where they part")
            session.close()

    def test_logits_are_float32_on_the_cpu(self, running: Running) -> None:
        """Sampling is core's, and takes what every executor gives."""
        session = running.model.session()
        for what, logits in (("prefill", session.prefill([1, 2, 3])), ("decode", session.decode(4))):
            demand(isinstance(logits, Tensor) and logits.dtype == torch.float32 and logits.device.type == "cpu",
                   f"{what} returns {_form(logits)}", "return `logits.float().cpu()`")
            demand(tuple(logits.shape) == (running.model.vocab_size,), f"{what} returns logits {list(logits.shape)} of "
                   f"a vocabulary of {running.model.vocab_size}", "return [vocab], at the last position alone")

    def test_logits_stay_as_they_were_given(self, running: Running) -> None:
        """The caller may keep logits; a buffer that the next step writes to has to be copied."""
        session = running.model.session()
        given = session.prefill([1, 2, 3])
        copy = given.clone()
        session.decode(4)
        demand(torch.equal(given, copy), "the logits of a prefill change when the next token is decoded",
               "return a copy of the output buffer: `logits.clone()`")

    def test_the_model_says_what_it_is(self, running: Running) -> None:
        """Frontends check tokenizers and lengths against what the loaded model says."""
        config, model, case = running.reference.config, running.model, running.case
        said = {"vocab_size": model.vocab_size, "device": model.device, "dtype": model.dtype}
        asked = {"vocab_size": config.vocab_size, "device": case.device, "dtype": case.dtype}
        demand(said == asked, f"the loaded model says {said}, and was loaded as {asked}",
               "set these attributes from the request and the model's config")
        demand(1 <= model.max_context <= config.max_context, f"the loaded model's max_context is {model.max_context}; "
               f"the config's is {config.max_context}", "take it from the config, or less where memory is fixed")

    # ---- what a session holds -------------------------------------------------------------------------------------

    def test_a_prompt_in_parts_gives_what_it_gives_at_once(self, running: Running) -> None:
        """Core feeds long prompts in parts, and a further turn behind what is held."""
        tokens = list(PROMPTS[2])
        session = running.model.session()
        expected = running.expected(tokens, session)
        for start, end in ((0, 1), (1, 5), (5, 6), (6, len(tokens))):
            running.compare(session.prefill(tokens[start:end]), expected[end - 1], f"prefill of {start} to {end}",
                            "give the tokens the positions from `length` on, and a mask that shows what is held")

    @everywhere
    def test_cutting_and_going_on_equals_a_fresh_sequence(self, running: Running) -> None:
        """Conversations are edited and speculation is taken back: no trace of the cut tokens may stay."""
        held = list(PROMPTS[1])
        session = running.model.session()
        session.prefill(held)
        for length, further in ((8, [60, 61]), (10, [62]), (3, [63, 64, 65, 66, 67, 68, 69]), (0, [70, 71])):
            session.truncate(length)
            demand(session.length == length, f"after truncate({length}) the length is {session.length}",
                   "set `length` in truncate")
            held = held[:length] + further
            logits = session.prefill(further) if len(further) > 1 else session.decode(further[0])
            running.compare(logits, running.expected(held, session)[-1], f"after truncate({length})",
                            "forget the tail in every layer; a ring of the last positions cannot simply be cut: keep "
                            "what a sliding window may need again, or compute it again")

    def test_sessions_do_not_see_each_other(self, running: Running) -> None:
        """A server holds many; each has its own cache, wherever the steps of the others come between."""
        prompts = [[3, 1, 4, 1], [50, 51], [9, 8, 7, 6, 5]]
        sessions = [running.model.session() for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.prefill(prompt)
        for step in range(4):
            for session, prompt in zip(sessions, prompts, strict=True):
                prompt.append((len(prompt) * 13 + step) % 90)
                running.compare(session.decode(prompt[-1]), running.expected(prompt, session)[-1],
                                "steps of several sessions by turns", "keep all state of a sequence in its session")

    def test_closing_a_session_leaves_the_others(self, running: Running) -> None:
        """Also a closed session's memory, taken again, must not show what it held."""
        first, second = running.model.session(), running.model.session()
        first.prefill([1, 2, 3])
        second.prefill([4, 5, 6])
        first.close()
        third = running.model.session()
        mend = "free what the session itself owns, and begin each session with nothing held"
        running.compare(second.decode(7), running.expected([4, 5, 6, 7], second)[-1], "after another closed", mend)
        running.compare(third.prefill([8, 9]), running.expected([8, 9], third)[-1], "in a closed one's place", mend)

    def test_closing_twice_does_nothing(self, running: Running) -> None:
        """Whoever cleans up need not know who did so before."""
        session = running.model.session()
        session.prefill([1, 2])
        session.close()
        try:
            session.close()
        except Exception as error:
            demand(False, f"the second close() of a session raised {type(error).__name__}: {error}",
                   "let close() do nothing where the session is closed")

    # ---- lengths and limits ---------------------------------------------------------------------------------------

    def test_length_counts_the_tokens_held(self, running: Running) -> None:
        """Core reuses what a session holds by its length."""
        session = running.model.session()
        lengths = [session.length]
        session.prefill([1, 2, 3])
        lengths.append(session.length)
        session.decode(4)
        lengths.append(session.length)
        session.truncate(2)
        lengths.append(session.length)
        demand(lengths == [0, 3, 4, 2], f"the length is {lengths} at first, after 3 tokens, after another, and cut to "
               "2; it should be [0, 3, 4, 2]", "count each token once, when its keys and values are held")

    def test_a_session_holds_as_much_as_its_limit(self, running: Running) -> None:
        """Also the last place is there, and without a limit the whole context."""
        whole = running.model.session().limit
        demand(whole == running.model.max_context, f"session().limit is {whole}, and max_context "
               f"{running.model.max_context}", "let a session without a limit hold max_context tokens")
        session = running.model.session(5)
        demand(session.limit == 5, f"session(5).limit is {session.limit}", "keep the limit that was asked for")
        session.prefill([1, 2, 3, 4])
        running.compare(session.decode(5), running.expected([1, 2, 3, 4, 5], session)[-1], "the last place",
                        "refuse tokens only when length would pass the limit")

    def test_too_many_tokens_are_refused_and_change_nothing(self, running: Running) -> None:
        """A prompt that is too long is a person's mistake, and the conversation before it is still there."""
        session = running.model.session(5)
        session.prefill([1, 2, 3])
        with refusal("a prefill that passes the limit"):
            session.prefill([4, 5, 6])
        self._still_holds(running, session, [1, 2, 3], 4)
        session.prefill([5])
        with refusal("decoding a token in a full session"):
            session.decode(6)
        demand(session.length == 5, f"after a refused token the length is {session.length} instead of 5",
               "check the room before anything is changed")

    def test_impossible_limits_are_refused(self, running: Running) -> None:
        """What cannot be held is told when the session is made, not when it is full."""
        for limit in (0, -1, running.model.max_context + 1):
            with refusal(f"session({limit}) of a model with max_context {running.model.max_context}"):
                running.model.session(limit)

    def test_impossible_cuts_are_refused_and_change_nothing(self, running: Running) -> None:
        """A sequence cannot be cut to more than it holds: the places behind it hold nothing, or something old."""
        session = running.model.session()
        session.prefill([1, 2, 3])
        for length in (4, -1):
            with refusal(f"truncate({length}) of a session that holds 3 tokens"):
                session.truncate(length)
        self._still_holds(running, session, [1, 2, 3], 4)

    def test_wrong_tokens_are_refused_and_change_nothing(self, running: Running) -> None:
        """An id outside the vocabulary is of another model's tokenizer: nobody may read beside the embedding."""
        session, size = running.model.session(), running.model.vocab_size
        session.prefill([1, 2, 3])
        for token in (size, -1):
            with refusal(f"decoding token {token} with a vocabulary of {size}"):
                session.decode(token)
            with refusal(f"a prefill with token {token} in its middle"):
                session.prefill([4, token, 5])
        with refusal("a prefill of no tokens"):
            session.prefill([])
        self._still_holds(running, session, [1, 2, 3], 4)

    def _still_holds(self, running: Running, session: Session, tokens: list[int], further: int) -> None:
        demand(session.length == len(tokens), f"after a refused call the length is {session.length} instead of "
               f"{len(tokens)}", "check everything before anything is changed")
        running.compare(session.decode(further), running.expected([*tokens, further], session)[-1],
                        "after a refused call", "check everything before anything is written to the KV cache")

    # ---- abilities ------------------------------------------------------------------------------------------------

    def test_score_gives_the_logits_of_every_position(self, running: Running) -> None:
        """Ability `score`: perplexity and speculation read all of them, and then go on."""
        self._needs("score")
        session: Any = running.model.session()
        tokens = [*PROMPTS[1], 20, 21, 22, 23]
        expected = running.expected(tokens, session)
        mend = "return logits [n, vocab] of the tokens given, float32 on the CPU, and hold them as prefill does"
        running.compare(session.score(tokens[:6]), expected[:6], "score of the first tokens", mend)
        running.compare(session.score(tokens[6:12]), expected[6:12], "score behind what is held", mend)
        running.compare(session.decode(tokens[12]), expected[12], "a token after a score", mend)
        demand(session.length == 13, f"after 13 tokens the length is {session.length}", mend)

    def test_a_batch_gives_each_session_what_it_gets_alone(self, running: Running) -> None:
        """Ability `batch`: sequences of different lengths take a step together."""
        self._needs("batch")
        model: Any = running.model
        prompts = [[1, 2, 3], [4], list(PROMPTS[2])]
        sessions = [model.session() for _ in prompts]
        for session, prompt in zip(sessions, prompts, strict=True):
            session.prefill(prompt)
        for step in range(3):
            for index, prompt in enumerate(prompts):
                prompt.append(20 + 10 * index + step)
            logits = model.decode_batch(sessions, [prompt[-1] for prompt in prompts])
            expected = torch.stack([running.expected(prompt, session)[-1]
                                    for session, prompt in zip(sessions, prompts, strict=True)])
            running.compare(logits, expected, "a step of three sessions", "give each token its own session's position, "
                            "cache and mask, and return logits [sessions, vocab]")
        lengths = [session.length for session in sessions]
        demand(lengths == [6, 4, 33], f"after three steps the lengths are {lengths} instead of [6, 4, 33]",
               "count the token in each of the sessions")

    def test_prompts_together_give_each_session_what_it_gets_alone(self, running: Running) -> None:
        """Ability `prompt_batch`: prompts of different lengths, behind nothing and behind what is held."""
        self._needs("prompt_batch")
        model: Any = running.model
        prompts = [[1, 2, 3], [4], list(PROMPTS[2])]
        for longest in (len(PROMPTS[2]), 5):
            sessions = [model.session() for _ in prompts]
            sessions[0].prefill([7, 8])
            given = [prompt[:longest] for prompt in prompts]
            held = [[7, 8, *given[0]], *given[1:]]
            logits = model.prefill_batch(sessions, given)
            expected = torch.stack([running.expected(tokens, session)[-1]
                                    for session, tokens in zip(sessions, held, strict=True)])
            running.compare(logits, expected, "prompts of three sessions", "give each token its own session's "
                            "position, cache and mask, and return the logits [sessions, vocab] at the last tokens")
            lengths = [session.length for session in sessions]
            demand(lengths == list(map(len, held)), f"behind prompts of {list(map(len, held))} tokens the lengths are "
                   f"{lengths}", "count the tokens in each of the sessions")
            self._still_holds(running, sessions[2], held[2], 6)
        with refusal("two prompts of one session in a batch"):
            model.prefill_batch([sessions[1], sessions[1]], [[1], [2]])
        with refusal("a prompt without tokens in a batch"):
            model.prefill_batch(sessions[1:], [[1], []])
        self._still_holds(running, sessions[1], held[1], 6)

    def test_an_impossible_batch_is_refused_and_changes_nothing(self, running: Running) -> None:
        """Ability `batch`: one full session must not spoil the others' sequences."""
        self._needs("batch")
        model: Any = running.model
        full, other = model.session(3), model.session()
        full.prefill([1, 2, 3])
        other.prefill([4, 5])
        for what, sessions, tokens in (("a full session in a batch", [other, full], [1, 1]),
                                       ("a batch of two sessions and one token", [other, model.session()], [1]),
                                       ("a batch with a session twice", [other, other], [1, 2]),
                                       ("a wrong token in a batch", [other, model.session()], [1, -1])):
            with refusal(what):
                model.decode_batch(sessions, tokens)
        self._still_holds(running, other, [4, 5], 6)

    def test_a_copy_goes_its_own_way(self, running: Running) -> None:
        """Ability `fork`: several answers to one prompt, and prompts that begin alike."""
        self._needs("fork")
        original: Any = running.model.session()
        original.prefill([1, 2, 3, 4, 5])
        copied = original.fork(3)
        demand((copied.length, copied.limit) == (3, original.limit), f"a copy of 3 tokens holds {copied.length} and "
               f"may hold {copied.limit}", "copy the first tokens alone, and the limit")
        self._still_holds(running, copied, [1, 2, 3], 9)
        self._still_holds(running, original, [1, 2, 3, 4, 5], 6)
        with refusal("a copy of more tokens than the session holds"):
            original.fork(original.length + 1)

    def test_hidden_states_lead_to_the_logits(self, running: Running) -> None:
        """Ability `embed`: of each token, behind the last norm; the tokens are in the cache then as after prefill."""
        self._needs("embed")
        session: Any = running.model.session()
        tokens = [3, 1, 4, 1, 5]
        states = session.embed(tokens)
        head = running.reference.lm_head
        demand(states.shape == (5, running.reference.config.hidden_size) and states.dtype == torch.float32,
               f"hidden states of five tokens are {_form(states)} {list(states.shape)}",
               "return [n, hidden] in float32")
        logits = head(states) / running.reference.config.logits_divisor
        running.compare(logits, running.expected(tokens, session), "the reference's head on hidden states",
                        "return what goes into the last linear layer")
        self._still_holds(running, session, tokens, 6)

    def test_undeclared_abilities_are_absent(self, running: Running) -> None:
        """Core refuses what is not declared; something that half works would be found by those who look for it."""
        info, session = self.executor_info(), running.model.session()
        owners = {"score": session, "batch": running.model, "prompt_batch": running.model, "fork": session,
                  "embed": session}
        methods = {"score": "score", "batch": "decode_batch", "prompt_batch": "prefill_batch", "fork": "fork",
                   "embed": "embed"}
        for ability in ABILITIES:
            if ability in info.abilities:
                info.require(ability)
                continue
            with refusal(f"require({ability!r}) of an executor without that ability"):
                info.require(ability)
            found = ability in methods and hasattr(owners[ability], methods[ability])
            demand(not found, f"the executor has {methods.get(ability)}(), and does not declare {ability!r}",
                   f"add {ability!r} to `abilities` where it works as the contract asks; remove the method where not")

    def _needs(self, ability: str) -> None:
        if ability not in self.executor_info().abilities:
            pytest.skip(f"the executor does not declare the ability {ability!r}")

    # ---- memory ---------------------------------------------------------------------------------------------------

    def test_closing_a_session_frees_its_memory(self, case: Case, tmp_path: Path) -> None:
        """By close() itself: a server keeps closed sessions in its records."""
        model = self.load(seeded(tiny_config(**WIDE)), case.device, case.dtype, tmp_path)
        element = TORCH_DTYPES[case.dtype].itemsize
        taken = 2 * WIDE["num_layers"] * WIDE["num_kv_heads"] * WIDE["head_dim"] * WIDE_PROMPT * element
        kept = []

        def use() -> None:
            session = model.session()
            session.prefill([1] * WIDE_PROMPT)
            session.close()
            kept.append(session)

        demand_no_growth(use, case.device, taken, "a session")
        model.close()

    def test_closing_a_model_frees_its_memory(self, case: Case, tmp_path: Path) -> None:
        """By close() itself, and although sessions of the model are still known to someone."""
        config = tiny_config(**WIDE)
        taken = sum(parameter.numel() for parameter in seeded(config).parameters()) * TORCH_DTYPES[case.dtype].itemsize
        kept = []

        def use() -> None:
            model = self.load(seeded(config), case.device, case.dtype, tmp_path)
            session = model.session()
            session.prefill([1, 2, 3])
            session.close()
            model.close()
            kept.append((model, session))

        demand_no_growth(use, case.device, taken, "a model")


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}"
