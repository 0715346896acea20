"""What a hub's refusals mean, and what to do about each."""

from __future__ import annotations

from urllib.parse import urlsplit

from torchchat_core.errors import TorchchatError, did_you_mean, quoted
from torchchat_core.models.catalogue import STARTING_MODEL
from torchchat_core.sources.downloading import ConnectionFailure, HTTPFailure, seconds_to_wait
from torchchat_core.sources.hub_reference import HubReference, hub_endpoint

GIVE_TOKEN = "--hf-token, HF_TOKEN or `hf auth login`"


def explained(failure: HTTPFailure | ConnectionFailure, reference: HubReference, *, file: str | None = None,
              has_token: bool, known: tuple[str, ...] = ()) -> TorchchatError:
    """The error for a person. `known` are names of models, for near matches of one that does not exist."""
    if isinstance(failure, ConnectionFailure):
        return TorchchatError(f"cannot fetch {file or 'the list of files'} of {reference.repository} from "
                              f"{_host()}: {failure}", "check the network and run the same command again: what has "
                              "come already is kept")
    code = failure.headers.get("x-error-code", "")
    if code == "GatedRepo":
        return _gated(failure, reference, has_token)
    if failure.status == 401 and (has_token or "credentials" in failure.headers.get("x-error-message", "").lower()):
        return TorchchatError(f"{_host()} does not accept the token",
                              f"make a new one at {hub_endpoint()}/settings/tokens and give it by {GIVE_TOKEN}")
    if code == "RevisionNotFound":
        return TorchchatError(f"{reference.repository} has no revision {quoted(reference.revision or 'main')}",
                              f"its branches and tags are at {_page(reference)}/tree/main")
    if code == "EntryNotFound" or (failure.status == 404 and file is not None):
        return TorchchatError(f"{reference.repository} lists {quoted(file)}, but the hub does not have it",
                              "run the same command again; if that does not help, its owner has to upload it again")
    if failure.status in (401, 404):
        return _unknown(reference, has_token, known)
    if failure.status == 403:
        return TorchchatError(f"{_host()} forbids access to {reference.repository}"
                              f"{_server_says(failure)}", f"look at {_page(reference)}; a token with permission to "
                              f"read it is given by {GIVE_TOKEN}")
    if failure.status == 429:
        wait = seconds_to_wait(failure.headers)
        return TorchchatError(f"{_host()} takes no more requests from here for now",
                              f"wait {'some minutes' if wait is None else f'{wait:.0f} seconds'} and run the same "
                              f"command again, with a token if there was none ({GIVE_TOKEN})")
    if failure.status >= 500:
        return TorchchatError(f"{_host()} is out of order (HTTP status {failure.status})",
                              "run the same command again later: what has come already is kept")
    return TorchchatError(f"{_host()} answers with HTTP status {failure.status} for {reference.repository}"
                          f"{_server_says(failure)}", f"look at {_page(reference)}")


def _gated(failure: HTTPFailure, reference: HubReference, has_token: bool) -> TorchchatError:
    page = _page(reference)
    if has_token and failure.status != 401:
        return TorchchatError(f"{reference.repository} is gated, and this token's account has no permission yet",
                              f"visit {page} with that account and accept the conditions, then run the same command "
                              f"again; or use an ungated model, such as {STARTING_MODEL}")
    return TorchchatError(f"{reference.repository} is gated: its owner asks everyone to accept conditions first",
                          f"visit {page}, accept them, and give a token of that account by {GIVE_TOKEN}; or use an "
                          f"ungated model, such as {STARTING_MODEL}")


def _unknown(reference: HubReference, has_token: bool, known: tuple[str, ...]) -> TorchchatError:
    message = f"there is no public model {quoted(reference.repository)} at {_host()}"
    if has_token:
        message = f"there is no model {quoted(reference.repository)} at {_host()} that this token may see"
    hint = f"if it is private, give a token that may read it by {GIVE_TOKEN}"
    others = [name for name in known if name != reference.repository]
    return TorchchatError(message, did_you_mean(reference.repository, others) or hint)


def _server_says(failure: HTTPFailure) -> str:
    message = "".join(char for char in failure.headers.get("x-error-message", "") if char.isprintable())
    return f": {message[:200]}" if message else ""


def _page(reference: HubReference) -> str:
    return f"{hub_endpoint()}/{reference.repository}"


def _host() -> str:
    return urlsplit(hub_endpoint()).netloc or hub_endpoint()
