"""Files of both forms: they run alone, agree with eager, and say why where they do not run."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tc_aoti import compiling, executor, exporter, loading
from tc_aoti.executor import AotiExecutor, AotiModel
from tc_aoti.exporter import LibraryExporter
from tc_aoti.plain_programs import plain_programs_of
from tc_aoti.programs import Program
from torchchat_core import kernels
from torchchat_core.artifacts import Manifest, Target, open_artifact
from torchchat_core.errors import TorchchatError
from torchchat_core.manifest_fields import Fields
from torchchat_core.models.transformer import Transformer
from torchchat_core.models.weights import TORCH_DTYPES
from torchchat_core.pipeline import ModelRequest, open_model
from torchchat_core.plugins import load_registry
from torchchat_core.quantization.layers import WeightFormat
from torchchat_core.quantization.replacing import quantise_layers
from torchchat_core.specs import ExportRequest, LoadRequest
from torchchat_core.testing.models import reference_logits, seeded, tiny_config, variant_config

FORMS = ("m.pt2", "m.so")
TOKENS = [1, 403, 407, 261, 378, 432, 383]


def alone(file: Path, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`torchchat generate` in a fresh process, in an empty folder, without compilers and without a cache."""
    for name in ("here", "cache", "programs"):
        (folder / name).mkdir()
    names = {"HOME": str(folder), "XDG_CACHE_HOME": str(folder / "cache"), "PATH": str(folder / "programs"),
             "TORCHCHAT_CONFIG": str(folder / "none.toml"), "TMPDIR": str(folder), **environment}
    command = [sys.executable, "-m", "torchchat_core", "generate", str(file), "--temperature", "0"]
    return subprocess.run([*command, *map(str, arguments)], cwd=folder / "here", env=names, capture_output=True,
                          text=True, check=False)


def load(file: Path) -> AotiModel:
    return AotiExecutor().load(LoadRequest(device="cpu", dtype="fp32", artifact=file))


# ---- on their own -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_stories260k_prints_the_golden_text_anywhere(form: str, stories: Path, testdata: Path, tmp_path: Path) -> None:
    file = Path(shutil.copyfile(stories / form, tmp_path / f"copy of {form}"))
    done = alone(file, tmp_path, "--prompt", "", "--max-new-tokens", 200)
    assert (done.returncode, done.stdout) == (0, (testdata / "golden/stories260K/runc_t0_n200.txt").read_text())
    # Progress alone is on standard error; whether there is a line of it depends on how long the first load takes.
    assert all(line.startswith("testing the file in a separate process") for line in done.stderr.splitlines())
    assert not list((tmp_path / "cache").rglob("*.so"))  # nothing was compiled, nor kept


@pytest.mark.parametrize("form", FORMS)
def test_tinystories_gives_the_golden_tokens_anywhere(form: str, tiny_stories: Path, testdata: Path, tmp_path: Path
                                                      ) -> None:
    case = json.loads((testdata / "golden/TinyStories-656K/greedy_ids.json").read_text())["prompts"][0]
    expected = case["ids"][len(case["prompt_ids"]) :]
    done = alone(tiny_stories / form, tmp_path, "--prompt", case["prompt"], "--max-new-tokens", len(expected), "--json")
    found = json.loads(done.stdout)
    assert found["token_ids"] == [token for token in expected if token != 2]


@pytest.mark.parametrize("form", FORMS)
def test_quantised_files_agree_with_eager(form: str, quantised: Path, testdata: Path) -> None:
    registry = load_registry()
    recipe = json.dumps(open_artifact(quantised / form).manifest.recipe)
    eager = ModelRequest(model=str(testdata / "hf/TinyStories-656K"), dtype="bf16", device="cpu", quantize=recipe,
                         executor="eager")
    tokens = [1, 5, 9, 300, 20, 7, 8, 40, 11, 12, 13, 14, 15, 16, 17, 18, 19]
    logits = []
    for request in (eager, ModelRequest(model=str(quantised / form))):
        with open_model(request, registry) as opened:
            session: Any = opened.model.session()
            scores = session.score(tokens)
            logits.append(torch.cat([scores, session.decode(21)[None], session.decode(22)[None]]))
    error = (logits[0] - logits[1]).abs().max() / logits[0].abs().max()
    assert error < 0.03


def test_weights_stand_in_the_file_once(quantised: Path, stories: Path) -> None:
    for folder in (quantised, stories):
        for form in FORMS:
            artifact = open_artifact(folder / form)
            with zipfile.ZipFile(folder / form) as archive:
                sizes = {info.filename: info.file_size for info in archive.infolist()}
            stored = sum(size for name, size in sizes.items() if "torchchat/weights/" in name)
            assert artifact.manifest.weight_bytes <= stored < 1.05 * artifact.manifest.weight_bytes + 50_000
            program = artifact.place("program")[1]
            assert program < 4_000_000  # which is code, whatever the size of the weights


