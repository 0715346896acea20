"""The types that stages and plugins share: descriptions, what is passed between stages, and the protocols.

Standard library alone, so that describing a plugin costs nothing. Heavy types appear in annotations only.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard, get_args, get_origin, get_type_hints

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.run_options import DEVICES as DEVICES
from torchchat_core.run_options import DTYPES as DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from torchchat_core.models.config import ModelConfig
    from torchchat_core.models.transformer import Transformer

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
SCHEME = re.compile(r"(linear|embedding):[a-z0-9][a-z0-9_.-]*")
FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
ANY_SCHEME = "*"  # of an executor that runs whatever layers a quantizer makes
ABILITIES = {
    "score": "logits at every position: perplexity, evaluation, speculation",
    "batch": "one decoding step for many sessions: the server",
    "prompt_batch": "the prompts of many sessions in one call: the server",
    "fork": "copies of sessions: prompts that begin alike, and several answers to one prompt",
    "embed": "hidden states: embeddings",
    "fused_sampling": "sampling inside the graph",
}


# ---- descriptions: what a plugin offers, as data ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Description:
    """What every offer of a plugin states about itself.

    `factory` is a dotted `module:attribute`, imported when the thing is first used and called without arguments.
    `options` is a dataclass made with `torchchat_core.options.option`; it is the one source for command-line
    flags, validation and documentation. `replaces` are qualified names (`distribution:name`) of the same kind
    whose bare name this one takes over. Raises `TorchchatError` where a field is malformed.
    """

    kind: ClassVar[str] = "plugin"
    name: str  # lower case; with the distribution's name before it, `distribution:name`, unique
    summary: str  # one line, for lists
    factory: str  # "package.module:attribute", called without arguments
    options: type | None = None  # a dataclass
    replaces: frozenset[str] = frozenset()  # "distribution:name" of others whose bare name this one takes over

    def __post_init__(self) -> None:
        for field_name, wanted in _field_types(self.__class__).items():  # type: ignore[arg-type]
            value = getattr(self, field_name)
            if not isinstance(value, wanted) or not _holds_texts(value):
                names = " or ".join(each.__name__ for each in wanted)
                raise TorchchatError(f"{field_name} of {self.kind} {self.name!r:.40} is {value!r:.60}; it has to be of "
                                     f"the type {names}, and hold texts where it holds anything")
        if not NAME.fullmatch(self.name):
            raise TorchchatError(f"{self.kind} name {self.name!r} is not of lower-case letters, digits, '_', '.', '-'")
        if not self.summary.strip() or "\n" in self.summary:
            raise TorchchatError(f"the summary of {self.kind} {quoted(self.name)} has to be one line")
        if not FACTORY.fullmatch(self.factory):
            raise TorchchatError(f"the factory of {self.kind} {self.name!r} is {self.factory!r}; it has to be "
                                 "'package.module:attribute'")
        if self.options is not None and not is_dataclass(self.options):
            raise TorchchatError(f"the options of {self.kind} {quoted(self.name)} are not a dataclass")

    def make(self) -> Any:
        """Imports the factory and calls it. Raises `TorchchatError` where it cannot be imported."""
        module, _, attribute = self.factory.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise TorchchatError(f"{self.kind} {quoted(self.name)} cannot be used: {error}",
                                 "a package that it needs is missing or broken; reinstall the plugin") from error
        return found()


@functools.cache
def _field_types(kind: type) -> dict[str, tuple[type, ...]]:
    """Field -> the types that its values may have, from the annotations."""
    hints = {name: hint for name, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}
    unions = {name: get_args(hint) if get_origin(hint) is UnionType else (hint,) for name, hint in hints.items()}
    return {name: tuple(get_origin(member) or member for member in members) for name, members in unions.items()}


def _holds_texts(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(part, str) for pair in value.items() for part in pair)
    return not isinstance(value, frozenset | tuple) or all(isinstance(part, str | CatalogueEntry | ExportPreset)
                                                          for part in value)


@dataclass(frozen=True, kw_only=True)
class CatalogueEntry:
    """One model that can be had by a short name. What the model is like stands in its own files, not here."""

    alias: str  # "qwen3-0.6b"
    reference: str  # "hf:Qwen/Qwen3-0.6B"
    licence: str = ""
    gated: bool = False  # whether its owner has to allow the download
    bytes: int | None = None  # of the files that are downloaded, about
    files: tuple[str, ...] = ()  # where the source cannot tell: paths in its repository, URLs of others

    def __post_init__(self) -> None:
        texts = (self.alias, self.reference, self.licence, *self.files)
        size = 0 if self.bytes is None else self.bytes
        if not all(isinstance(text, str) for text in texts) or not isinstance(size, int) or size < 0:
            raise TorchchatError(f"the catalogue entry {quoted(self.alias)} holds a value of the wrong type")


@dataclass(frozen=True, kw_only=True)
class ModelSourceInfo(Description):
    """Where models come from (`schemes`), and which layouts of files are read (`formats`); either may be empty."""

    kind: ClassVar[str] = "model source"
    schemes: frozenset[str] = frozenset()  # "file", "hf", "https", ...: references of this kind are fetched
    formats: frozenset[str] = frozenset()  # "safetensors", "pytorch"; of other single files, the ending: "gguf"
    models: tuple[CatalogueEntry, ...] = ()  # known by short names, for `torchchat list`
    keeps: bool = False  # makes copies of what it fetches, and is then a `KeepingSource`

    @property
    def aliases(self) -> Mapping[str, str]:
        """Short name -> full reference."""
        return {entry.alias: entry.reference for entry in self.models}


@dataclass(frozen=True, kw_only=True)
class TokenizerInfo(Description):
    """A reader of tokenizer files. `order` decides when one folder holds files of several readers: lowest first."""

    kind: ClassVar[str] = "tokenizer"
    files: tuple[str, ...] = ()  # file-name patterns such as "tokenizer.json"
    order: int = 50  # lowest first


@dataclass(frozen=True, kw_only=True)
class QuantizerInfo(Description):
    """Replaces the linear or embedding layers of a model by smaller ones: one description for each scheme."""

    kind: ClassVar[str] = "quantizer"
    scheme: str = ""  # the key of a recipe's section: "linear:int4", "embedding:int8", ...
    devices: frozenset[str] = frozenset()  # of DEVICES
    dtypes: frozenset[str] = frozenset()  # of activations, of DTYPES
    calibrates: bool = False  # can look at what a text makes of the layers, and is then a `CalibratingQuantizer`

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SCHEME.fullmatch(self.scheme):
            raise TorchchatError(f"the scheme of quantizer {self.name!r} is {self.scheme!r}; it has to be like "
                                 "'linear:int4' or 'embedding:int8'")


@dataclass(frozen=True, kw_only=True)
class ExecutorInfo(Description):
    """Runs a model. `reads` names what it loads: "module" (a model in memory) or formats of exported files."""

    kind: ClassVar[str] = "executor"
    reads: frozenset[str] = frozenset()  # "module", or formats of exported files
    devices: frozenset[str] = frozenset()  # of DEVICES
    dtypes: frozenset[str] = frozenset()  # that it computes in, of DTYPES
    schemes: frozenset[str] = frozenset()  # quantisation schemes that it runs; ANY_SCHEME for all
    abilities: frozenset[str] = frozenset()  # of ABILITIES; what is not declared is refused
    platforms: frozenset[str] = frozenset()  # values of sys.platform; empty: everywhere
    order: int = 50  # among the executors that fit, `auto` takes the lowest

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = self.abilities - ABILITIES.keys()
        if unknown:
            raise TorchchatError(f"executor {self.name!r} declares the unknown ability {min(unknown)!r}; known are "
                                 f"{', '.join(ABILITIES)}")

    def require(self, ability: str) -> None:
        """Raises `TorchchatError` where the executor does not declare `ability`."""
        if ability not in self.abilities:
            raise TorchchatError(f"executor {self.name!r} has no ability {ability!r} ({ABILITIES[ability]})",
                                 "choose another one with --executor")


@dataclass(frozen=True, kw_only=True)
class ExportPreset:
    """Choices of `torchchat export` under one name. What the user says himself goes before them."""

    name: str  # "android"
    summary: str  # one line
    quantize: str | None = None  # a recipe, as --quantize takes it
    max_seq_length: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)  # of the exporter, as they are typed

    def __post_init__(self) -> None:
        length = 1 if self.max_seq_length is None else self.max_seq_length
        if not NAME.fullmatch(self.name) or not isinstance(length, int) or length < 1:
            raise TorchchatError(f"the preset {quoted(self.name)} holds a value of the wrong kind")


@dataclass(frozen=True, kw_only=True)
class ExporterInfo(Description):
    """Writes a model to a file that an executor loads later."""

    kind: ClassVar[str] = "exporter"
    writes: str = ""  # the format, which is also an executor's `reads`
    stands_alone: bool = False  # whether its files are those of `artifacts`: with a manifest, tokenizer and template
    suffix: str = ""  # ".pte"
    devices: frozenset[str] = frozenset()  # of DEVICES
    dtypes: frozenset[str] = frozenset()  # of DTYPES
    schemes: frozenset[str] = frozenset()  # quantisation schemes that it exports
    flag: str = ""  # of `torchchat export`, such as "--output-pte-path"; -o with the suffix works in any case
    presets: tuple[ExportPreset, ...] = ()  # for `torchchat export --preset`


@dataclass(frozen=True, kw_only=True)
class CommandInfo(Description):
    """A verb of the command line. `factory` names a click command, which is returned rather than called."""

    kind: ClassVar[str] = "command"
    order: int = 50  # place in the list of `torchchat --help`, lowest first
    group: str = "More commands"  # heading in that list; groups are ordered by their first command. Since: 1.0

    def make(self) -> Any:
        module, _, attribute = self.factory.partition(":")
        return getattr(importlib.import_module(module), attribute)


# ---- what goes from stage to stage --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """What the user called a model, and what that means."""

    text: str  # as typed
    scheme: str  # "file", "embedded", "hf", "https"
    location: str  # a path, a repository id or a URL, without the scheme
    token: str | None = field(default=None, repr=False, compare=False)  # permission to fetch, where the user gave one


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of one model on this machine. No tensors."""

    ref: ModelRef
    format: str
    root: Path  # the folder that holds them
    weights: tuple[Path, ...]
    config: Path | None = None  # config.json or params.json
    config_chosen: bool = False  # by the user, against what the weights themselves may say
    tokenizer: tuple[Path, ...] = ()  # candidates, in no order
    tokenizer_config: Path | None = None
    generation_config: Path | None = None
    chat_template: Path | None = None
    more_chat_templates: tuple[Path, ...] = ()  # NAME.jinja; "tool_use" is for conversations with tools
    revision: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # file name -> sha256 or etag


