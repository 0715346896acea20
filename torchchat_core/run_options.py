"""Names of devices and dtypes as users type them. Standard library alone: flags and settings are checked with it."""

from __future__ import annotations

from torchchat_core.errors import TorchchatError, did_you_mean, quoted

DTYPES = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda", "mps")
FAST_DEVICES = ("fast", "auto")  # names for the GPU where there is one, else the CPU
FAST_DTYPES = ("fast", "fast16")
DTYPE_NAMES = {"fp32": "fp32", "float32": "fp32", "float": "fp32", "fp16": "fp16", "float16": "fp16", "half": "fp16",
               "bf16": "bf16", "bfloat16": "bf16"}
OTHER_DEVICE_NAMES = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda", "metal": "mps",
                      "apple": "mps", "x86": "cpu", "none": "cpu"}  # of other tools -> ours
OTHER_DTYPE_NAMES = {"f32": "fp32", "f16": "fp16", "int8": "linear:int8", "i8": "linear:int8", "q8": "linear:int8",
                     "q8_0": "linear:int8", "8bit": "linear:int8", "int4": "linear:int4", "i4": "linear:int4",
                     "q4": "linear:int4", "q4_0": "linear:int4", "4bit": "linear:int4"}  # dtypes, and schemes


def check_device(name: str, suggested: str = "--device {}") -> None:
    """Raise `TorchchatError` if no device has that name.

    `suggested` phrases the fix where other tools call a device so.
    """
    if name in (*DEVICES, *FAST_DEVICES):
        return
    base, _, index = name.lower().partition(":")
    meant = OTHER_DEVICE_NAMES.get(base, base)
    if meant not in DEVICES:
        fix = did_you_mean(name, DEVICES)
    elif index.isdecimal() and meant == "cuda":
        fix = f"{suggested.format(meant)}, with CUDA_VISIBLE_DEVICES={index} in the environment"
    else:
        fix = suggested.format(meant)
    raise TorchchatError(f"unknown device {quoted(name)}; known are fast, {', '.join(DEVICES)}", fix)


def check_dtype(name: str, fast: bool = True, suggested: str = "--dtype {}") -> None:
    """Raise `TorchchatError` if no dtype has that name; `fast`: "fast" and "fast16" are names, too.

    For the name of a quantization, the error names the flag that quantizes.
    """
    known = (*(FAST_DTYPES if fast else ()), *DTYPE_NAMES)
    if name in known:
        return
    meant = OTHER_DTYPE_NAMES.get(name.lower().replace("-", ""), name.lower())
    if ":" in meant and name.lower() in OTHER_DTYPE_NAMES:
        fix: str | None = f"--quantize {meant}, which makes the weights smaller"
    else:
        fix = suggested.format(meant) if meant in known else did_you_mean(name, known)
    raise TorchchatError(f"unknown dtype {quoted(name)}; known are {', '.join(known)}", fix)
