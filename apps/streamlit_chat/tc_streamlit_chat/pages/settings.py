"""How a conversation is answered, to be changed: what the command line has as flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from tc_streamlit_chat.choices import AUTO, FASTEST, base_name, choices, known_recipes, offered, short_name
from tc_streamlit_chat.configuration import MOST_SAMPLES, SAMPLING, Configuration
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.markdown import plain
from tc_streamlit_chat.pages import frame
from tc_streamlit_chat.pages.session import DRAFT, SETTINGS
from tc_streamlit_chat.services import Services
from tc_streamlit_chat.store import Conversation, Conversations
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.fitting import Fitting
from torchchat_core.generation_options import SamplingOptions
from torchchat_core.options import detail_of, from_text, value_type
from torchchat_core.pipeline import ModelRequest, choose_device
from torchchat_core.run_options import DTYPE_NAMES

AS_IS = ""  # of recipes and dtypes: the model as it is
MOST_EXACT = (1 << 53) - 1  # the largest whole number that a browser's numbers can say
FASTEST_DTYPES = ("fast", "fast16")  # of the command line
LABELS = {"top_k": "Top-k", "top_p": "Top-p", "min_p": "Min-p"}
STEPS = {int: 1, float: 0.05}
LONGEST = 1 << 20  # tokens of an answer


def settings_dialog(services: Services, mine: Conversations, current: Conversation | None,
                    configuration: Configuration) -> None:
    """Shows the settings; what is applied holds for the conversation, and for new ones of this tab."""

    def dismissed() -> None:
        st.session_state[SETTINGS] = False

    @st.dialog("Settings", width="medium", on_dismiss=dismissed)
    @frame.guarded
    def dialog() -> None:
        changed = _form(services, configuration, current.id if current is not None else "new")
        if changed is not None:
            if current is not None:
                mine.configure(current.id, changed.to_json())
            st.session_state[DRAFT] = changed
            st.session_state[SETTINGS] = False
            st.rerun()

    dialog()


def _form(services: Services, configuration: Configuration, place: str) -> Configuration | None:
    """The controls; the configuration that was applied, None until then."""
    model_tab, answer_tab, sampling_tab = st.tabs(["Model", "Answers", "Sampling"])
    with model_tab:
        chosen = model_pickers(services, configuration, f"settings-{place}")
    known = services.models.known(chosen.request(services.models.base)) \
        if isinstance(services.models, LocalModels) else None
    with answer_tab:
        chosen = _answer_controls(chosen, place, known is None or known.chats)
    with sampling_tab:
        sampling = _sampling_controls(chosen.sampling, known.defaults if known is not None else {},
                                      f"{place}-{chosen.model}")
    with st.container(horizontal=True, horizontal_alignment="right"):
        if st.button("Reset", key=f"reset-{place}", help="Everything as the command line says"):
            return services.start
        if st.button("Apply", type="primary", key=f"apply-{place}"):
            return replace(chosen, sampling=sampling)
    return None


# ---- model, executor, recipe, device, dtype ------------------------------------------------------------------------


def model_pickers(services: Services, configuration: Configuration, place: str) -> Configuration:
    """The configuration with the model, and how it runs, that are chosen.

    Raises `TorchchatError` for a model that cannot be opened, or that this page may not use.
    """
    chosen = replace(configuration, model=_model(services, configuration, place))
    if not choices.may_use(services, chosen.model):
        raise TorchchatError(f"the model {quoted(chosen.model)} cannot be chosen here", "choose one of the list")
    if not isinstance(services.models, LocalModels):
        st.caption(plain(f"Runs on {services.models.url}, which chooses how."))
        return chosen
    if not choices.is_here(services, chosen.model):
        st.caption("It is looked for, and downloaded, with the first question; what it can be run with is known then.")
        return replace(chosen, executor=None, quantize=None, device=None, dtype=None)
    return _ways(services, chosen.request(services.models.base), chosen, f"{place}-{chosen.model}")


def _ways(services: Services, wished: ModelRequest, configuration: Configuration, place: str) -> Configuration:
    """How the model runs. Every choice leaves of the following ones what goes with it, so that all of them fit."""
    upper, lower = st.columns(2), st.columns(2)
    request = replace(wished, executor=AUTO, quantize=None, device=FASTEST, dtype=None)

    def fitting() -> Fitting:
        return choices.fitting(services, request)

    devices = fitting().devices
    if devices:  # an exported file was made for one device, and in one dtype
        request = replace(request, device=_picked(
            lower[0], "Device", [FASTEST, *devices], wished.device, f"device-{place}",
            names={FASTEST: f"the fastest here ({choose_device(FASTEST)})"}, help="Where the model is computed."))
        dtype = DTYPE_NAMES.get(wished.dtype or AS_IS, wished.dtype or AS_IS)
        dtypes = [AS_IS, *fitting().dtypes, *([dtype] if dtype in FASTEST_DTYPES else [])]
        request = replace(request, dtype=_picked(
            lower[1], "Dtype", dtypes, dtype, f"dtype-{place}",
            help="What it computes in: fp32 is exact and slow, bf16 and fp16 take half the memory.") or None)
    request = replace(request, executor=_picked(
        upper[0], "Executor", [AUTO, *fitting().executors], wished.executor, f"executor-{place}",
        help="What runs the model. auto takes the fastest that is known to fit."))
    recipes = [recipe or AS_IS for recipe in fitting().recipes]
    if wished.quantize is not None and wished.quantize not in (*recipes, *known_recipes(services.registry)):
        recipes.append(wished.quantize)  # one of the command line: a file, or JSON
    recipe = _picked(upper[1], "Recipe", recipes, wished.quantize, f"recipe-{place}",
                     help="How the weights are made smaller. Fewer bits: less memory, more speed, less quality.")
    return replace(configuration, executor=request.executor, quantize=recipe,
                   device=request.device if devices else None, dtype=(request.dtype or AS_IS) if devices else None)


def _picked(column: DeltaGenerator, label: str, options: Sequence[str], wished: str | None, key: str, *, help: str,
            names: Mapping[str, str] | None = None) -> str:
    """One of the options: at first the one that is wished for, where it is among them."""
    shown = {AS_IS: "as the model is", **(names or {})}
    found = column.selectbox(label, options, key=key, help=help, format_func=lambda name: shown.get(name, name),
                             index=options.index(wished) if wished in options else 0)
    offered([found], options)
    return str(found)


def _model(services: Services, configuration: Configuration, place: str) -> str | None:
    """As MODEL of the command line; None for the one that it was given."""
    base = base_name(services)
    listed = [each for each in choices.models(services) if (services.private or each.here) and each.model != base]
    labels: dict[str, str] = {base: short_name(base), **{each.model: each.label for each in listed}}
    if configuration.model is not None and configuration.model not in labels:
        labels[configuration.model] = short_name(configuration.model)
    names = list(labels)
    typing = services.private and not services.models.remote
    model = st.selectbox("Model", names, index=names.index(configuration.model or base), key=f"model-{place}",
                         format_func=lambda name: labels.get(name, name), accept_new_options=typing,
                         help="One of this machine, or of the catalogue, or whatever torchchat takes as MODEL: a "
                              "folder, a file, owner/name of a hub." if typing else None)
    return None if model is None or model == base else str(model)


# ---- answers -------------------------------------------------------------------------------------------------------


def _answer_controls(configuration: Configuration, place: str, chats: bool) -> Configuration:
    transcript = configuration.transcript
    if not chats:
        transcript = st.toggle("Written dialogue", value=transcript, key=f"transcript-{place}",
                               help="This model continues texts. With it, the text is a dialogue of User and "
                                    "Assistant; without, what you write is continued.")
    system = st.text_area("System prompt", value=configuration.system, key=f"system-{place}", height=110,
                          max_chars=100_000, placeholder="How the model should answer", disabled=not chats
                          and not transcript)
    left, right = st.columns(2)
    length = left.number_input("Longest answer, tokens", min_value=1, max_value=LONGEST, step=1,
                               value=configuration.max_new_tokens, key=f"length-{place}", placeholder="until it ends",
                               help="Without it, an answer goes on until the model ends it or the context is full.")
    count = right.number_input("Answers to each message", min_value=1, max_value=MOST_SAMPLES, step=1,
                               value=configuration.num_samples, key=f"count-{place}",
                               help="To choose from; the conversation goes on from the one that is seen.")
    stops = st.text_area("Stop texts, one a line", value="\n".join(configuration.stop), key=f"stop-{place}", height=80,
                         help="An answer ends before any of them. \\n stands for the end of a line.")
    return replace(configuration, transcript=transcript, system=system or "", max_new_tokens=length,
                   num_samples=int(count or 1), stop=_stops(stops or ""))


def _stops(text: str) -> tuple[str, ...]:
    return tuple(line.replace("\\n", "\n") for line in text.splitlines() if line)


# ---- sampling: one control for each field of SamplingOptions ---------------------------------------------------------


def _sampling_controls(chosen: Mapping[str, Any], defaults: Mapping[str, Any], place: str) -> dict[str, Any]:
    """What differs from the model's defaults. Raises `TorchchatError` for a text that is no value."""
    found: dict[str, Any] = {}
    columns = st.columns(2)
    for number, name in enumerate(SAMPLING):
        default = defaults.get(name, getattr(SamplingOptions(), name))
        with columns[number % 2]:
            value = _sampling_control(name, chosen.get(name, default), f"{name}-{place}")
        if value != default:
            found[name] = value
    return found


