"""What one rendering of a chat template may use: processor time, and the size of the values that it makes.

Python cannot interrupt itself inside one call, so `template_sandbox` asks here before each step that could be long.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, KeysView, Mapping, MappingView, Set, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Cycler, Namespace

from torchchat_core.errors import TorchchatError, quoted

SECONDS = 1.0  # of processor time for one rendering
LONGEST_TEXT = 1_000_000
LONGEST_LIST = 20_000
LARGEST_TOTAL = 64_000_000  # characters, and 8 for each element of a list
ELEMENT_SIZE = 76  # of an element that is made together with its list, such as a character
LARGEST_WIDTH = 999  # of padding, indentation and the like
LARGEST_INTEGER_BITS = 4_096
DEEPEST = 200  # lists in lists
STEPS_BETWEEN_LOOKS = 16  # at the clock
processor_time = time.thread_time  # in seconds; tests replace it with a counter

LARGEST_SEARCH = 100_000_000  # characters compared by one search, about 0.1 s
WIDE_PERCENT_PLACE = re.compile(r"[-+ #0]*(?:\d{4}|\*|\d*\.(?:\d{4}|\*))")  # flags, width and precision of a place
PARENTHESES = re.compile(r"[()]")
WIDE_BRACE_PLACE = re.compile(r"\d{4}|\{")  # in the part of a place that follows its colon
ELEMENT_LENGTH = 4  # what an element of a list takes at the least when written out, with what parts it from others
CONTAINERS = (list, tuple, Mapping, Set, MappingView)
ITERABLES_OF_NEW = (str, range, MappingView)  # their elements are made by the iteration


class Budget:
    """What one rendering may still use. `given` is the size of what the caller gives to the template.

    Every method raises `TorchchatError` where a limit is reached.
    """

    def __init__(self, given: int = 0) -> None:
        self.longest_text = LONGEST_TEXT + 8 * given
        self.longest_list = LONGEST_LIST + given
        self._largest_search = LARGEST_SEARCH + 64 * given
        self._left = LARGEST_TOTAL + 64 * given
        self._deadline = processor_time() + SECONDS
        self._steps = 0

    def step(self, count: int = 1) -> None:
        """Counts steps, and looks at the clock now and then."""
        self._steps += count
        if self._steps >= STEPS_BETWEEN_LOOKS:
            self._steps = 0
            if processor_time() > self._deadline:
                raise stopped(f"it ran for more than {SECONDS:g} s of processor time")

    def need_text(self, length: int) -> None:
        """Asks for a text of that length."""
        if length > self.longest_text:
            raise stopped(f"it makes a text of more than {self.longest_text} characters")

    def need_list(self, length: int) -> None:
        """Asks for a list of that length."""
        if length > self.longest_list:
            raise stopped(f"it makes a list of more than {self.longest_list} elements")

    def need_search(self, length: int, sought: int) -> None:
        """Charge a search for `sought` characters in a text of `length`, which takes time in proportion to both."""
        if length * sought > self._largest_search:
            raise stopped(f"it searches for {sought} characters in a text of {length}")
        self.step(length * sought // 4096)

    def charge(self, value: Any) -> Any:
        """Charge a value that was made, and return it. A lazy value is charged while it is consumed."""
        if isinstance(value, str):
            self.need_text(len(value))
            self._left -= len(value)
        elif isinstance(value, CONTAINERS):
            self.need_list(len(value))
            self._left -= 8 * len(value)
            if isinstance(value, tuple):  # may be hashed, which looks into tuples without end
                self.bounded(value)
        elif isinstance(value, int):
            self.check_bits(value.bit_length())
        elif _is_lazy(value):
            return self.counted(value)
        if self._left < 0:
            raise stopped("it makes too many large values")
        return value

    def charge_elements(self, count: int) -> None:
        """Charge elements of a list that were made together with it."""
        self._left -= ELEMENT_SIZE * count
        if self._left < 0:
            raise stopped("it makes too many large values")

    def bounded(self, *values: Any) -> int:
        """The size of values that are about to be written out, compared or hashed."""
        size = sum(measure(value, self.longest_text) for value in values)
        self.step(size // 64)
        self.need_text(size)
        return size

    def concatenated(self, parts: Iterable[str]) -> str:
        """The parts as one text, stopped as soon as it is too long."""
        length = 0
        kept = []
        for part in parts:
            self.step()
            length += len(part)
            self.need_text(length)
            kept.append(part)
        return str(self.charge("".join(kept)))

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """Yield the values; each is a step."""
        for value in values:
            self.step()
            yield value

    def collected(self, values: Any) -> Any:
        """Return a lazy value as a list, so that it can be measured; other values unchanged."""
        return list(self.counted(values)) if _is_lazy(values) else values

    def joinable(self, values: Iterable[Any], separator: str) -> list[Any]:
        """Return `values` as a list, and check the size of its elements joined with `separator`."""
        kept = list(self.counted(values))
        self.need_text(self.bounded(kept) + len(kept) * len(separator))
        return kept

    def check_product(self, left: Any, right: Any) -> None:
        """Asks for `left * right`."""
        if isinstance(left, int) and isinstance(right, int):
            self.check_bits(left.bit_length() + right.bit_length())
            return
        repeated, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(times, int):
            if isinstance(repeated, str):
                self.need_text(len(repeated) * times)
            elif isinstance(repeated, list | tuple):
                self.need_list(len(repeated) * times)

    def check_bits(self, bits: int) -> None:
        """Asks for a whole number of so many bits."""
        if bits > LARGEST_INTEGER_BITS:
            raise stopped(f"it makes a number of more than {LARGEST_INTEGER_BITS} bits")

    def check_replacement(self, text: str, old: object, new: object) -> None:
        """Asks for `text.replace(old, new)`."""
        if isinstance(old, str) and isinstance(new, str):
            self.need_text(len(text) + (text.count(old) if old else len(text) + 1) * len(new))

    def check_format(self, text: str, values: Iterable[Any], is_wide: bool) -> None:
        """Asks for a formatted text, in which any place may hold all values or be padded."""
        if is_wide:
            raise stopped(f"the format {quoted(text)} is too wide")
        places = text.count("{") + text.count("%")
        self.need_text(len(text) + places * (LARGEST_WIDTH + self.bounded(*values)))

    def check_percent_format(self, text: str, values: Iterable[Any]) -> None:
        """Check the size of `text % values`."""
        self.check_format(text, values, self._pads_widely(text))

    def check_brace_format(self, text: str, values: Iterable[Any]) -> None:
        """Ask for `text.format(...)` with these values. Raises `ValueError` for a text that is no format."""
        is_wide = False
        for _, _, width, _ in Formatter().parse(text):
            self.step()
            is_wide = is_wide or (width is not None and WIDE_BRACE_PLACE.search(width) is not None)
        self.check_format(text, values, is_wide)

    def _pads_widely(self, text: str) -> bool:
        """Return True if a field of a `%` format has a width or precision of four digits or from an argument."""
        at = text.find("%")
        while at >= 0:
            self.step()
            at += 1
            if text.startswith("(", at):
                at = _end_of_key(text, at)
            if WIDE_PERCENT_PLACE.match(text, at):
                return True
            at = text.find("%", at + text.startswith("%", at))
        return False

    def check_width(self, what: str, values: Iterable[Any]) -> None:
        """Asks for padding, indentation or digits by each of the values that is a whole number."""
        largest = max((abs(value) for value in values if isinstance(value, int)), default=0)
        if largest > LARGEST_WIDTH:
            raise stopped(f"{what} is given a number above {LARGEST_WIDTH}")


_budget: ContextVar[Budget] = ContextVar("budget")
budget = _budget.get  # that of the rendering in progress


@contextmanager
def limited(given: int = 0) -> Iterator[None]:
    """Has everything that templates do inside counted on one new budget."""
    token = _budget.set(Budget(given))
    try:
        yield
    finally:
        _budget.reset(token)


class TemplateStoppedError(TorchchatError):
    """A template exceeded a limit: it took too much time or memory, or accessed something that is not allowed."""


def stopped(reason: str) -> TemplateStoppedError:
    """Return the error for a template that exceeded a limit."""
    return TemplateStoppedError(f"the chat template was stopped: {reason}",
                                "download the model from its original author, whose template works")


def _end_of_key(text: str, start: int) -> int:
    """Return the index after the parenthesis that closes the one at `start`, or the end of the text if none does."""
    depth = 0
    for found in PARENTHESES.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _is_lazy(value: object) -> bool:
    """Return True for an iterator, except for the variable `loop`."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def measure(value: Any, limit: int) -> int:
    """About how many characters `value` has when written out; counting ends above `limit`.

    A list that holds another one twice counts it twice. Raises `TorchchatError` for values nested too deeply.
    """
    size = 0
    level = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for part in level:
            if isinstance(part, str):
                size += len(part)
            else:
                inside = _inside(part)
                size += ELEMENT_LENGTH * len(inside)
                if size > limit:
                    return size
                below += inside
        if not below:
            return size
        level = below
    raise stopped(f"it nests lists more than {DEEPEST} deep")


def _inside(value: Any) -> Collection[Any]:
    if isinstance(value, list | tuple | Set | KeysView | ValuesView):
        return value
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, Namespace):  # which hides its own attributes
        return list(object.__getattribute__(value, "_Namespace__attrs").values())
    if isinstance(value, Cycler):  # attributes that a format, or the name of an attribute in a filter, can reach
        return value.items
    if isinstance(value, LoopContext):
        return [value.previtem, value.nextitem]
    return ()
