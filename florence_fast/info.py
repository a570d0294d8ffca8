"""Facts about a machine for a bug report, collected with few imports."""

import importlib.metadata
import os
import platform
from typing import Any

from florence_fast import env
from florence_fast.version import __version__

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pillow",
    "simplejpeg",
    "safetensors",
    "huggingface_hub",
    "tokenizers",
    "transformers",
    "tensorboard",
    "nvtx",
)
Rows = list[dict[str, Any]]


def collect() -> dict[str, Rows]:
    """Return the tables that ``florence-fast info`` prints: title -> rows, each a column -> value."""
    return {
        "versions": versions(),
        "devices": devices(),
        "precision": precision(),
        "environment": environment(),
        "ops": ops(),
    }


def versions() -> Rows:
    """Versions of this package, of Python, and of the packages that change what it does."""
    rows = [
        {"name": "florence_fast", "version": __version__},
        {"name": "python", "version": platform.python_version()},
        {"name": "system", "version": f"{platform.system()} {platform.release()} {platform.machine()}"},
    ]
    for package in PACKAGES:
        try:
            rows.append({"name": package, "version": importlib.metadata.version(package)})
        except importlib.metadata.PackageNotFoundError:
            rows.append({"name": package, "version": "not installed"})
    return rows


def devices() -> Rows:
    """The processor with torch's threads and vector instructions, our kernels, the decoder, and every CUDA device."""
    import torch

    from florence_fast import native
    from florence_fast.data import jpeg

    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads and {vectors}"
    kernels = f"{native.level()}; {', '.join(native.levels())} run here" if native.levels() else native.reasons()[0]
    rows = [
        {"device": "cpu", "what": cpu},
        {"device": "cpu, native kernels", "what": kernels},
        {"device": "cpu, JPEG files", "what": f"decoded by {jpeg.decoder_name()}"},
    ]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        what = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability {card.major}.{card.minor}"
        rows.append({"device": f"cuda:{index}", "what": what})
    if not torch.cuda.is_available():
        rows.append({"device": "cuda", "what": "none found"})
    return rows


def precision() -> Rows:
    """What "auto", the default of every command, means on each device, and why."""
    import torch

    from florence_fast.precision import choose_precision

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return [{"device": name, **choose_precision("auto", name)._asdict()} for name in names]


def environment() -> Rows:
    """Every variable of ours with its present value, then those of others that explain a surprise."""
    ours = [{"variable": v.name, "value": env.read(v.name), "meaning": v.meaning} for v in env.VARIABLES]
    others = [name for name in env.OF_OTHERS if name in os.environ]
    return ours + [{"variable": name, "value": os.environ[name], "meaning": "not ours"} for name in others]


def ops() -> Rows:
    """Which backend each op would use for an ordinary input on the best device here, and every reason against others.

    Raises:
        ValueError: FLORENCE_FAST_BACKEND names no backend.
    """
    from florence_fast.ops import explain
    from florence_fast.ops.dispatch import backend_in_force

    forced, rows, chosen = backend_in_force(), [], set()
    for op, backend, reasons in explain():
        takes_it = not reasons and op not in chosen and forced in ("auto", backend)
        chosen |= {op} if takes_it else set()
        verdict = ["used here"] if takes_it else reasons or ["could run"]
        rows.append({"op": op, "backend": backend, "here": verdict})
    return rows
