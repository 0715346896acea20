"""Templates that loop, grow or pry end in an error, soon and without filling the memory."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest

from torchchat_core import template_limits
from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
GROWING = "{{% set ns = namespace(s='aaaaaaaaaa') %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ ns.s | length }}}}"

LISTING = ("{{% set ns = namespace(g=[]) %}}{{% set s = '\u4e2d' * 19000 %}}{{% set words = '\u4e2d ' * 19000 %}}"
           "{{% set lines = '\u4e2d\n' * 19000 %}}{{% for i in range(2000) %}}"
           "{{% set ns.g = [ns.g, {}] %}}{{% endfor %}}")


def tower(use: str, bottom: str = "['x']", storey: str = "[ns.a, ns.a]") -> str:
    """A template that makes a value of 60 storeys, each of which holds the one below twice, and uses it."""
    return ("{% set ns = namespace(a=" + bottom + ") %}{% for i in range(60) %}{% set ns.a = " + storey
            + " %}{% endfor %}" + use)


ENDLESS = {
    "rounding to the left": "{{ 5 | round(-99999999) }}",
    "nested loops": "{% for i in range(9999) %}" * 6 + "{% endfor %}" * 6,
    "long bodies": "{% for i in range(9999) %}" * 4 + "{% set x = i %}" * 4000 + "{% endfor %}" * 4,
    "macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "branching macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1], [2]]) }}{% endfor %}",
    "tests": "{% for i in range(9999) %}" * 5 + "{% if i is divisibleby 3 %}{% endif %}" + "{% endfor %}" * 5,
    "generators": "{% set ns = namespace(g=[1]) %}{% for i in range(20000) %}{% set ns.g = ns.g | map('string') %}"
                  "{% endfor %}{{ ns.g | list }}",
}
LARGE = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "output": "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "constant product": "{{ 10000000000 * 'a' }}",
    "list": "{{ ([0] * 1000000000) | length }}",
    "power": "{{ 9999999 ** 9999999 }}",
    "powers of powers": "{{ 10 ** (10 ** 10) }}",
    "float power": "{{ 10.0 ** 100000 }}",
    "joined by ~": GROWING.format("{% set ns.s = ns.s ~ ns.s %}"),
    "joined by +": GROWING.format("{% set ns.s = ns.s + ns.s %}"),
    "block": GROWING.format("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "replace": GROWING.format("{% set ns.s = ns.s.replace('a', 'aaaaaaa') %}"),
    "replace filter": GROWING.format("{% set ns.s = ns.s | replace('a', 'aaaaaaa') %}"),
    "join": "{{ ('a' * 100000).join(['a'] * 10000) }}",
    "join filter": "{{ (['a' * 100000] * 10000) | join }}",
    "join of a generator": "{{ range(20000) | map('replace', '0', 'a' * 100000) | join }}",
    "padding": "{{ 'a'.center(10000000000) }}",
    "padding filter": "{{ 'a' | center(10000000000) }}",
    "percent format": "{{ '%10000000000d' % 1 }}",
    "percent format with a star": "{{ '%*d' % (10000000000, 1) }}",
    "percent format filter": "{{ '%10000000000d' | format(1) }}",
    "brace format": "{{ '{:10000000000}'.format(1) }}",
    "nested brace format": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format of many places": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "characters": LISTING.format("s | list"),
    "split lines": LISTING.format("lines.splitlines()"),
    "split words": LISTING.format("words.split(' ')"),
    "split from the right": LISTING.format("words.rsplit(' ')"),
    "sorted characters": LISTING.format("s | sort"),
    "numbers": LISTING.format("range(19000) | list"),
    "indent": "{{ ('\n' * 100000) | indent(999) }}",
    "indented JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "deep JSON": "{% set ns = namespace(a=[1] * 20000) %}{% for i in range(150) %}{% set ns.a = [ns.a] %}{% endfor %}"
                 "{{ ns.a | tojson(indent=16) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "date": "{{ strftime_now('%999999999d') }}",
    "split": "{{ ('a ' * 400000).split(' ') | length }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "kept texts": "{% set ns = namespace(l=[]) %}{% for i in range(20000) %}{% set ns.l = ns.l + ['a' * 1000000] %}"
                  "{% endfor %}",
    "kept slices": "{% set ns = namespace(l=[]) %}{% set b = range(20000) | list %}{% for i in range(20000) %}"
                   "{% set ns.l = ns.l + [b[:]] %}{% endfor %}",
    "kept by map": "{{ (['a' * 1000000] * 20000) | map('upper') | list | length }}",
    "sorting copies": "{{ (['a' * 1000000] * 20000) | sort }}",
    "tower": tower("{{ ns.a }}"),
    "tower as text": tower("{{ ns.a | string }}"),
    "tower as JSON": tower("{{ ns.a | tojson }}"),
    "tower in a namespace": tower("{{ ns }}"),
    "tower compared": tower("{{ ns.a == 1 }}"),
    "tower of dictionaries": tower("{{ ns.a.items() }}", "{'x': 1}", "{'a': ns.a, 'b': ns.a}"),
    "tower hashed": tower("{{ {ns.a: 1} }}", "('x',)", "(ns.a, ns.a)"),
    "deep tuple": "{% set ns = namespace(g=(1,)) %}{% for i in range(20000) %}{% set ns.g = (ns.g,) %}{% endfor %}",
    "deep list": "{% set ns = namespace(g=[1]) %}{% for i in range(20000) %}{% set ns.g = [ns.g] %}{% endfor %}"
                 "{{ ns.g }}",
}
PRYING = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by filter": "{{ messages | attr('__class__') }}",
    "class by map": "{{ messages | map(attribute='__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format(1) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "module": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "frame": "{{ self._TemplateReference__context }}",
    "change": "{% set _ = messages.append(1) %}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}
UNCOMPILABLE = {
    "too long": "x" * 100_000,
    "brackets": "{{ " + "(" * 20_000 + " }}",
    "blocks": "{% for x in y %}" * 50 + "{% endfor %}" * 50,
    "digits": "{{ " + "9" * 5000 + " }}",
    "unclosed": "{% for x in y %}",
}


def outcome(source: str) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(MESSAGES)


@pytest.fixture
def counted_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock by a millisecond at each reading, so that the time limit is a number of steps."""
    looks = itertools.count()
    monkeypatch.setattr(template_limits, "processor_time", lambda: next(looks) / 1000)


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_run_for_ever_are_stopped(name: str, counted_time: None, monkeypatch: pytest.MonkeyPatch
                                                 ) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    with pytest.raises(TorchchatError, match="the chat template was stopped"):
        outcome(ENDLESS[name])


