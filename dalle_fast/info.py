"""Say what is installed, what was built, and what can run on this machine."""

from __future__ import annotations

import importlib
import json
import os
import platform

import dalle_fast

PACKAGES = ("torch", "triton", "numpy")
ATTENTION = ("reference", "cpu", "triton")  # modules of dalle_fast.ops.attention


def add_arguments(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 0


def collect() -> dict:
    """Facts about the installation and the machine, ready for JSON.

    Returns:
        versions: of dalle_fast, python and PACKAGES, None where one is not installed.
        platform, cpu: strings. threads: what torch, and so this package, uses.
        native: `build_info` of the native module with its instruction sets (`available`, and `active`, None where
            `isa_error` says why), and `why_cuda_cannot_run` on this machine; or {"error": why it does not load}.
        gpus: names and compute capabilities; why_no_gpu is None where there is one.
        attention: device type -> implementation -> reasons why it cannot serve float32 heads of 64 there; empty = can.
    """
    import torch

    from dalle_fast.provenance import cpu_model, version

    has_gpu = torch.cuda.is_available()
    native = _native()
    attention = {device: _attention_on(device) for device in (["cpu", "cuda"] if has_gpu else ["cpu"])}
    if native.get("isa_error"):
        attention["cpu"]["cpu"].append(native["isa_error"])
    return {
        "versions": {
            "dalle_fast": dalle_fast.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": f"{cpu_model()}, {os.cpu_count()} logical cores",
        "threads": torch.get_num_threads(),
        "native": native,
        "gpus": [_gpu(x) for x in range(torch.cuda.device_count())] if has_gpu else [],
        "why_no_gpu": None if has_gpu else _why_no_gpu(),
        "attention": attention,
    }


def _native() -> dict:
    from dalle_fast import _extension

    if failure := _extension.why_missing():
        return {"error": failure}
    module = _extension.native()
    try:
        active, isa_error = module.instruction_set(), None
    except ValueError as error:
        active, isa_error = None, str(error)
    sets = {"available": module.instruction_sets(), "active": active, "isa_error": isa_error}
    return {**module.build_info(), "why_cuda_cannot_run": _extension.why_no_cuda(), **sets}


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return "torch sees none (no driver, or no device)"


def _attention_on(device: str) -> dict[str, list[str]]:
    import torch

    from dalle_fast.masks import row_mask

    heads = torch.zeros(1, 1, 4, 64, device=device)
    return {
        name: importlib.import_module(f"dalle_fast.ops.attention.{name}").why_not(heads, heads, heads, row_mask(0, 2))
        for name in ATTENTION
    }


def as_text(facts: dict) -> str:
    """The facts of `collect`, one a line."""
    versions = facts["versions"]
    lines = [(name, versions[name] or "not installed") for name in versions]
    lines += [("platform", facts["platform"]), ("cpu", f"{facts['cpu']}, {facts['threads']} threads used")]
    native = facts["native"]
    if "error" in native:
        lines.append(("native module", native["error"]))
    else:
        openmp = "with OpenMP" if native["openmp"] else "without OpenMP, so on one thread"
        lines.append(("native module", f"built by {native['compiler']} {openmp}"))
        active = f"{native['active']} in use" if native["active"] else native["isa_error"]
        lines.append(("instruction sets", f"{', '.join(native['available'])}; {active}"))
        if native["cuda"]:
            reason = native["why_cuda_cannot_run"]
            built = f"built by nvcc {native['cuda']} for {native['cuda_architectures']}"
            lines.append(("CUDA kernels", f"{built}; they cannot run here: {reason}" if reason else built))
        else:
            lines.append(("CUDA kernels", f"none, built for CPUs only: {native['why_no_cuda']}"))
    lines += [("GPU", gpu) for gpu in facts["gpus"]] or [("GPU", f"none: {facts['why_no_gpu']}")]
    for device, implementations in facts["attention"].items():
        for name, reasons in implementations.items():
            lines.append((f"attention, {device}", f"{name}: {'; '.join(reasons) or 'yes'}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)
