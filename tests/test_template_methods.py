"""Methods, attributes, filters and tests of templates are guarded: none of them escapes the limits.

Two lists that hold the one below twice, 60 times, are small in memory; comparing, hashing or writing them out has no
end. Each template here ran without end, or took gigabytes, before its guard was there.
"""

from __future__ import annotations

import pytest

from torchchat_core.chat_template import ChatTemplate
from torchchat_core.errors import TorchchatError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "x"}]
TOWERS = ("{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
          "{% set ns.b = [ns.b, ns.b] %}{% endfor %}")
TUPLES = ("{% set ns = namespace(a=('x',)) %}{% macro m() %}{% set ns.a = varargs %}{% endmacro %}"
          "{% for i in range(60) %}{% set _ = m(ns.a, ns.a) %}{% endfor %}")
LONG = "{% set long = 'a' * 1000000 %}{% set sought = 'ab' + 'a' * 500000 %}"

ESCAPES = {
    "index of a list": TOWERS + "{{ [ns.b].index(ns.a) }}",
    "count of a list": TOWERS + "{{ [ns.b].count(ns.a) }}",
    "index of a tuple": TOWERS + "{{ (ns.b,).index(ns.a) }}",
    "error of index": TOWERS + "{{ [].index(ns.a) }}",
    "isdisjoint": TOWERS + "{{ {'k': ns.a}.items().isdisjoint({'k': ns.b}.items()) }}",
    "difference of items": TUPLES + "{{ ({'k': ns.a}.items() - {'k': 1}.items()) | length }}",
    "sort of a generator": TOWERS + "{{ [ns.a, ns.b] | map('default', 0) | sort }}",
    "maximum of a generator": TOWERS + "{{ [ns.a, ns.b] | map('default', 0) | max }}",
    "groups of a generator": TOWERS + "{{ [{'k': ns.a}, {'k': ns.b}] | map('default') | groupby('k') }}",
    "unique in a generator": TUPLES + "{{ [{'k': ns.a}] | map(attribute='k') | unique | list }}",
    "in a generator": TOWERS + "{{ ns.b in [ns.a] | map('default', 0) }}",
    "is in a generator": TOWERS + "{{ ns.b is in([ns.a] | map('default', 0)) }}",
    "key of a dictionary": TUPLES + "{{ {ns.a: 1} }}",
    "key that is looked up": TUPLES + "{{ {1: 1}[ns.a] }}",
    "key that is got": TUPLES + "{{ {1: 1}.get(ns.a) }}",
    "name of a filter": TUPLES + "{{ ns.a is filter }}",
    "keyword arguments": "{% set ns = namespace(a=1) %}{% macro m() %}{% set ns.a = kwargs %}{% endmacro %}"
                         "{% for i in range(60) %}{% set _ = m(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a is lower }}",
    "items of a cycler": "{% set ns = namespace(a=('x',)) %}{% for i in range(60) %}"
                         "{% set ns.a = cycler(ns.a, ns.a).items %}{% endfor %}{{ {1: 2}[ns.a].x }}",
    "refusal": TOWERS + "{{ raise_exception(ns.a) }}",
    "element of a loop that a format names": TOWERS + "{% for a in [ns.a, 1] %}{{ '{0.previtem}'.format(loop) }}"
                                             "{{ '{0.nextitem}'.format(loop) }}{% endfor %}",
    "next element of a loop that a format names": TOWERS + "{% for a in [1, ns.a] %}{{ '{0.nextitem}'.format(loop) }}"
                                                  "{% endfor %}",
    "item of a cycler that a format names": TOWERS + "{{ '{c.current}'.format_map({'c': cycler(ns.a)}) }}",
    "joined items of cyclers": TOWERS + "{{ [cycler(ns.a)] | join(',', attribute='current') }}",
    "cyclers sorted by their items": TOWERS + "{{ [cycler(ns.a), cycler(ns.b)] | sort(attribute='current') }}",
    "cyclers grouped by their items": TOWERS + "{{ [cycler(ns.a), cycler(ns.b)] | groupby('current') }}",
    "width after a brace in brackets": "{{ '{0[}]:>9999999}'.format({'}': 1}) | length }}",
    "width from an argument after a brace in brackets": "{{ '{0[}]:{1}}'.format({'}': 1}, 9999999) | length }}",
    "error of an index": TOWERS + "{{ [1][ns.a].x }}",
    "is lower": TOWERS + "{{ ns.a is lower }}",
    "selected as upper": TOWERS + "{{ [ns.a] | select('upper') | list }}",
    "even text": "{{ '%9999999999d' is even }}",
    "divisible text": "{{ '%9999999999d' is divisibleby 3 }}",
    "rounded text": "{{ 'a' | round(10, 'ceil') }}",
    "rounded list": "{{ [0] | round(10, 'floor') }}",
    "format with a key": "{{ '%(a)9999999999d' % {'a': 1} }}",
    "format with brackets in its key": "{{ '%((a))9999999999d' % {'(a)': 1} }}",
    "rfind": LONG + "{{ long.rfind(sought) }}",
    "rsplit": LONG + "{{ long.rsplit(sought) | length }}",
    "rsplit by keyword": LONG + "{{ long.rsplit(sep=sought) | length }}",
    "rpartition": LONG + "{{ long.rpartition(sought) | length }}",
    "strip": "{{ ('a' * 1000000).strip('b' * 999999 + 'a') }}",
    "trim": "{{ ('a' * 990000) | trim('b' * 10000 + 'a') }}",
    "long integers": "{{ ('f' * 1000000) | int(0, 16) // 3 is number }}",
    "sum of lists": "{{ ([[0] * 10] * 20000) | sum(start=[]) | length }}",
    "attribute of many parts": "{{ ([1] * 20000) | map(attribute='.' * 900000, default=1) | list }}",
    "chain of generators": "{% set ns = namespace(g=[1] * 20000) %}{% for i in range(200) %}"
                           "{% set ns.g = ns.g | batch(1) %}{% endfor %}{% for i in range(99) %}"
                           "{% set x = ns.g | list %}{% set ns.g = x %}{% endfor %}{{ ns.g.a.b }}",
}
NOT_LISTED = {
    "center": "{{ 'a'.center(5) }}", "ljust": "{{ 'a'.ljust(5) }}", "rjust": "{{ 'a'.rjust(5) }}",
    "zfill": "{{ 'a'.zfill(5) }}", "expandtabs": "{{ 'a'.expandtabs(5) }}", "encode": "{{ 'a'.encode() }}",
    "translate": "{{ 'a'.translate({}) }}", "maketrans": "{{ 'a'.maketrans('a', 'b') }}",
    "append": "{{ [].append(1) }}", "pop": "{{ {}.pop(1, 2) }}", "update": "{{ {}.update({}) }}",
    "fromkeys": "{{ {}.fromkeys([1]) }}", "to_bytes": "{{ (1).to_bytes(5, 'big') }}", "hex": "{{ (1.0).hex() }}",
    "count of a range": "{{ range(3).count(1) }}", "index of a range": "{{ range(3).index(1) }}",
    "close of a generator": "{{ ([1] | map('default')).close() }}",
    "isdisjoint of keys": "{{ {}.keys().isdisjoint([]) }}", "mapping of keys": "{{ {}.keys().mapping.x }}",
    "unescape of markup": "{{ ('a' | e).unescape() }}", "getter of a property": "{{ cycler.current.fget(1) }}",
}
ALLOWED = {
    "{{ ['a', 'b'].index('b') }}{{ [1, 1].count(1) }}{{ 'abcabc'.rfind('c') }}": "125",
    "{{ 'tool' in messages | map(attribute='role') }}{{ 'x' is in(messages | map(attribute='role')) }}": "TrueFalse",
    "{{ messages | map(attribute='role') | sort | join(',') }}": "tool,user",
    "{{ messages | groupby('role') | map('first') | join(',') }}": "tool,user",
    "{{ [1, 2, 3] | sum }}{{ [1, 2] | sum(start=1) }}{{ [{'n': 1}] | sum('n') }}{{ [1, 3] | max }}": "6413",
    "{{ 3 is odd }}{{ 4 is divisibleby 2 }}{{ 1.26 | round(1) }}{{ 7 // 2 }}{{ 7 - 2 }}{{ 7 / 2 }}": "TrueTrue1.3353.5",
    "{{ 'in %(year)s (not 2024), 100%% of %d' % {'year': 1} if false else 'a %5d (2024) 100%%1234' % 7 }}":
        "a     7 (2024) 100%1234",
    "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{% endfor %}": "1TrueaTrue2FalsebTrueuser",
    "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{{ caller() }}{% endmacro %}{% call m(1, 2, b=3) %}c{% endcall %}":
        "1(2,){'b': 3}c",
    "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.current }}{% set j = joiner('-') %}{{ j() }}{{ j() }}": "12-",
    "{% set d = {'a': 1, 'b': 2} %}{{ d.get('a') }}{{ d.keys() | list }}{{ d.items() | list | length }}"
    "{{ (d.keys() - ['a']) | list }}": "1['a', 'b']2['b']",
    "{{ '  x-'.strip(' -') }}{{ 'a,b'.split(',') | last }}{{ '{} {a}'.format(1, a=2) }}{{ ' x ' | trim }}": "xb1 2x",
    "{{ 'x' if messages | selectattr('role', 'equalto', 'none') }}": "x",  # a generator is true, as in Jinja
}


