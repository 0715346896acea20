"""Speed and quality of the ways to run a model, measured here and drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime

import streamlit as st

from tc_streamlit_chat.choices import base_name, choices, offered, short_name
from tc_streamlit_chat.configuration import Configuration
from tc_streamlit_chat.jobs import GivenUp
from tc_streamlit_chat.local import LocalModels
from tc_streamlit_chat.markdown import plain
from tc_streamlit_chat.pages import frame
from tc_streamlit_chat.pages.compare import watch
from tc_streamlit_chat.services import Services
from torchchat_core.errors import TorchchatError
from torchchat_core.pipeline import DEFAULT_MODEL, ModelRequest
from torchchat_core.plugins import Registry

PLACE = "measure"  # of the one job: measurements belong to the machine
KINDS = {"speed": "Speed", "quality": "Quality"}
EXPLAINED = {
    "speed": "How fast each way to run the model decodes and reads a prompt, and the memory that it takes: "
             "torchchat bench.",
    "quality": "What each recipe costs and gains: perplexity, divergence from the model as it is, bytes, speed: "
               "torchchat quantize \\-\\-report.",
}
AS_IS = "as the model is"
SEEN = "seen_measurement"  # the one that was shown when it was done
SHOWN = "measurement"  # the one that is shown
USUAL = ("linear:int8", "linear:int4")  # recipes that are measured unless others are chosen
HEIGHT = 760  # pixels of a drawn page


@frame.guarded
def page() -> None:
    """The whole page."""
    services = frame.services()
    with st.container(key="wide"):
        st.markdown("#### Measure", anchors=False)
        if not isinstance(services.models, LocalModels):
            st.info("Models of a server elsewhere are not measured here: torchchat bench measures those that run on "
                    "this machine.", icon=":material/info:")
        else:
            _new(services, services.models)
        _kept(services)


# ---- a new one -----------------------------------------------------------------------------------------------------


def _new(services: Services, models: LocalModels) -> None:
    job = services.jobs.at(PLACE)
    running = job is not None and not job.done.is_set()
    kind = st.segmented_control("What is measured", list(KINDS), default="speed", required=True, key="kind",
                                format_func=lambda name: KINDS[name], label_visibility="collapsed") or "speed"
    st.caption(EXPLAINED[kind])
    names = [base_name(services), *(each.model for each in choices.models(services)
                                    if each.here and each.model != base_name(services))]
    model = st.selectbox("Model", names, key="measured-model", format_func=short_name)
    configuration = Configuration(model=None if model == base_name(services) else model)
    request = configuration.request(models.base)
    fit = choices.fitting(services, request)
    recipes = [recipe or AS_IS for recipe in fit.recipes]
    if kind == "speed":
        left, right = st.columns(2)
        executors = left.multiselect("Executors", fit.executors, default=fit.executors[:1],
                                     key=f"measured-executors-{model}")
        chosen = right.multiselect("Recipes", recipes, default=recipes[:1], key=f"measured-recipes-{model}")
        offered(executors, fit.executors)
        work = speed(request, executors, [None if each == AS_IS else each for each in chosen], models.registry)
        ready = bool(executors and chosen)
    else:
        quantised = recipes[1:]
        usual = [each for each in USUAL if each in quantised] or quantised[:2]
        chosen = st.multiselect("Recipes", quantised, default=usual, key=f"compared-recipes-{model}")
        work, ready = quality(request, chosen, models.registry), bool(chosen)
        if not quantised:
            st.caption("Nothing that is installed makes this model smaller.")
    offered([model], names)
    offered(chosen, recipes)
    if st.button("Measure", type="primary", icon=":material/speed:", key="measure-now", disabled=running or not ready):
        title = f"{KINDS[kind]} of {short_name(str(model))}"

        def kept(given_up: Callable[[], bool]) -> int:
            return services.store.add_measurement(kind, title, work(given_up))

        services.jobs.start(PLACE, title, kept)
        st.rerun()
    if job is not None and running:
        st.caption(plain(job.title))
        watch(job)
    elif job is not None and job.error is not None:
        frame.show_error(job.error)
    elif job is not None and job.result is not None and st.session_state.get(SEEN) != job.result:
        st.session_state[SEEN] = st.session_state[SHOWN] = job.result


def speed(request: ModelRequest, executors: Sequence[str], recipes: Sequence[str | None], registry: Registry
          ) -> Callable[..., str]:
    """What a job does to measure each executor with each recipe; it gives a page."""

    def work(given_up: Callable[[], bool]) -> str:
        from torchchat_core.measure.benchmark import Failed, Way, measure_way
        from torchchat_core.measure.benchmark_plot import html_page
        from torchchat_core.progress import task

        wanted = [Way(executor=executor, recipe=recipe,
                      request=Configuration(executor=executor, quantize=recipe or "").request(request))
                  for recipe in recipes for executor in executors]
        rows, failed = [], []
        for number, way in enumerate(wanted):
            if given_up():
                break
            with task(f"{way.executor}, {way.recipe or AS_IS}", total=len(wanted)) as measured:
                measured.advance(number)
                try:
                    rows.append(measure_way(way, registry))
                except TorchchatError as error:
                    failed.append(Failed(executor=way.executor, recipe=way.recipe, reason=error.message, fix=error.fix))
        if not rows:
            raise TorchchatError(failed[0].reason, failed[0].fix) if failed else GivenUp
        return html_page(short_name(request.model or request.checkpoint_path or DEFAULT_MODEL), rows, failed)

    return work


def quality(request: ModelRequest, recipes: Sequence[str], registry: Registry) -> Callable[..., str]:
    """What a job does to measure the recipes beside the model as it is; it gives a page."""

    def work(_: Callable[[], bool]) -> str:
        from torchchat_core.measure.comparing import candidate, compare
        from torchchat_core.measure.page import html_page
        from torchchat_core.measure.text import measured_text

        plain_request = Configuration(quantize="").request(request)
        wanted = [candidate(recipe, plain_request, registry) for recipe in recipes]
        return html_page(compare(plain_request, wanted, registry, measured_text()))

    return work


# ---- those that were made ------------------------------------------------------------------------------------------


def _kept(services: Services) -> None:
    found = services.store.measurements()
    if not found:
        st.caption("What is measured stays here, with its plots.")
        return
    st.divider()
    labels = {each.id: f"{each.title}, {datetime.fromtimestamp(each.created):%Y-%m-%d %H:%M}" for each in found}
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.selectbox("Measurements", list(labels), format_func=lambda each: labels.get(each, ""), key=SHOWN)
        content = services.store.page(chosen) if chosen is not None else None
        if chosen is None or content is None:
            return
        name = re.sub(r"[^\w-]+", "-", labels[chosen], flags=re.ASCII).lower()
        st.download_button("Save", content, f"{name}.html", "text/html", icon=":material/download:", on_click="ignore",
                           key="download-measurement", help="The page as a file that needs nothing else")
        if services.private and st.button("Delete", icon=":material/delete:", key="delete-measurement",
                                          help="Delete this measurement"):
            _delete(services, chosen, labels[chosen])
    st.iframe(content, height=HEIGHT)



@st.dialog("Delete this measurement?")
@frame.guarded
def _delete(services: Services, measurement: int, label: str) -> None:
    st.text(label)
    with st.container(horizontal=True, horizontal_alignment="right"):
        if st.button("Keep it", key="keep-measurement"):
            st.rerun()
        if st.button("Delete", type="primary", icon=":material/delete:", key="delete-measurement-now"):
            services.store.delete_measurement(measurement)
            st.rerun()