class Checkpoint(Protocol):
    """Configuration and weights by canonical name, mapped and read when asked for."""

    config: ModelConfig

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; where they are quantised, what they become unless another one is asked for."""

    def names(self) -> Iterable[str]:
        """Canonical names of the tensors, Hugging Face's Llama names."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor of that name, in `dtype` or as it is stored; mapped where nothing has to be converted.

        Raises `KeyError` where there is none.
        """


class LayeredCheckpoint(Checkpoint, Protocol):
    """Some of whose layers are there as core's layers with integer weights, which no quantizer has to make."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """Of those layers, as an executor declares them: "linear:int4", "embedding:int8"."""

    def put_layers(self, model: nn.Module, dtype: torch.dtype, device: str) -> set[str]:
        """Puts them into a model without memory; names of the weights and biases that need no other tensor then.

        Raises `TorchchatError` for a layer that the model does not have, and tensors that are missing or wrong.
        """


def is_layered(checkpoint: object) -> TypeGuard[LayeredCheckpoint]:
    """By its methods alone: `isinstance` would read its properties, and so perhaps the files."""
    return hasattr(type(checkpoint), "put_layers")


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """A quantised matrix as it is stored, in a block format of GGUF."""

    kind: str  # "q4_0", "q4_1", "q8_0", "q4_k"
    shape: tuple[int, int]  # of the matrix that it stands for: outputs, inputs
    data: Tensor  # [outputs, bytes of a row] uint8, mapped: gone from memory when nothing refers to it


