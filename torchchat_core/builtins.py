"""What core itself offers, through the same hooks as everyone else."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.models.catalogue import load_catalogue
from torchchat_core.specs import CatalogueEntry, CommandInfo, ModelSourceInfo, TokenizerInfo


@hookimpl
def torchchat_model_sources() -> list[ModelSourceInfo]:
    return [
        ModelSourceInfo(
            name="local",
            summary="folders and checkpoint files of this machine",
            factory="torchchat_core.sources.local:LocalSource",
            schemes=frozenset({"file"}),
            formats=frozenset({"safetensors", "pytorch"}),
        ),
        ModelSourceInfo(
            name="embedded",
            summary="the small model that comes with torchchat",
            factory="torchchat_core.sources.local:EmbeddedSource",
            schemes=frozenset({"embedded"}),
            models=(CatalogueEntry(alias="embedded", reference="embedded:guide", licence="BSD-3-Clause"),),
        ),
        ModelSourceInfo(
            name="hub",
            summary="models of huggingface.co, or of the hub that HF_ENDPOINT names",
            factory="torchchat_core.sources.hub:HubSource",
            schemes=frozenset({"hf"}),
            models=load_catalogue(),
            keeps=True,
        ),
        ModelSourceInfo(
            name="url",
            summary="single files by https",
            factory="torchchat_core.sources.url:UrlSource",
            schemes=frozenset({"https", "http"}),
            keeps=True,
        ),
    ]


@hookimpl
def torchchat_tokenizers() -> list[TokenizerInfo]:
    return [
        TokenizerInfo(
            name="huggingface",
            summary="tokenizer.json of the tokenizers library",
            factory="torchchat_core.tokenizers.hugging_face:HuggingFaceReader",
            files=("tokenizer.json",),
            order=10,
        ),
        TokenizerInfo(
            name="sentencepiece",
            summary="SentencePiece models: Llama 2, Mistral, llama2.c",
            factory="torchchat_core.tokenizers.sentencepiece_file:SentencePieceReader",
            files=("tokenizer.model*", "tok*.model"),
            order=20,
        ),
        TokenizerInfo(
            name="tiktoken",
            summary="Meta's Llama 3 tokenizer.model",
            factory="torchchat_core.tokenizers.tiktoken_file:TiktokenReader",
            files=("tokenizer.model", "*.tiktoken"),
            order=30,
        ),
    ]


@hookimpl
def torchchat_commands() -> list[CommandInfo]:
    return [
        CommandInfo(
            name="chat",
            summary="Talk with a model; without MODEL, with the one that comes with torchchat.",
            factory="torchchat_core.cli.chat:chat",
            order=10,
        ),
        CommandInfo(
            name="generate",
            summary="Answer one prompt, or continue one text.",
            factory="torchchat_core.cli.generate:generate",
            order=20,
        ),
        CommandInfo(
            name="server",
            summary="Serve models by OpenAI's HTTP interface.",
            factory="torchchat_core.cli.server:server",
            order=25,
        ),
        CommandInfo(
            name="download",
            summary="Download models, and print where they are.",
            factory="torchchat_core.cli.download:download",
            order=30,
        ),
        CommandInfo(
            name="list",
            summary="List the models: known by name, downloaded, exported.",
            factory="torchchat_core.cli.listing:list_models",
            order=31,
        ),
        CommandInfo(
            name="where",
            summary="Print the folder or file of a downloaded model.",
            factory="torchchat_core.cli.where:where",
            order=32,
        ),
        CommandInfo(
            name="inspect",
            summary="Show what an exported file is and holds.",
            factory="torchchat_core.cli.inspect:inspect",
            order=34,
        ),
        CommandInfo(
            name="remove",
            summary="Delete a downloaded model.",
            factory="torchchat_core.cli.remove:remove",
            order=33,
        ),
        CommandInfo(
            name="export",
            summary="Write a model to a file that runs elsewhere.",
            factory="torchchat_core.cli.export:export",
            order=40,
        ),
        CommandInfo(
            name="convert",
            summary="Write a model as a folder in Hugging Face's format.",
            factory="torchchat_core.cli.convert:convert",
            order=41,
        ),
        CommandInfo(
            name="quantize",
            summary="Write a model with fewer bytes, and measure what that costs.",
            factory="torchchat_core.cli.quantize:quantize",
            order=42,
        ),
        CommandInfo(
            name="eval",
            summary="Score a model on tasks of lm-eval.",
            factory="torchchat_core.cli.evaluate:evaluate",
            order=50,
        ),
        CommandInfo(
            name="perplexity",
            summary="Measure how well a model predicts a text.",
            factory="torchchat_core.cli.perplexity:perplexity",
            order=51,
        ),
        CommandInfo(
            name="bench",
            summary="Measure speed and memory of one or every way to run a model.",
            factory="torchchat_core.cli.bench:bench",
            order=52,
        ),
        CommandInfo(
            name="verify",
            summary="Check whether two ways to run a model agree.",
            factory="torchchat_core.cli.verify:verify",
            order=53,
        ),
        CommandInfo(
            name="plugins",
            summary="List the plugins: what each offers, and why one failed.",
            factory="torchchat_core.cli.plugins:plugins",
            order=80,
        ),
        CommandInfo(
            name="doctor",
            summary="Check this machine and what is installed.",
            factory="torchchat_core.cli.doctor:doctor",
            order=81,
        ),
        CommandInfo(
            name="config",
            summary="Show and change the defaults.",
            factory="torchchat_core.cli.config:config",
            order=82,
        ),
        CommandInfo(
            name="install",
            summary="Install plugins with pip.",
            factory="torchchat_core.cli.install:install",
            order=83,
        ),
        CommandInfo(
            name="uninstall",
            summary="Uninstall plugins with pip.",
            factory="torchchat_core.cli.install:uninstall",
            order=84,
        ),
        CommandInfo(
            name="completion",
            summary="Print the completion script of a shell.",
            factory="torchchat_core.cli.completion:completion",
            order=85,
        ),
    ]