def test_pytorchs_own_loader_runs_the_package(stories: Path) -> None:
    """With the inputs in the order that docs/artifacts.md gives."""
    artifact = open_artifact(stories / "m.pt2")
    ours = load(stories / "m.pt2")
    cache = artifact.manifest.runtime["cache"]
    keys, values = ([torch.zeros(cache["kv_heads"], 32, cache["head_dim"]) for _ in range(cache["layers"])]
                    for _ in range(2))
    program = torch._inductor.aoti_load_package(str(stories / "m.pt2"))
    logits = program(torch.tensor(TOKENS), torch.tensor([0, 0]), torch.tensor([len(TOKENS) - 1]), keys, values,
                     ours._programs["any"].weights)
    torch.testing.assert_close(logits[0], ours.session().prefill(TOKENS))


def test_the_cache_takes_what_the_sequence_is_long(stories: Path) -> None:
    session = load(stories / "m.so").session()
    session.prefill(TOKENS)
    assert session.cache.all_rooms(1)[0][0].shape[1] == 256
    assert session.limit == 512


# ---- where they do not run ----------------------------------------------------------------------------------------


def test_kernels_that_are_switched_off_are_named(stories: Path, tmp_path: Path) -> None:
    done = alone(stories / "m.so", tmp_path, TORCHCHAT_CPU_KERNELS="off")
    assert done.returncode == 1
    assert "m.so calls core's CPU kernels, and they cannot be loaded: TORCHCHAT_CPU_KERNELS is off" in done.stderr


def test_a_processor_without_the_instructions_is_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if open_artifact(stories / "m.so").manifest.target.instructions is None:
        pytest.skip("this kind of processor has no instructions to choose from")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(TorchchatError, match=r"m\.so needs a processor with AVX2, and this one has DEFAULT"):
        load(stories / "m.so")


@pytest.mark.parametrize(("here", "words"), [(None, "there is none here that PyTorch can use"),
                                             ("sm_80", "this one is sm_80")])
