"""Copy text to the clipboard with a system program, through tmux, or with a terminal escape sequence."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from torchchat_core.errors import TorchchatError

TIMEOUT_SECONDS = 5
LONGEST_SEQUENCE = 74_994  # bytes of base64 that xterm accepts in OSC 52; other terminals accept more


def copy_to_clipboard(text: str, terminal: TextIO | None) -> str:
    """Copy the text, and return a sentence for the user that says how.

    If no program can copy, an escape sequence is written to `terminal`, which may not support it. Raises
    `TorchchatError` if there is no way to copy.
    """
    for command, sentence in _programs(os.environ, sys.platform):
        encoding = "utf-16" if command[0] == "clip.exe" else "utf-8"
        if _succeeds(command, text.encode(encoding, errors="replace")):
            return sentence
    content = text.encode("utf-8", errors="replace")
    encoded = base64.b64encode(content)
    if terminal is None or not terminal.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        raise TorchchatError("there is no clipboard: none of wl-copy, xclip, xsel, pbcopy, clip.exe and tmux can copy, "
                             "and the output is not a terminal", "write the conversation to a file: /save FILE")
    if len(encoded) > LONGEST_SEQUENCE:
        raise TorchchatError(f"the text has {len(content)} bytes, more than terminals can copy",
                             "write the conversation to a file: /save FILE")
    terminal.write(f"\x1b]52;c;{encoded.decode()}\x07")
    terminal.flush()
    return "Sent to the terminal's clipboard (OSC 52). Some terminals ignore this; if yours does, use /save FILE."


def _programs(environment: Mapping[str, str], platform: str) -> Iterator[tuple[list[str], str]]:
    """Yield the programs that can copy here, best first. Over SSH, those of the remote desktop are skipped."""
    copied = "Copied to the clipboard."
    if not (environment.get("SSH_CONNECTION") or environment.get("SSH_TTY")):
        if platform == "darwin":
            yield ["pbcopy"], copied
        if environment.get("WAYLAND_DISPLAY"):
            yield ["wl-copy"], copied
        if environment.get("DISPLAY"):
            yield ["xclip", "-selection", "clipboard"], copied
            yield ["xsel", "--clipboard", "--input"], copied
        if platform == "win32" or environment.get("WSL_DISTRO_NAME"):
            yield ["clip.exe"], copied
    if environment.get("TMUX"):
        yield ["tmux", "load-buffer", "-w", "-"], "Copied to tmux's buffer, and to the terminal's clipboard if " \
                                                  "tmux's set-clipboard allows that."


def _succeeds(command: list[str], content: bytes) -> bool:
    """Return True if the program is installed and accepts the content without an error."""
    if shutil.which(command[0]) is None:
        return False
    try:
        done = subprocess.run(command, input=content, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