def outcome(source: str) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(MESSAGES)


@pytest.mark.parametrize("name", ESCAPES)
def test_methods_and_filters_do_not_escape_the_limits(name: str) -> None:
    with pytest.raises(TorchchatError, match="the chat template") as raised:
        outcome(ESCAPES[name])
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("name", NOT_LISTED)
def test_attributes_that_are_not_listed_are_refused(name: str) -> None:
    with pytest.raises(TorchchatError, match=r"chat templates may not use|has no attribute|is undefined"):
        outcome(NOT_LISTED[name])


@pytest.mark.parametrize("source", ALLOWED)
def test_guarded_methods_and_filters_return_the_same_as_in_jinja(source: str) -> None:
    assert outcome(source) == ALLOWED[source]


@pytest.mark.parametrize("source", [
    "{{ raise_exception('b' * 900000) }}", "{{ {}['b' * 900000].x }}", "{{ [1] | map('b' * 900000) | list }}",
    "{{ strftime_now(**{'b' * 900000: 1}) }}", "{{ ('%' + 'b' * 900000) % 1 }}", "{% " + "b" * 60_000 + " %}",
])
def test_errors_of_templates_are_short(source: str) -> None:
    with pytest.raises(TorchchatError) as raised:
        outcome(source)
    assert len(str(raised.value)) < 500
