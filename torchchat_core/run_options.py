"""Check names of devices and dtypes as users type them. Imports only the standard library, to keep startup fast."""

from __future__ import annotations

from torchchat_core.errors import TorchchatError, did_you_mean, quoted

DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda", "mps")
FAST_DEVICES = ("fast", "auto")  # names for the GPU where there is one, else the CPU
FAST_DTYPES = ("fast", "fast16")
DTYPE_NAMES = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "fp16": "fp16", "float16": "fp16", "half": "fp16",
               "bf16": "bf16", "bfloat16": "bf16"}
DEVICE_SYNONYMS = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps",
                   "apple": "mps", "x86": "cpu", "none": "cpu"}  # of other tools -> ours
DTYPE_SYNONYMS = {"f32": "fp32", "f16": "fp16", "int8": "linear:int8", "i8": "linear:int8", "q8": "linear:int8",
                  "q8_0": "linear:int8", "8bit": "linear:int8", "int4": "linear:int4", "i4": "linear:int4",
                  "q4": "linear:int4", "q4_0": "linear:int4", "4bit": "linear:int4"}  # -> dtypes and schemes


def check_device(name: str, suggested: str = "--device {}") -> None:
    """Raise `TorchchatError` if no device has that name.

    `suggested` is the template of the fix for a name that other tools use.
    """
    if name in (*DEVICES, *FAST_DEVICES):
        return
    base, _, index = name.lower().partition(":")
    meant = DEVICE_SYNONYMS.get(base, base)
    if meant not in DEVICES:
        fix = did_you_mean(name, DEVICES)
    elif index.isdecimal() and meant == "cuda":
        fix = f"{suggested.format(meant)}, with CUDA_VISIBLE_DEVICES={index} in the environment"
    else:
        fix = suggested.format(meant)
    raise TorchchatError(f"unknown device {quoted(name)}; known are fast, {', '.join(DEVICES)}", fix)


def check_dtype(name: str, fast: bool = True, suggested: str = "--dtype {}") -> None:
    """Raise `TorchchatError` if no dtype has that name. With `fast`, "fast" and "fast16" are valid, too.

    For the name of a quantization, the error suggests --quantize.
    """
    known = (*(FAST_DTYPES if fast else ()), *DTYPE_NAMES)
    if name in known:
        return
    meant = DTYPE_SYNONYMS.get(name.lower().replace("-", ""), name.lower())
    if ":" in meant and name.lower() in DTYPE_SYNONYMS:
        fix: str | None = f"--quantize {meant}, which makes the weights smaller"
    else:
        fix = suggested.format(meant) if meant in known else did_you_mean(name, known)
    raise TorchchatError(f"unknown dtype {quoted(name)}; known are {', '.join(known)}", fix)
