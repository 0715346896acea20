"""What models write is shown as it was meant, and nothing in it does anything."""

from __future__ import annotations

import pytest

from tc_streamlit_chat.markdown import plain, shown


@pytest.mark.parametrize(("text", "expected"), [
    ("It costs $5 and $6.", r"It costs \$5 and \$6."),
    ("from $5 to 6$", r"from \$5 to 6\$"),
    ("the formula $x^2$ holds", "the formula $x^2$ holds"),
    ("$$\\sum_i x_i$$", "$$\n\\sum_i x_i\n$$"),
    (r"so \(a+b\) and \[c\]", "so $a+b$ and \n\n$$\nc\n$$"),
    (r"so \[ x^2 \] holds", "so \n\n$$\nx^2\n$$\n\n holds"),
    ("so $$ x $$ holds", "so \n\n$$\nx\n$$\n\n holds"),
    ("\\[\n  x\n\n  + y\n\\]\nthen", "$$\nx\n+ y\n$$\nthen"),
    ("- first \\[ x \\]\n- second", "- first \n\n  $$\n  x\n  $$\n- second"),
    ("1. \\[ x \\]", "1. $$\n   x\n   $$"),
    ("   \\[\n   x\n   \\]", "   $$\n   x\n   $$"),
    ("> \\[ x \\]", "> $$\n> x\n> $$"),
    ("| a | \\[ x \\] |", "| a | $x$ |"),
    ("$$ still being written", r"\$\$ still being written"),
    ("`$$ x $$`", "`$$ x $$`"),
    ("![a cat](https://example.org/cat.png)", "[a cat](https://example.org/cat.png)"),
    ("![](https://example.org/cat_(1).png 'title')", "[https://example.org/cat_(1).png](https://example.org/cat_(1).png)"),
    ("[![build](https://example.org/b.svg)](https://example.org)", "[build](https://example.org)"),
    ("![a cat][1]", r"\![a cat][1]"),
    ("`![a](b)` and hello![1]", "`![a](b)` and hello\\![1]"),
    (":red[hot] and :material/home: and :+1:", "\\:red[hot] and :\u2060material/home: and :\u2060+1:"),
    ("<https://example.org/?b=$c> and https://example.org/$d",
     "<https://example.org/?b=%24c> and https://example.org/%24d"),
    ("at 10:30:45, see https://example.org", "at 10:30:45, see https://example.org"),
    ("`cost = $5` and `:red[x]`", "`cost = $5` and `:red[x]`"),
    ("```sh\necho $HOME $PATH\n```\nthen $5", "```sh\necho $HOME $PATH\n```\nthen \\$5"),
    ("```\nstill being written $HOME", "```\nstill being written $HOME"),
    ("<think>a < b, *c*</think> `<b>`", r"\<think>a < b, *c*\</think> `<b>`"),
    ("an escaped \\$ stays", "an escaped \\$ stays"),
], ids=str)
def test_an_answer_as_markdown(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_a_label_has_no_meaning() -> None:
    assert plain("*a* <b> [c](d)\n$e$ :red[f]") == \
        "\\*a\\* \\<b\\> \\[c\\]\\(d\\)  \n\\$e\\$ \\:red\\[f\\]"
    assert plain(":smile: a -> b") == "\\:\u2060smile\\: a \\-\u2060\\> b"
