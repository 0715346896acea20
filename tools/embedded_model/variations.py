"""How different people ask the same question: other openings, other words, typing errors."""

from __future__ import annotations

import itertools
import random

HOW = (
    "how do I", "how can I", "how to", "how would I", "how do you", "how could I", "how should I",
    "how does one", "what is the way to", "tell me how to", "show me how to", "explain how to", "I want to",
    "I need to", "I would like to", "is there a way to", "what do I type to", "what do I do to",
    "what is the command to", "which command do I use to", "could you tell me how to", "I do not know how to",
    "help me to", "I'd like to", "what's the best way to", "please tell me how to", "can you show me how to",
    "I am trying to", "let me",
)
WHAT_IS = (
    "what is", "what's", "whats", "explain", "can you explain", "tell me about", "what exactly is",
    "please explain", "I do not understand", "could you tell me what is", "define",
)
CAN_I = (
    "can I", "could I", "is it possible to", "am I able to", "may I", "how can I", "is there a way to",
    "can one", "would I be able to",
)
CAN_YOU = (
    "can you", "could you", "would you", "are you able to", "will you", "please",
)
OPENINGS = (HOW, WHAT_IS, CAN_I, CAN_YOU)
ORDERS = frozenset((
    "add", "adjust", "ask", "begin", "bench", "benchmark", "build", "calibrate", "change", "chat", "check",
    "choose", "clean", "clear", "close", "compare", "compile", "complete", "compress", "connect", "constrain",
    "continue", "convert", "create", "delete", "deploy", "disable", "download", "embed", "end", "erase",
    "evaluate", "export", "expose", "feed", "fetch", "find", "fix", "force", "generate", "get", "give",
    "host", "inspect", "install", "keep", "limit", "link", "list", "load", "make", "measure", "merge", "open",
    "pass", "pick", "pin", "print", "produce", "profile", "pull", "put", "quantise", "quantize", "record",
    "redirect", "remember", "remove", "reproduce", "restore", "resume", "run", "sample", "save", "score",
    "see", "select", "serve", "set", "shrink", "start", "stop", "store", "switch", "test", "trace", "turn",
    "uninstall", "update", "upgrade", "use", "verify", "wipe", "write",
))
BEFORE = (
    "please", "hi,", "hello,", "hey,", "ok,", "and", "so", "one question:", "now", "quick question:", "also,",
    "sorry,", "another question:", "then", "next:", "um,", "one more thing:", "hey torchchat,", "well,",
    "but",
)
AFTER = (
    "please", "now", "here", "exactly", "then", "again", "for me", "thanks", "quickly", "in short",
)
AFTER_HOW = (
    "with torchchat", "in torchchat", "using torchchat", "on my machine", "from the command line",
    "with this tool", "on my computer", "today",
)
SAME = (
    ("quantise", "quantize"), ("quantised", "quantized"), ("quantising", "quantizing"),
    ("quantisation", "quantization"), ("show", "display", "print", "see", "view"),
    ("delete", "remove", "erase"), ("folder", "directory"), ("make", "create", "build", "produce"),
    ("get", "obtain"), ("fast", "quick"), ("answer", "reply", "response"),
    ("answers", "replies", "responses"), ("conversation", "chat", "dialogue"),
    ("phone", "smartphone", "mobile phone"), ("computer", "machine", "pc", "laptop"), ("big", "large"),
    ("small", "little", "tiny"), ("picture", "image", "photo"),
    ("set", "change", "choose", "specify", "select"), ("need", "require"), ("use", "apply"),
    ("run", "start", "launch", "execute"), ("write", "make"), ("model", "llm", "language model"),
    ("which", "what"), ("several", "many", "multiple"), ("error", "failure"), ("difference", "distinction"),
    ("begin", "start"), ("stop", "end"), ("convert", "turn", "transform"), ("compare", "contrast"),
    ("available", "there"), ("supported", "possible"), ("speed", "performance"), ("memory", "ram"),
    ("disk", "drive", "hard disk"), ("internet", "network"), ("file", "document"), ("check", "test"),
    ("measure", "determine"), ("find", "locate"), ("website", "web page"), ("text", "words"),
    ("option", "flag", "parameter"), ("settings", "options", "preferences"),
    ("program", "application", "app"), ("license", "licence"), ("favourite", "favorite"), ("colour", "color"),
    ("good", "nice"), ("bad", "poor"), ("a", "the", "my", "one"), ("mean", "stand for"),
    ("everything", "all"), ("explain", "describe"), ("install", "set up"), ("fetch", "download", "get"),
    ("quit", "leave", "exit"), ("store", "keep", "save"), ("select", "choose", "pick"), ("kind", "sort", "type"),
    ("prompt", "input"), ("output", "result", "text"), ("slow", "sluggish"), ("faster", "quicker", "speedier"),
    ("smaller", "tinier"), ("bigger", "larger"), ("random", "arbitrary"), ("limit", "restrict", "cap"),
    ("weights", "parameters"), ("exported", "written"), ("broken", "damaged", "defective"), ("avoid", "prevent"),
    ("history", "conversation"), ("question", "query"), ("questions", "queries"), ("server", "service"),
    ("wrong", "incorrect"), ("shows", "lists"), ("exact", "precise"), ("way", "method"), ("command", "instruction"),
    ("test", "check", "try"), ("shrink", "reduce", "compress"), ("phones", "smartphones", "mobiles"),
    ("network", "net", "web"), ("name", "give"), ("different", "other"), ("happens", "occurs"), ("purpose", "use"),
    ("information", "details", "info"), ("whole", "complete", "entire"), ("own", "personal", "private"),
    ("stored", "kept", "saved"), ("located", "stored"), ("beginning", "start"), ("measure", "evaluate"),
    ("switch", "change"), ("evaluate", "assess", "score"), ("add", "include"), ("repository", "repo"),
    ("repeat", "duplicate"), ("connection", "internet"), ("works", "functions"), ("work", "function"),
    ("interface", "frontend"), ("accuracy", "quality"), ("runs", "executes"), ("running", "active"),
    ("people", "users"), ("package", "library"), ("missing", "absent"), ("hardware", "computer"),
)
SYNONYMS = {
    word: tuple(sorted({other for group in SAME if word in group for other in group} - {word}))
    for word in itertools.chain.from_iterable(SAME)
}
DROPPABLE = frozenset(["a", "an", "the", "do", "does", "is", "are", "of", "to", "i", "my", "me", "it"])
FILLERS = DROPPABLE | frozenset((
    "how", "can", "could", "would", "you", "please", "what", "which", "that", "this", "there", "with", "for", "in",
    "on", "from", "want", "need", "tell", "show", "explain", "about", "be", "does", "should", "at", "and", "have",
))
HINGES = frozenset(("on", "with", "for", "from", "in", "into", "to", "without", "by", "when", "while", "as"))
ENDINGS = ("?", "?", "?", "?", "", "", "", "", "", ".", "!", " ")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def vary(phrasing: str, chance: random.Random) -> str:
    """The phrasing as somebody else could have typed it."""
    text = phrasing
    if chance.random() < 0.45:
        text = with_other_opening(text, chance)
    if chance.random() < 0.35:
        text = with_other_words(text, chance)
    if chance.random() < 0.12:
        text = without_a_small_word(text, chance)
    if chance.random() < 0.1:
        text = as_keywords(text, chance)
    if chance.random() < 0.06:
        text = with_end_first(text, chance)
    if chance.random() < 0.22:
        text = f"{chance.choice(BEFORE)} {text}"
    if chance.random() < 0.12:
        text = f"{text} {chance.choice(AFTER_HOW if phrasing.startswith('how do I ') else AFTER)}"
    if chance.random() < 0.08:
        text = with_typing_error(text, chance)
    return with_other_case(text, chance) + chance.choice(ENDINGS)


