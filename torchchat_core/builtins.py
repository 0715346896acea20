"""What core itself offers, through the same hooks as everyone else."""

from __future__ import annotations

from torchchat_core.hookspecs import hookimpl
from torchchat_core.models.catalogue import load_catalogue
from torchchat_core.specs import CatalogueEntry, CommandInfo, ModelSourceInfo, TokenizerInfo

USE_A_MODEL, MANAGE_MODELS, MAKE_FILES = "Use a model", "Manage models", "Make files"  # groups of commands
MEASURE_AND_CHECK, TORCHCHAT_ITSELF = "Measure and check", "torchchat itself"


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
            summary="Chat with a model, by default the small one that comes with torchchat.",
            group=USE_A_MODEL,
            factory="torchchat_core.cli.chat:chat",
            order=10,
        ),
        CommandInfo(
            name="generate",
            summary="Answer one prompt or continue one text.",
            group=USE_A_MODEL,
            factory="torchchat_core.cli.generate:generate",
            order=20,
        ),
        CommandInfo(
            name="server",
            summary="Serve models through an OpenAI-compatible HTTP API.",
            group=USE_A_MODEL,
            factory="torchchat_core.cli.server:server",
            order=25,
        ),
        CommandInfo(
            name="download",
            summary="Download models and print where they are.",
            group=MANAGE_MODELS,
            factory="torchchat_core.cli.download:download",
            order=30,
        ),
        CommandInfo(
            name="list",
            summary="List local, exported and downloadable models.",
            group=MANAGE_MODELS,
            factory="torchchat_core.cli.listing:list_models",
            order=31,
        ),
        CommandInfo(
            name="where",
            summary="Print the path of a downloaded model.",
            group=MANAGE_MODELS,
            factory="torchchat_core.cli.where:where",
            order=32,
        ),
        CommandInfo(
            name="inspect",
            summary="Show the model, recipe and target of an exported file.",
            group=MAKE_FILES,
            factory="torchchat_core.cli.inspect:inspect",
            order=43,
        ),
        CommandInfo(
            name="remove",
            summary="Delete a downloaded model.",
            group=MANAGE_MODELS,
            factory="torchchat_core.cli.remove:remove",
            order=33,
        ),
        CommandInfo(
            name="export",
            summary="Export a model to a file that runs on its own.",
            group=MAKE_FILES,
            factory="torchchat_core.cli.export:export",
            order=40,
        ),
        CommandInfo(
            name="convert",
            summary="Convert a model to a folder in Hugging Face format.",
            group=MAKE_FILES,
            factory="torchchat_core.cli.convert:convert",
            order=41,
        ),
        CommandInfo(
            name="quantize",
            summary="Quantize a model and measure the loss of quality.",
            group=MAKE_FILES,
            factory="torchchat_core.cli.quantize:quantize",
            order=42,
        ),
        CommandInfo(
            name="eval",
            summary="Score a model on lm-eval tasks.",
            group=MEASURE_AND_CHECK,
            factory="torchchat_core.cli.evaluate:evaluate",
            order=50,
        ),
        CommandInfo(
            name="perplexity",
            summary="Measure how well a model predicts a text.",
            group=MEASURE_AND_CHECK,
            factory="torchchat_core.cli.perplexity:perplexity",
            order=51,
        ),
        CommandInfo(
            name="bench",
            summary="Measure speed and memory.",
            group=MEASURE_AND_CHECK,
            factory="torchchat_core.cli.bench:bench",
            order=52,
        ),
        CommandInfo(
            name="verify",
            summary="Check that two ways to run a model give the same answers.",
            group=MEASURE_AND_CHECK,
            factory="torchchat_core.cli.verify:verify",
            order=53,
        ),
        CommandInfo(
            name="plugins",
            summary="List the plugins, what each provides, and why any failed to load.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.plugins:plugins",
            order=80,
        ),
        CommandInfo(
            name="doctor",
            summary="Check this machine and the installation.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.doctor:doctor",
            order=81,
        ),
        CommandInfo(
            name="config",
            summary="Show and change defaults.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.config:config",
            order=82,
        ),
        CommandInfo(
            name="install",
            summary="Install plugins with pip.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.install:install",
            order=83,
        ),
        CommandInfo(
            name="uninstall",
            summary="Uninstall plugins with pip.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.install:uninstall",
            order=84,
        ),
        CommandInfo(
            name="completion",
            summary="Print a shell completion script.",
            group=TORCHCHAT_ITSELF,
            factory="torchchat_core.cli.completion:completion",
            order=85,
        ),
    ]