def test_another_gpu_is_refused(here: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(loading, "gpu_architecture", lambda: here)
    manifest = Manifest(kind="aoti-package", model="m", config=tiny_config(), dtype="bf16", max_seq_length=16,
                        target=Target(device="cuda", instructions="sm_90"), versions={"torch": torch.__version__})
    file: Any = SimpleNamespace(manifest=manifest, path=Path("m.pt2"))
    with pytest.raises(TorchchatError, match=f"m.pt2 was made for a GPU of the architecture sm_90, and {words}"):
        loading.check_machine(file, Fields({}, "the runtime"))


def test_another_pytorch_is_refused(stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.torch, "__version__", "9.1.0")
    with pytest.raises(TorchchatError, match=r"was compiled for PyTorch \d+\.\d+, and this is 9\.1"):
        load(stories / "m.so")


@pytest.mark.parametrize(("change", "words"), [
    (lambda runtime: runtime["operators"].update({"torchchat::none": "x"}), "none of that name"),
    (lambda runtime: runtime.update(interface=kernels.INTERFACE + 1),
     f"calls version {kernels.INTERFACE + 1} of core's kernels, and those of this torchchat are version "
     f"{kernels.INTERFACE} "),
    (lambda runtime: runtime.pop("interface"), "calls version unknown of core's kernels"),
    (lambda runtime: runtime["decoder"]["tensors"].pop(), "decoder .* cannot be put together: a decoder of"),
    (lambda runtime: runtime["decoder"]["tensors"].__setitem__(0, "none"), "decoder .* cannot be put together: 'none'"),
    (lambda runtime: runtime["decoder"]["numbers"].__setitem__(1, 3), "decoder .* cannot be put together: 8 heads"),
    (lambda runtime: runtime["decoder"]["scalars"].__setitem__(0, float("nan")), "'scalars'"),
    (lambda runtime: next(iter(runtime["tensors"].values())).update(shape=[1 << 39, 1 << 39]), "which are not"),
    (lambda runtime: next(iter(runtime["tensors"].values())).update(dtype="int4"), "'dtype'"),
    (lambda runtime: next(iter(runtime["tensors"].values())).update(entry="weights/none"), "has no entry"),
    (lambda runtime: runtime["programs"]["any"]["weights"].append("none"), "takes the weight 'none'"),
    (lambda runtime: runtime["programs"]["any"]["weights"].pop(),
     "'any' .* takes 61 inputs, but the file has 47 weights"),
    (lambda runtime: runtime["programs"]["any"]["weights"].append("model.norm.weight"),
     "has 49 weights .* makes 62 inputs"),
    (lambda runtime: runtime["programs"].pop("any"), "no program for several tokens"),
    (lambda runtime: runtime["programs"]["any"].update(library="programs/none.so"), "has no entry"),
])
def test_a_runtime_that_cannot_be_true_is_refused(stories: Path, monkeypatch: pytest.MonkeyPatch, words: str,
                                                  change: Callable[[dict[str, Any]], object]) -> None:
    artifact = open_artifact(stories / "m.so")
    change(artifact.manifest.runtime)  # type: ignore[arg-type]
    monkeypatch.setattr(executor, "open_artifact", lambda _path: artifact)
    with pytest.raises(TorchchatError, match=words):
        load(stories / "m.so")


def test_a_model_in_memory_is_not_run() -> None:
    with pytest.raises(TorchchatError, match="runs exported files"):
        AotiExecutor().load(LoadRequest(device="cpu", dtype="fp32", module=seeded(tiny_config())))


# ---- exporting ----------------------------------------------------------------------------------------------------


def request(path: Path) -> ExportRequest:
    return ExportRequest(module=seeded(tiny_config()), path=path, device="cpu", dtype="fp32")


def test_a_program_is_compiled_once(tmp_path: Path, compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    LibraryExporter().export(request(tmp_path / "first.so"))
    monkeypatch.setattr(compiling, "_compile", None)
    LibraryExporter().export(request(tmp_path / "second.so"))
    assert (tmp_path / "first.so").read_bytes() == (tmp_path / "second.so").read_bytes()


def test_a_compiler_that_breaks_is_told_and_leaves_nothing(tmp_path: Path, compiler: None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the compiler broke\nand said more")

    monkeypatch.setattr(compiling, "_trace", fail)
    with pytest.raises(TorchchatError, match=r"cannot compile the model: RuntimeError: the compiler broke \("):
        LibraryExporter().export(request(tmp_path / "m.so"))
    assert not list(tmp_path.iterdir())


def test_without_kernels_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "off")
    with pytest.raises(TorchchatError, match="TORCHCHAT_CPU_KERNELS is off"):
        LibraryExporter().export(request(tmp_path / "m.so"))


def test_exporting_leaves_the_module_as_it_was(tmp_path: Path, compiler: None) -> None:
    asked = request(tmp_path / "m.so")
    before = [(name, type(layer)) for name, layer in asked.module.named_modules()]
    LibraryExporter().export(asked)
    assert [(name, type(layer)) for name, layer in asked.module.named_modules()] == before


def test_the_manifest_names_no_path_of_the_machine_that_made_the_file(stories: Path) -> None:
    artifact = open_artifact(stories / "m.so")
    assert str(Path.home()) not in json.dumps(artifact.content)
    assert os.sep not in artifact.manifest.model


# ---- programs of PyTorch's operators alone, as CUDA has them ------------------------------------------------------


def quantised_model(variant: str, bits: int | None) -> Transformer:
    module = seeded(variant_config(variant))
    if bits is not None:
        quantise_layers(module, "linear:int4", WeightFormat(bits=bits, group_size=32, asymmetric=bits == 4))
    return module


@pytest.mark.parametrize(("variant", "bits"), [("sliding-layers", 4), ("longrope", None)])
def test_programs_without_kernels_say_what_the_model_says(variant: str, bits: int | None, tmp_path: Path,
                                                          compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for the CPU here: the graph is that of CUDA."""
    def plain(module: Transformer, dtype: str) -> list[Program]:
        return plain_programs_of(copy.deepcopy(module), TORCH_DTYPES[dtype])

    monkeypatch.setattr(exporter, "programs_of", plain)
    path = tmp_path / "m.so"
    module = quantised_model(variant, bits)
    LibraryExporter().export(ExportRequest(module=module, path=path, device="cpu", dtype="fp32"))
    runtime = open_artifact(path).manifest.runtime
    assert (runtime["kernels"], runtime["operators"], runtime["decoder"]) == (None, {}, None)
    tokens = [(7 * i) % 96 for i in range(24)]
    session = load(path).session()
    expected = reference_logits(module, tokens)
    given = [session.score(tokens[:9]), session.prefill(tokens[9:17])[None], session.decode(tokens[17])[None]]
    session.truncate(12)
    given += [session.score(tokens[12:20]), *(session.decode(token)[None] for token in tokens[20:])]
    torch.testing.assert_close(torch.cat(given), expected[[*range(9), 16, 17, *range(12, 24)]], rtol=1e-4, atol=1e-4)