def with_other_opening(text: str, chance: random.Random) -> str:
    """`how do I export` becomes `I want to export`; an order such as `export` gets an opening too."""
    for group in OPENINGS:
        for opening in group:
            rest = text.removeprefix(f"{opening} ")
            if rest != text and not rest.startswith(("your", "the matter")):
                return f"{chance.choice(group)} {rest}"
    if text.split(" ")[0] in ORDERS:
        return f"{chance.choice(HOW)} {text}"
    return text


def with_other_words(text: str, chance: random.Random) -> str:
    """One to three words replaced by others of the same meaning."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.lower() in SYNONYMS]
    for place in chance.sample(places, min(len(places), chance.randint(1, 3))):
        words[place] = chance.choice(SYNONYMS[words[place].lower()])
    return " ".join(words)


def as_keywords(text: str, chance: random.Random) -> str:
    """The text without most of the words that carry little, as in a search box."""
    kept = [word for word in text.split(" ") if word.lower() not in FILLERS or chance.random() < 0.3]
    return " ".join(kept) if len(kept) > 1 else text


def with_end_first(text: str, chance: random.Random) -> str:
    """`export a model for my phone` becomes `for my phone, export a model`."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word in HINGES and 1 < place < len(words) - 1]
    if not places:
        return text
    place = chance.choice(places)
    return " ".join([*words[place:-1], f"{words[-1]},", *words[:place]])


def without_a_small_word(text: str, chance: random.Random) -> str:
    """The text without one of its articles, pronouns or auxiliaries."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.lower() in DROPPABLE]
    if not places or len(words) < 4:
        return text
    del words[chance.choice(places)]
    return " ".join(words)


def with_typing_error(text: str, chance: random.Random) -> str:
    """One letter missing, doubled, wrong or swapped with its neighbour, in a word of plain letters."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if len(word) > 3 and word.isalpha()]
    if not places:
        return text
    place = chance.choice(places)
    word, at = words[place], chance.randrange(1, len(words[place]) - 1)
    kind = chance.randrange(4)
    if kind == 0:
        word = word[:at] + word[at + 1 :]
    elif kind == 1:
        word = word[:at] + word[at] + word[at:]
    elif kind == 2:
        word = word[:at] + chance.choice(LETTERS) + word[at + 1 :]
    else:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[place] = word
    return " ".join(words)


def with_other_case(text: str, chance: random.Random) -> str:
    """As it is, with a capital at the start, all lower case or, rarely, all upper case."""
    draw = chance.random()
    if draw < 0.4:
        return text[:1].upper() + text[1:]
    if draw < 0.7:
        return text.lower()
    return text.upper() if draw > 0.99 else text