def _sampling_control(name: str, value: Any, key: str) -> Any:
    declared = SAMPLING[name]
    detail = detail_of(declared)
    kind: Any = value_type(SamplingOptions, name)
    label = LABELS.get(name, name.replace("_", " ").capitalize())
    known = f"{detail.help[0].upper()}{detail.help[1:]}" + (f" [{detail.range}]" if detail.range else "")
    if issubclass(kind, Mapping):
        return _bias(st.text_area(label, value="\n".join(f"{token}={bias:g}" for token, bias in value.items()), key=key,
                                  height=80, placeholder="42=-5", help=f"{known}; one a line"))
    if declared.default is None or (detail.maximum or 0) > MOST_EXACT:
        text = st.text_input(label, value="" if value is None else str(value), key=key, help=known,
                             placeholder="by chance" if declared.default is None else None)
        return from_text(SamplingOptions, name, text.strip() if text and text.strip() else "none")
    low = detail.minimum if detail.minimum is not None else detail.above
    step = STEPS[kind]
    if detail.above is not None:
        low = detail.above + step
    found = st.number_input(label, min_value=None if low is None else kind(low),
                            max_value=None if detail.maximum is None else kind(detail.maximum),
                            value=kind(max(value, low) if low is not None else value), step=step, key=key, help=known,
                            format="%d" if kind is int else "%g")
    return kind(found) if found is not None else value


def _bias(text: str | None) -> dict[int, float]:
    found = {}
    for line in (text or "").split():
        token, _, bias = line.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError:
            raise TorchchatError(f"a line of the logit bias is {quoted(line)}; it has to be TOKEN=BIAS, such as 42=-5"
                                 ) from None
    return found
