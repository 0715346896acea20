"""Many clients at once on a running server: is every answer right, and what do they get together?

    torchchat server MODEL --port 8000 &
    python tools/load_server.py http://127.0.0.1:8000 --clients 64 --tokens 128
    python tools/load_server.py http://127.0.0.1:8000 --soak 2000 --pid PID

The first form asks greedily, each prompt alone and then all at once, compares the answers, and prints tokens/s of one
client and of all: medians of --rounds. What came is taken apart when the clock has stopped. The second sends requests
of which a third are cut off at random, and prints the server's memory as it goes; at the end every prompt is asked
again and compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path

WORDS = ("Once upon a time", "Tom and his dog", "The little girl", "One day, a bird", "Lily found a red ball",
         "There was a big tree", "Mom said", "In the park", "A boy named Tim", "The sun was")


def prompts(count: int) -> list[str]:
    """`count` prompts that are all different, and of different lengths."""
    return [f"{WORDS[index % len(WORDS)]}{' and' * (index // len(WORDS) % 7)}{' the' * (index // 70)}"
            for index in range(count)]


async def ask(address: str, prompt: str, tokens: int, model: str, *, stream: bool = False, cut: float | None = None
              ) -> bytes | None:
    """What comes back for one greedy answer; with `cut`, the connection is closed after so many seconds: None."""
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream})
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close"
                 f"\r\nContent-Length: {len(body.encode())}\r\n\r\n{body}".encode())
    try:
        return await asyncio.wait_for(reader.read(-1), cut)
    except TimeoutError:
        return None
    finally:
        writer.transport.abort()


def text_of(data: bytes) -> str:
    """The text of an answer, streamed or not."""
    head, _, content = data.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemExit(f"{head.decode()}\n{content.decode()}")
    if b"text/event-stream" in head.lower():
        parts = [line[6:] for line in content.decode().splitlines() if line.startswith("data: {")]
        return "".join(json.loads(part)["choices"][0]["text"] for part in parts)
    return str(json.loads(content)["choices"][0]["text"])


async def model_of(address: str) -> str:
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    data = await reader.read(-1)
    writer.close()
    return str(json.loads(data.partition(b"\r\n\r\n")[2])["data"][0]["id"])


async def compare(address: str, clients: int, tokens: int, rounds: int, stream: bool) -> int:
    """Alone, then together; the number of answers that differ."""
    model, asked = await model_of(address), prompts(clients)
    await ask(address, "Hello", tokens, model)
    rates: list[tuple[float, float]] = []
    different = 0
    for _ in range(rounds):
        started = time.perf_counter()
        alone = [await ask(address, prompt, tokens, model, stream=stream) for prompt in asked]
        between = time.perf_counter()
        together = await asyncio.gather(*(ask(address, prompt, tokens, model, stream=stream) for prompt in asked))
        ended = time.perf_counter()
        rates.append((clients * tokens / (between - started), clients * tokens / (ended - between)))
        different += sum(text_of(first or b"") != text_of(second or b"")
                         for first, second in zip(alone, together, strict=True))
    one, all_ = (statistics.median(each) for each in zip(*rates, strict=True))
    print(f"{clients} clients: {different} answers differ; at most {one:.0f} tokens/s one after the other, "
          f"{all_:.0f} together, ratio {all_ / one:.2f}")
    return different


async def soak(address: str, count: int, tokens: int, pid: int | None) -> int:
    """Requests with random cuts; the number of later answers that differ from those before."""
    model, asked, generator = await model_of(address), prompts(32), random.Random(0)
    before = [text_of(await ask(address, prompt, tokens, model) or b"") for prompt in asked]
    places = asyncio.Semaphore(48)
    wrong = cut = 0

    async def one(number: int) -> None:
        nonlocal wrong, cut
        async with places:
            index = generator.randrange(len(asked))
            seconds = generator.uniform(0.0, 0.2) if generator.random() < 0.33 else None
            data = await ask(address, asked[index], tokens, model, stream=generator.random() < 0.5, cut=seconds)
            cut += data is None
            wrong += data is not None and text_of(data) != before[index]
            if number % 250 == 0:
                print(f"{number} requests, {cut} cut off, {wrong} wrong{memory(pid)}", flush=True)

    await asyncio.gather(*(one(number) for number in range(1, count + 1)))
    after = [text_of(await ask(address, prompt, tokens, model) or b"") for prompt in asked]
    wrong += sum(first != second for first, second in zip(before, after, strict=True))
    print(f"{count} requests, {cut} cut off, {wrong} wrong{memory(pid)}")
    return wrong


def memory(pid: int | None) -> str:
    if pid is None:
        return ""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(f", {int(line.split()[1]) / 1024:.0f} MiB" for line in lines if line.startswith("VmRSS:"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--soak", type=int, metavar="COUNT")
    parser.add_argument("--pid", type=int, help="of the server, whose memory is printed")
    given = parser.parse_args()
    if given.soak:
        return int(asyncio.run(soak(given.address, given.soak, given.tokens, given.pid)) > 0)
    return int(asyncio.run(compare(given.address, given.clients, given.tokens, given.rounds, given.stream)) > 0)


if __name__ == "__main__":
    sys.exit(main())
