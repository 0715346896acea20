"""Whether the hub can be reached. Standard library alone."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from torchchat_core.errors import TorchchatError, quoted_path

PATIENCE = 2.0  # seconds


def hub_endpoint() -> tuple[str, int]:
    """Host and port of the hub: that of $HF_ENDPOINT, or huggingface.co. Raises `TorchchatError` where it is no URL."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        endpoint = urlsplit(address)
        return endpoint.hostname or "", endpoint.port or (443 if endpoint.scheme == "https" else 80)
    except ValueError as error:
        raise TorchchatError(f"HF_ENDPOINT is {quoted_path(address)}: {error}",
                             "unset HF_ENDPOINT, or set it to a URL") from None


def connection_fault(host: str, port: int) -> str | None:
    """Why there is no connection to be had within `PATIENCE`; None where there is."""
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        return str(error)
    return None