class PackedCheckpoint(Checkpoint, Protocol):
    """Of a format that keeps weights quantised."""

    def block_format(self, name: str) -> str | None:
        """How the tensor is stored, as people write it: "Q4_0"; None where it is plain numbers.

        Raises `KeyError` where there is no such tensor.
        """

    def packed(self, name: str) -> PackedTensor | None:
        """The tensor as it is stored, where its block format is one that is run without unpacking, else None.

        Raises `KeyError` where there is no such tensor.
        """


def is_packed(checkpoint: object) -> TypeGuard[PackedCheckpoint]:
    """As `is_layered`."""
    return hasattr(type(checkpoint), "packed")


class ModelSource(Protocol):
    """Finds the files of a reference, or opens them. A source implements what its description declares."""

    def fetch(self, ref: ModelRef) -> ModelFiles: ...

    def open(self, files: ModelFiles) -> Checkpoint: ...


@dataclass(frozen=True, kw_only=True)
class KeptModel:
    """A model of which a source keeps a copy on this machine."""

    reference: str  # that fetches it again: "hf:owner/name@revision"
    path: Path  # of the folder or file
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What the removal of a reference deletes."""

    path: Path  # of the folder or file
    bytes: int  # that become free, about
    models: tuple[KeptModel, ...] = ()  # that are whole until then; none: what a download that was cut off has left


class KeepingSource(ModelSource, Protocol):
    """Of a description with `keeps`. A fetch that was cut off goes on where it was, without fetching twice.

    A model that is wholly here is fetched without the network. A source that may delete more than the one model that a
    reference names has `removal` too, a method that tells what `remove` would delete (a `Removal`, or None for
    nothing), so that the user is asked about that.
    """

    def locate(self, ref: ModelRef) -> ModelFiles | None:
        """What `fetch` would return, where all of it is here; else None. Never touches the network."""

    def kept(self) -> Iterable[KeptModel]:
        """Every model that is wholly here, without touching the network. Raises nothing for damaged copies."""

    def remove(self, ref: ModelRef) -> int:
        """Deletes what was kept of the reference; bytes that became free, 0 where nothing was kept."""


class Tokenizer(Protocol):
    """Text to token ids and back. Ids are whole numbers from 0 to `vocab_size` - 1."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_tokens: Mapping[str, int]  # text -> id of the control tokens, which ordinary text never encodes to
    adds_bos: bool  # whether a prompt of plain text starts with bos_id
    adds_prefix_space: bool  # whether encoding puts a space before text, which decoding from the start takes off
    end_ids: frozenset[int]  # tokens that end an answer besides eos_id, where the tokenizer's file names them
    chat_template: str | Sequence[Mapping[str, str]] | None  # where the tokenizer's file holds one: a Jinja source, or
    # several with "name" and "template", as in tokenizer_config.json
    #
    # Two members are optional. `text_tokens` (Mapping[str, int]) are added tokens that ordinary text can encode to. If
    # a message contains the name of a control token, core passes control tokens as ids to
    # `encode_parts(parts: Sequence[str | int]) -> list[int]`; without it, core encodes the texts in between separately.

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without BOS or EOS. With `special`, the texts of control tokens become their ids."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a whole sequence; control tokens are left out, bytes that are no UTF-8 become U+FFFD."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one token adds to a text; for control tokens the UTF-8 of their name."""


class TokenizerReader(Protocol):
    """What a `TokenizerInfo.factory` makes."""

    def accepts(self, path: Path) -> bool:
        """Whether the file, whose name matched, is one of this reader's."""

    def read(self, path: Path, settings: Mapping[str, Any]) -> Tokenizer:
        """Return the tokenizer of the file; `settings` is the content of tokenizer_config.json, or empty.

        If the tokenizer also depends on other files, the reader can have a method `standalone(path, settings) ->
        Mapping[str, bytes]`: it returns the content of self-contained files by name, for exported files.
        """