def test_the_time_limit_is_one_of_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.05)
    with pytest.raises(TorchchatError, match=r"stopped: it ran for more than 0\.05 s of processor time"):
        outcome(ENDLESS["nested loops"])


@pytest.mark.parametrize("name", LARGE)
def test_templates_that_make_large_values_are_stopped(name: str, counted_time: None) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TorchchatError, match="the chat template"):
            outcome(LARGE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6


@pytest.mark.parametrize("name", PRYING)
def test_templates_that_reach_for_attributes_are_stopped(name: str) -> None:
    with pytest.raises(TorchchatError, match="the chat template"):
        outcome(PRYING[name])


@pytest.mark.parametrize("name", UNCOMPILABLE)
def test_templates_that_cannot_be_compiled_are_refused(name: str) -> None:
    with pytest.raises(TorchchatError, match="the chat template"):
        outcome(UNCOMPILABLE[name])


def test_a_long_conversation_is_within_the_limits(counted_time: None) -> None:
    source = ("{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all ~ m.role %}"
              "{{ m.content | trim | replace('\n', ' ') ~ m.content.split('a')[0] }}{% endfor %}"
              "{{ messages | tojson }}")
    messages = [{"role": "user", "content": "a long text\n" * 1000} for _ in range(200)]
    text = ChatTemplate(source, bos_token=None, eos_token=None).render(messages)
    assert len(text) > 4_000_000
