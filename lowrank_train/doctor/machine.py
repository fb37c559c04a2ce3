"""What the machine offers: GPUs and their driver, processors, memory, disk, network, Slurm."""

from __future__ import annotations

import http.client
import importlib
import os
import re
import shutil
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_train.config.launch import started_by
from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor.finding import Finding, Verdict, first_line
from lowrank_train.doctor.installation import installed

LEAST_FREE_BYTES = 2 * 10**8  # less does not hold the checkpoints of a model of 10M parameters
FEW_FREE_BYTES = 2 * 10**10  # a checkpoint of 1B parameters with AdamW's moments, all in float32, takes 12 GB
HUB_SEC = 2.0
DRIVER = Path("/proc/driver/nvidia/version")  # there where NVIDIA's kernel driver is loaded


def cuda(_: RunConfig) -> Iterator[Finding]:
    """Driver, torch's CUDA and Triton."""
    driver = DRIVER.read_text(errors="replace") if DRIVER.exists() else shutil.which("nvidia-smi") or ""
    number = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", driver)
    name = f"NVIDIA driver {number[0]}" if number else "an NVIDIA driver" if driver else "no NVIDIA driver"
    torch = sys.modules.get("torch")
    if torch is None:
        yield Finding("cuda", "note", f"{name}; nothing more is known without torch")
        return
    built = torch.version.cuda
    if torch.cuda.is_available():
        yield Finding("cuda", "ok", f"{built or 'not NVIDIA'} in torch, {name}")
        yield triton()
    elif driver and built is None:
        yield Finding("cuda", "fault", f"{name}, but torch is built without CUDA", "install a CUDA build: pytorch.org")
    elif driver:
        why = refusal(torch)
        yield Finding("cuda", "fault", f"{name}, but CUDA {built} of torch does not start: {why}", "update the driver")
    else:
        yield Finding("cuda", "note", f"{name}: training runs on the CPU")


def refusal(torch: Any) -> str:
    """Why CUDA does not start, in the words of the driver."""
    try:
        torch.cuda.init()
    except Exception as error:  # noqa: BLE001  (RuntimeError, AssertionError, or the driver's own)
        return first_line(error)
    return "no GPU is visible (CUDA_VISIBLE_DEVICES?)"


def triton() -> Finding:
    lacking = "the kernels' plain torch versions run, which take longer and more memory"
    version = installed("triton")
    if version is None:
        return Finding("triton", "note", f"not installed: {lacking}", "pip install triton")
    try:
        importlib.import_module("triton")
    except Exception as error:  # noqa: BLE001  (a broken installation may raise anything)
        return Finding("triton", "note", f"cannot be imported ({error}): {lacking}", "pip install --upgrade triton")
    return Finding("triton", "ok", version)


def gpus(_: RunConfig) -> Iterator[Finding]:
    """Every visible GPU, with a product computed on it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return
    for index in range(torch.cuda.device_count()):
        part = f"gpu {index}"
        capability = torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        bf16 = capability >= (8, 0)
        words = f"{torch.cuda.get_device_name(index)}, {in_gib(total)}, capability {capability[0]}.{capability[1]}"
        words += ", bf16" if bf16 else ", no bf16"
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            works = (ones @ ones).sum().item() == 64**3
        except RuntimeError as error:
            yield Finding(part, "fault", f"{words}: {first_line(error)}", "install a torch for this GPU")
            continue
        if not works:
            yield Finding(part, "fault", f"{words}: computes a wrong product", "do not use it")
        elif free < 0.9 * total:
            yield Finding(
                part, "note", f"{words}; only {in_gib(free)} are free", "see nvidia-smi for who holds the rest"
            )
        else:
            yield Finding(part, "ok" if bf16 else "note", words, "" if bf16 else "use precision=fp32")


def cpu(_: RunConfig) -> Iterator[Finding]:
    from lowrank_train.memory.host import main_memory_bytes, processors

    cores, (total, free) = processors(), main_memory_bytes()
    yield Finding("cpu", "ok", f"{cores:g} processors, {in_gib(total)} of main memory, {in_gib(free)} free")
    torch = sys.modules.get("torch")
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) if torch is None else torch.get_num_threads()
    many = threads > cores
    fix = f"set OMP_NUM_THREADS={max(1, int(cores))} or trainer.threads" if many else ""
    yield Finding("threads", "note" if many else "ok", f"{threads} of torch" if threads else "torch's choice", fix)
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    spins = policy.lower() != "passive"
    fix = "OMP_WAIT_POLICY=passive: threads that spin slow down everything else" if spins else ""
    yield Finding("OMP_WAIT_POLICY", "note" if spins else "ok", policy, fix)


def disk(config: RunConfig) -> Iterator[Finding]:
    """Room and the right to write where runs go."""
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    words = f"{config.output_dir} (in {folder})"
    elsewhere = "set output_dir=FOLDER on another disk"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        yield Finding("disk", "fault", f"{words} cannot be written: {error.strerror}", elsewhere)
        return
    free = shutil.disk_usage(folder).free
    verdict: Verdict = "fault" if free < LEAST_FREE_BYTES else "note" if free < FEW_FREE_BYTES else "ok"
    yield Finding("disk", verdict, f"{in_gib(free)} free for {words}", "" if verdict == "ok" else elsewhere)


def network(_: RunConfig) -> Iterator[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        yield Finding("network", "ok", "off by HF_HUB_OFFLINE: local data, and what was downloaded before")
        return
    why = unreachable(endpoint)
    if not why:
        yield Finding("network", "ok", f"{endpoint} answers")
        return
    fix = "fine for local data; HF_HUB_OFFLINE=1 keeps libraries from trying"
    yield Finding("network", "note", f"{endpoint} is not reached ({why})", fix)


def unreachable(url: str) -> str:
    """Why there is no answer within HUB_SEC, looking up the name included; nothing where there is one."""
    answer = [f"nothing within {HUB_SEC:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SEC):
                answer[0] = ""
        except urllib.error.HTTPError:  # an answer, if not a friendly one
            answer[0] = ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            answer[0] = str(getattr(error, "reason", error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SEC)
    return answer[0]


def slurm(_: RunConfig) -> Iterator[Finding]:
    tools = [tool for tool in ("srun", "sbatch") if shutil.which(tool)]
    job, tasks = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_NTASKS", "1")
    if job is None:
        yield Finding("slurm", "ok", f"not in a job; {' and '.join(tools)} found" if tools else "none on this machine")
    elif tasks != "1" and started_by(os.environ) == "alone":
        yield Finding(
            "slurm", "note", f"in job {job} of {tasks} tasks, not started by srun", "srun python train.py ..."
        )
    else:
        yield Finding("slurm", "ok", f"in job {job}, {tasks} task{'' if tasks == '1' else 's'}")


def in_gib(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB"
