"""What reads strangers' files does no harm, whatever is in them.

All programs that are not given to users run with AddressSanitizer and UndefinedBehaviorSanitizer: here, and where
other tests ask the probe.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

from build_native import has_fuzzer
from probing import Probe, ProbeError
from test_chat_pieces import TEXTS, template_of
from test_tokenizers import files_of

from torchchat_core.chat_pieces import chat_pieces
from torchchat_core.chat_template import BUILT_IN

SECONDS = int(os.environ.get("TORCHCHAT_FUZZ_SECONDS") or 5)
LONGEST = 200_000  # bytes of an input to the fuzz target


def test_damaged_tokenizers_do_nothing_undefined(testdata: Path, tmp_path: Path, probe: Probe) -> None:
    chance = random.Random(11)
    for path in ("tinyllamas/stories260K/tok512.model", "hf/TinyStories-656K/tokenizer.json"):
        for _ in range(30):
            damaged = tmp_path / Path(path).name
            damaged.write_bytes(mutated((testdata / path).read_bytes(), chance))
            try:
                probe.ask("open", files=files_of(damaged))
                probe.ask("encode", texts=TEXTS, special=True)
            except ProbeError:
                pass


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The data with some bytes changed, cut out or doubled."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = chance.randrange(max(1, len(changed)))
        match chance.randrange(3):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + chance.randint(1, 100)]
            case 2:
                changed[at:at] = changed[at : at + chance.randint(1, 100)]
    return bytes(changed)


def seeds(testdata: Path, folder: Path) -> None:
    """Inputs of every kind to begin with."""
    pieces = chat_pieces(template_of((BUILT_IN / "llama3.jinja").read_text("utf-8")))
    manifest = {"format": "torchchat", "format_version": 1, "kind": "executorch", "model": "m", "dtype": "fp32",
                "max_seq_length": 256, "vocab_size": 512, "config": {"max_context": 256, "vocab_size": 512},
                "tokenizer": {"files": ["tokenizer/tokenizer.json"]}, "end_ids": [1, 2], "bos_id": 1,
                "adds_bos": True, "sampling": {"top_k": 4}, "chat_pieces": pieces, "runtime": {},
                "target": {"device": "cpu", "system": None}, "program": {"entry": None, "bytes": 9},
                "digests": {"program": "0" * 64}}
    content = json.loads((testdata / "hf/TinyStories-656K/tokenizer.json").read_text("utf-8"))
    few = {piece: token for piece, token in content["model"]["vocab"].items() if token < 400}
    kept = [merge for merge in content["model"]["merges"]
            if all(piece in few for piece in (*merge.split(" "), merge.replace(" ", "")))]
    content["model"] |= {"vocab": few, "merges": kept}
    archive = folder / "archive"
    shutil.make_archive(str(archive), "zip", root_dir=BUILT_IN)
    inputs = {"m": json.dumps(manifest).encode(), "c": json.dumps(pieces).encode(), "j": json.dumps(content).encode(),
              "s": (testdata / "tinyllamas/stories260K/tok512.model").read_bytes(),
              "z": archive.with_suffix(".zip").read_bytes()}
    archive.with_suffix(".zip").unlink()
    for kind, data in inputs.items():
        (folder / kind).write_bytes(kind.encode() + data)


def test_no_input_of_the_fuzz_target_does_harm(sanitized: Path, testdata: Path, tmp_path: Path) -> None:
    """By libFuzzer where clang built it, else with as many damaged seeds as there is time for."""
    seeds(testdata, tmp_path)
    target = sanitized / "torchchat-fuzz"
    if has_fuzzer():
        command = [str(target), str(tmp_path), f"-max_total_time={SECONDS}", f"-max_len={LONGEST}",
                   "-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={tmp_path}/"]
    else:
        chance = random.Random(13)
        beginnings = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
        for index in range(40 * SECONDS):
            whole = chance.choice(beginnings)
            (tmp_path / f"damaged{index}").write_bytes(whole[:1] + mutated(whole[1:], chance))
        command = [str(target), *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS + 300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