class EmbeddedTokenizerReader(TokenizerReader, Protocol):
    """Of tokenizers inside files of another kind, which others than torchchat could not read there."""

    def extract(self, path: Path) -> Mapping[str, bytes]:
        """The tokenizer as files of its own, by name: tokenizer.json or tokenizer.model, tokenizer_config.json."""


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What became of one layer under quantisation."""

    name: str
    scheme: str | None  # None: left alone, for `reason`
    bytes_before: int
    bytes_after: int
    reason: str | None = None  # why it was left alone, or how it differs from the recipe


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """Every layer that a recipe could have touched: done, or left alone and why."""

    layers: tuple[LayerReport, ...]

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)


class Quantizer(Protocol):
    def apply(self, model: nn.Module, options: Any) -> QuantReport:
        """Replaces layers of `model` in place, as `options` (of the description's class) ask."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A text as the model reads it, for quantizers that look at activations. There is at least one window."""

    windows: tuple[tuple[int, ...], ...]  # token ids of sequences from their start, all of one length


class CalibratingQuantizer(Quantizer, Protocol):
    """Of a description with `calibrates`. Whether a text is needed, the options say.

    Where they need one, `calibrate` is called in place of `apply`, and nothing is called without a text.
    """

    def needs_calibration(self, options: Any) -> bool:
        """Whether layers of these options are made with a text."""

    def calibrate(self, model: Transformer, options: Any, calibration: Calibration) -> QuantReport:
        """Replaces layers of `model` in place. Other layers may be quantised already, or quantised afterwards.

        Layers of other sections of the recipe are hidden: they compute, and are no `nn.Linear` or `nn.Embedding`.
        """


class Session(Protocol):
    """One sequence. Not thread-safe."""

    length: int  # tokens held in the KV cache
    limit: int  # tokens that it can hold

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Appends the tokens; logits [vocab], float32 on the CPU, at the last position."""

    def decode(self, token: int) -> Tensor:
        """Appends one token; logits [vocab], float32 on the CPU."""

    def truncate(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""

    def close(self) -> None:
        """Gives the memory back. The session is of no use afterwards."""


class ScoringSession(Session, Protocol):
    """Of an executor with ability `score`."""

    def score(self, tokens: Sequence[int]) -> Tensor:
        """Appends the tokens; logits [n, vocab], float32 on the CPU, at every position."""


class ForkingSession(Session, Protocol):
    """Of an executor with ability `fork`."""

    def fork(self, length: int) -> Session:
        """Another session with the same limit, which holds the first `length` tokens of this one."""


class EmbeddingSession(Session, Protocol):
    """Of an executor with ability `embed`."""

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Appends the tokens; hidden states [n, hidden] behind the last norm, float32 on the CPU."""


class LoadedModel(Protocol):
    """A model that is ready to run."""

    vocab_size: int
    max_context: int  # positions that a session can be asked to hold
    device: str
    dtype: str

    def session(self, limit: int | None = None) -> Session:
        """A new, empty sequence of at most `limit` tokens; None: `max_context`."""

    def close(self) -> None:
        """Gives the memory of the weights back."""


class BatchedModel(LoadedModel, Protocol):
    """Of an executor with ability `batch`."""

    def decode_batch(self, sessions: Sequence[Session], tokens: Sequence[int]) -> Tensor:
        """Appends one token to each of the sessions; logits [sessions, vocab], float32 on the CPU."""


class PromptBatchingModel(BatchedModel, Protocol):
    """Of an executor with ability `prompt_batch`."""

    def prefill_batch(self, sessions: Sequence[Session], prompts: Sequence[Sequence[int]]) -> Tensor:
        """Appends some tokens to each of the sessions, as `Session.prefill` does, and gives the same logits.

        They are those at each one's last token: [sessions, vocab], float32 on the CPU.
        """


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What an executor is given: a module in memory, or an exported file."""

    device: str
    dtype: str  # one of DTYPES, which the module's weights already have
    module: Any = None  # models.transformer.Transformer
    artifact: Path | None = None
    options: Any = None  # of the description's class


class Executor(Protocol):
    def load(self, request: LoadRequest) -> LoadedModel: ...


@dataclass(frozen=True, kw_only=True)
class TextContent:
    """The text side of a model as an exported file holds it: `text_format` made of no other file."""

    tokenizer: Mapping[str, bytes]  # files by name: that of the tokenizer, tokenizer_config.json where there is one
    tokenizer_kind: str  # the `TokenizerInfo.name` of what reads it
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    end_ids: tuple[int, ...]  # each of them ends an answer
    chat_template: str | None = None  # Jinja source; None: no conversations
    tool_template: str | None = None  # that for conversations with tools, where it is another one
    bos_token: str | None = None  # as the templates have it
    eos_token: str | None = None
    sampling: Mapping[str, float | int] = field(default_factory=dict)  # what the model's makers recommend


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What an exporter is given."""

    module: Any  # models.transformer.Transformer
    path: Path
    device: str
    dtype: str  # one of DTYPES, which the module's weights already have
    files: ModelFiles | None = None  # what the module was made of, for tokenizer and chat template
    options: Any = None  # of the description's class
    name: str = "model"  # what the user calls it
    text: TextContent | None = None  # for exporters whose files stand alone
    recipe: Mapping[str, Any] | None = None  # that the module was quantised with, as it was written
    schemes: tuple[str, ...] = ()  # of its quantised layers
    max_seq_length: int | None = None  # tokens that a sequence may have, where the user said so: at most the model's


class Exporter(Protocol):
    def export(self, request: ExportRequest) -> None:
        """Writes the model to `request.path`, whole or not at all."""
