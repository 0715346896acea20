"""`torchchat inspect`: what an exported file is and holds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from torchchat_core.amounts import bytes_text
from torchchat_core.artifact_checks import check_all
from torchchat_core.artifacts import Artifact, Manifest, exported_file, open_artifact
from torchchat_core.errors import TorchchatError, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.sources.inventory import locate, source_of
from torchchat_core.sources.reference import resolve


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print the file's manifest, as it stands in the file.")
@click.option("--check", is_flag=True, help="Compare every part of the file with its digest, and the machine that it "
                                            "was made for with this one.")
@click.pass_obj
def inspect(registry: Registry, /, file: str, as_json: bool, check: bool) -> None:
    """Show what the exported FILE is: its model, dtype, recipe, length, machine and versions.

    Nothing of it is run. Exit status 1 where it is damaged, of a later format, or something else wrote it.
    """
    ref = resolve(file, registry)
    files = locate(ref, source_of(ref, registry))
    path = exported_file(files) if files is not None else None
    if path is None:
        raise TorchchatError(f"{quoted_path(file)} is no exported file of this machine",
                             "give a .pt2, .so or .pte file")
    artifact = open_artifact(path)
    if check:
        artifact.check_target()
        check_all(artifact)
    if as_json:
        click.echo(json.dumps(artifact.content, ensure_ascii=False))
        return
    for name, value in rows(artifact):
        click.echo(f"{name:<12} {value}")


def rows(artifact: Artifact) -> Iterator[tuple[str, str]]:
    """What a manifest says, for people."""
    manifest = artifact.manifest
    config, text = manifest.config, manifest.text
    yield "model", manifest.model
    yield "kind", manifest.kind
    yield "size", bytes_text(artifact.path.stat().st_size)
    yield "weights", f"{bytes_text(manifest.weight_bytes)}, computed in {manifest.dtype}"
    yield "quantised", ", ".join(manifest.schemes) or "no"
    yield "recipe", json.dumps(manifest.recipe, ensure_ascii=False) if manifest.recipe is not None else "none"
    yield "architecture", (f"{config.architecture}: {config.num_layers} layers of {config.hidden_size}, "
                           f"vocabulary of {config.vocab_size}")
    yield "length", f"{manifest.max_seq_length} tokens"
    yield "tokenizer", f"{text.tokenizer_kind}: {', '.join(text.tokenizer)}" if text else "none"
    yield "template", "yes" if text and text.chat_template is not None else "none: it continues texts"
    yield "for", machine_words(manifest)
    yield "made with", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def machine_words(manifest: Manifest) -> str:
    """The machine that a file was made for."""
    target = manifest.target
    parts = [target.device, target.machine, target.system, target.instructions]
    return ", ".join(part for part in parts if part is not None)
