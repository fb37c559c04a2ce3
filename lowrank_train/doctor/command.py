"""`lowrank doctor`: what of this machine is ready for training, a line for each part, with the fix where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict

from lowrank_train.config.schema import RunConfig
from lowrank_train.doctor.finding import Finding, Verdict, first_line
from lowrank_train.doctor.installation import extras, packages, python, torch_itself
from lowrank_train.doctor.machine import cpu, cuda, disk, gpus, network, slurm

Probe = Callable[[RunConfig], Iterable[Finding]]

PROBES: dict[str, tuple[Probe, bool]] = {  # and whether training needs what is examined
    "python": (python, True),
    "torch": (torch_itself, True),
    "packages": (packages, True),
    "extras": (extras, False),
    "cuda": (cuda, False),
    "gpu": (gpus, True),
    "cpu": (cpu, False),
    "disk": (disk, True),
    "network": (network, False),
    "slurm": (slurm, False),
}
QUICK = ("python", "packages", "disk", "slurm")  # in a second, beside a run that needs all of the GPU's memory


def doctor(config: RunConfig) -> int:
    """Print what every probe found; 1 where something is broken that training needs."""
    findings = examined(config)
    healthy = all(finding.verdict != "fault" for finding in findings)
    if config.format == "json":
        print(json.dumps({"ok": healthy, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("\n".join(finding.line() for finding in findings))
    return 0 if healthy else 1


def examined(config: RunConfig) -> list[Finding]:
    """The findings of all probes, or of the quick ones; one that crashes becomes a line, and the others go on."""
    findings: list[Finding] = []
    for part, (probe, needed) in PROBES.items():
        if config.quick and part not in QUICK:
            continue
        try:
            for finding in probe(config):
                findings.append(finding)  # one by one: what was found before a crash stays
        except Exception as error:  # noqa: BLE001  (what is broken here may raise anything)
            verdict: Verdict = "fault" if needed else "note"
            words = f"could not be examined: {type(error).__name__}: {first_line(error)}"
            findings.append(Finding(part, verdict, words))
    return findings
