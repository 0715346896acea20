"""Single files by their address, over HTTP from a server on this machine."""

from __future__ import annotations

import hashlib
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from torchchat_core import progress
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.sources import downloading
from torchchat_core.sources.reference import resolve
from torchchat_core.sources.url import UrlSource
from torchchat_core.sources.url_file import UrlFile
from torchchat_core.specs import ModelFiles, ModelRef
from torchchat_core.testing import ModelSourceContract

CONTENT = bytes(range(256)) * 400
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def reference(url: str) -> ModelRef:
    scheme, _, location = url.partition(":")
    return ModelRef(text=url, scheme=scheme, location=location)


def fetch(url: str) -> ModelFiles:
    return UrlSource().fetch(reference(url))


def refused(url: str) -> TorchchatError:
    with pytest.raises(TorchchatError) as caught:
        fetch(url)
    return caught.value


@pytest.fixture
def file(hub: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a file with `CONTENT`."""
    monkeypatch.delenv("HF_ENDPOINT")
    hub.plain["model.gguf"] = CONTENT
    return f"{hub.url}/files/model.gguf"


class TestUrl(ModelSourceContract):
    plugin, name = "torchchat_core.builtins", "url"

    @pytest.fixture
    def references(self, hub: Any, llama2c_file: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
                   ) -> Sequence[str]:
        monkeypatch.delenv("HF_ENDPOINT")
        hub.plain = {"a.pt": llama2c_file(0), "b.pt": llama2c_file(1)}
        self._hub = hub
        return [f"{hub.url}/files/a.pt", f"{hub.url}/files/b.pt"]

    def bytes_fetched(self) -> int:
        return int(self._hub.bytes_sent)

    def interruption(self) -> AbstractContextManager[object]:
        return self._hub.cut_after(len(self._hub.plain["a.pt"]) * 2 // 3)  # type: ignore[no-any-return]


# ---- addresses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("url", "name"), [
    ("https://host.example/a/b/model-Q4_0.gguf", "model-Q4_0.gguf"),
    ("https://host.example:8443/model.gguf?download=true", "model.gguf"),
    ("https://host.example/a%2Fb%20c.gguf", "b_c.gguf"),
    ("https://host.example/..%2F..%2F.ssh.gguf", "ssh.gguf"),
    ("http://localhost:1/m.gguf", "m.gguf"),
    ("http://[::1]/m.gguf", "m.gguf"),
])
def test_the_copys_name_is_the_end_of_the_address_made_harmless(url: str, name: str) -> None:
    assert UrlFile.parse(url).name == name


@pytest.mark.parametrize("url", [
    "https:model.gguf", "https://", "https://host.example", "https://host.example/", "https://host.example/a/",
    "https://host.example/..", "https://user:secret@host.example/m.gguf", "https://host.example:99999/m.gguf",
    "https://[/m.gguf", "https://host.example/m.gguf#sha256=12", "https://host.example/m.gguf#part",
    "https://host.example/a b.gguf", "https://host.example/m.gguf\n", "https://host.example/x.incomplete",
    "https://host.example/origin.json",
])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(TorchchatError):
        UrlFile.parse(url)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(TorchchatError) as caught:
        UrlFile.parse("https://user:secret@host.example/m.gguf")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://example.com/m.gguf", "http://127.0.0.1.example.com/m.gguf",
                                 "http://10.0.0.1/m.gguf"])
def test_only_https_and_this_machine_are_taken(url: str, hub: Any) -> None:
    assert "is not https" in refused(url).message


def test_an_address_resolves_to_this_source(isolated_registry: Registry) -> None:
    found = resolve("https://host.example/m.gguf#sha256=" + "0" * 64, isolated_registry)
    assert (found.scheme, found.location) == ("https", "//host.example/m.gguf#sha256=" + "0" * 64)


def test_what_could_not_be_opened_is_refused_before_it_is_fetched(hub: Any, file: str) -> None:
    base = file.removesuffix("model.gguf")
    assert "is one of the 3 files" in refused(f"{base}m-00001-of-00003.gguf").message
    assert "without an ending" in refused(f"{base}model").message
    assert hub.requests == []


# ---- fetching -----------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once_and_found_later(hub: Any, file: str) -> None:
    files = fetch(file)
    assert files.format == "gguf"
    assert files.weights[0].read_bytes() == CONTENT
    assert files.digests == {"model.gguf": SHA256}
    count = len(hub.requests)
    assert UrlSource().locate(reference(file)) == files
    assert fetch(f"{file}#sha256={SHA256}").weights == files.weights
    assert len(hub.requests) == count


def test_a_wrong_digest_is_told_and_the_file_deleted(hub: Any, file: str, tmp_path: Path) -> None:
    message = refused(f"{file}#sha256={'0' * 64}").message
    assert SHA256 in message
    assert "0" * 64 in message
    assert not list(tmp_path.rglob("model.gguf*"))
    hub.flip = "model.gguf"
    assert "came damaged" in refused(f"{file}#sha256={SHA256}").message
    hub.flip = None
    assert fetch(f"{file}#sha256={SHA256}").weights[0].read_bytes() == CONTENT


def test_a_cut_connection_is_continued_at_once(hub: Any, file: str) -> None:
    hub.budget, hub.cuts = 40_000, 2
    assert fetch(file).weights[0].read_bytes() == CONTENT
    assert hub.bytes_sent == len(CONTENT)
    assert len(hub.ranges) == 2


def test_a_later_run_goes_on(hub: Any, file: str) -> None:
    with hub.cut_after(40_000):
        error = refused(file)
    assert f"the connection broke after 40000 of {len(CONTENT)} bytes" in error.message
    assert UrlSource().locate(reference(file)) is None
    assert list(UrlSource().kept()) == []
    fetch(file)
    assert hub.bytes_sent == len(CONTENT)


def test_a_file_that_has_changed_begins_anew(hub: Any, file: str) -> None:
    with hub.cut_after(40_000):
        refused(file)
    hub.plain["model.gguf"] = CONTENT[::-1]
    hub.ranges.clear()
    assert fetch(file).weights[0].read_bytes() == CONTENT[::-1]
    assert hub.ranges == []


def test_a_file_that_changes_during_the_download_begins_anew(hub: Any, file: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    def change(failure: Any, failures: int) -> float:
        hub.plain["model.gguf"] = CONTENT[::-1]
        return 0.0

    monkeypatch.setattr(downloading, "_pause_before_next", change)
    hub.budget, hub.cuts = 40_000, 1
    assert fetch(file).weights[0].read_bytes() == CONTENT[::-1]


def test_without_a_version_only_a_digest_lets_a_later_run_go_on(hub: Any, file: str) -> None:
    hub.etags = False
    for suffix, ranges in (("", 0), (f"#sha256={SHA256}", 1)):
        with hub.cut_after(40_000):
            refused(file + suffix)
        hub.ranges.clear()
        assert fetch(file + suffix).weights[0].read_bytes() == CONTENT
        assert len(hub.ranges) == ranges
        UrlSource().remove(reference(file))


def test_a_server_that_says_neither_size_nor_head_is_believed(hub: Any, file: str) -> None:
    hub.no_head, hub.lengths = True, False
    assert fetch(file).weights[0].read_bytes() == CONTENT


def test_more_bytes_than_announced_are_refused(hub: Any, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(response: Any) -> bytes:
        return b"x" * 4096

    monkeypatch.setattr(downloading, "_read", grow)
    assert f"sends more than the {len(CONTENT)} bytes" in refused(file).message


@pytest.mark.parametrize("media_type", ["text/html; charset=utf-8", "application/xhtml+xml"])
def test_a_web_page_is_no_file(hub: Any, file: str, media_type: str) -> None:
    hub.media_type = media_type
    error = refused(file)
    assert "is a web page, not a file" in error.message
    assert "download button" in (error.fix or "")


def test_an_empty_file_is_refused(hub: Any, file: str) -> None:
    hub.plain["model.gguf"] = b""
    assert "is an empty file" in refused(file).message


@pytest.mark.parametrize(("status", "message"), [
    (404, "there is no file"), (403, "forbids access"), (401, "forbids access"), (429, "takes no more requests"),
    (503, "is out of order"), (418, "answers with HTTP status 418")])
def test_every_refusal_is_told(hub: Any, file: str, status: int, message: str) -> None:
    hub.refused["/files/"] = status
    error = refused(file)
    assert message in error.message
    assert error.fix


def test_a_busy_server_is_asked_again(hub: Any, file: str) -> None:
    hub.failures = [("/files/", 503, {"Retry-After": "0"}), ("/files/", 429, {}), ("/files/", 503, {})]
    assert fetch(file).weights[0].read_bytes() == CONTENT


def test_no_network_is_told(hub: Any) -> None:
    error = refused("http://127.0.0.1:9/model.gguf")
    assert "cannot fetch model.gguf from 127.0.0.1:9" in error.message


def test_redirects_lead_to_encrypted_places_alone(hub: Any, file: str) -> None:
    hub.redirect = "http://example.com/model.gguf"
    assert "is not https" in refused(file).message
    hub.redirect = "file:///etc/passwd"
    assert "HTTP status 302" in refused(file).message
    hub.redirect = file
    assert "HTTP status 302" in refused(file).message


def test_too_small_a_disk_is_told(hub: Any, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: usage(10, 0, 10))
    assert "model.gguf needs 102 kB more" in refused(file).message
    assert hub.bytes_sent == 0


def test_progress_is_told(hub: Any, file: str) -> None:
    done: dict[str, int] = {}

    class Reporter:
        def started(self, name: str, total: int | None, unit: progress.Unit) -> Any:
            done[name] = 0
            self.name = name
            assert total == len(CONTENT)
            return self

        def finished(self, task: Any, completed: bool) -> None: ...

        def advance(self, amount: int) -> None:
            done[self.name] += amount

        def set_total(self, total: int | None) -> None: ...

    with progress.shown_by(Reporter()):
        fetch(file)
    assert done == {"model.gguf": len(CONTENT)}


def test_offline_forbids_the_network(hub: Any, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids" in refused(file).message
    assert hub.requests == []


# ---- the cache ----------------------------------------------------------------------------------------------------


def test_the_same_name_from_two_places_is_two_files(hub: Any, file: str) -> None:
    hub.plain["other/model.gguf"] = CONTENT[::-1]
    other = file.replace("model.gguf", "other/model.gguf")
    assert fetch(file).weights[0].read_bytes() != fetch(other).weights[0].read_bytes()
    assert {model.reference for model in UrlSource().kept()} == {file, other}


def test_a_damaged_cache_is_no_error(hub: Any, file: str, tmp_path: Path) -> None:
    kept = fetch(file).root
    base = kept.parent
    for name, record in {"0" * 16: "[1]", "1" * 16: '{"url": 3}', "2" * 16: '{"url": "https://h.example/m.gguf"}',
                         "3" * 16: "[" * 1000, "4" * 16: (kept / "origin.json").read_text()}.items():
        (base / name).mkdir()
        (base / name / "origin.json").write_text(record)
    (base / ("5" * 16)).symlink_to(kept)
    assert [(model.reference, model.bytes) for model in UrlSource().kept()] == [(file, len(CONTENT))]
    (kept / "origin.json").write_text("{}")
    assert UrlSource().locate(reference(file)) is None
    assert fetch(file).weights[0].read_bytes() == CONTENT


def test_a_folder_that_leads_elsewhere_is_not_removed(hub: Any, file: str, tmp_path: Path) -> None:
    folder = fetch(file).root
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    with pytest.raises(TorchchatError, match="is a link to"):
        UrlSource().remove(reference(file))
    assert (outside / "model.gguf").exists()


def test_a_copy_with_another_digest_is_not_what_is_removed(hub: Any, file: str) -> None:
    kept = fetch(file).weights[0]
    wrong = reference(f"{file}#sha256={'0' * 64}")
    assert UrlSource().removal(wrong) is None
    assert UrlSource().remove(wrong) == 0
    assert kept.exists()
    right = reference(f"{file}#sha256={SHA256}")
    found = UrlSource().removal(right)
    assert found is not None
    assert (found.path, found.bytes, [model.reference for model in found.models]) == (kept, len(CONTENT), [file])
    assert UrlSource().remove(right) >= len(CONTENT)
    assert not kept.exists()


def test_what_a_broken_download_left_is_told_before_it_is_removed(hub: Any, file: str) -> None:
    with hub.cut_after(40_000):
        refused(file)
    found = UrlSource().removal(reference(f"{file}#sha256={SHA256}"))
    assert found is not None
    assert found.models == ()
    assert found.bytes >= 40_000
