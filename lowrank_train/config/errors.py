"""What stops the program on purpose, and the exit code each cause has."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FAILURE = 1
EXIT_USAGE = 2  # the user wrote something wrong; as argparse and click
EXIT_OUT_OF_MEMORY = 3
EXIT_NOT_FINITE = 4  # the loss became NaN or infinite
EXIT_DISK_FULL = 5
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM


class UserError(ValueError):
    """One or more faults in what the user wrote or gave; each says the key, the value, the rule and the way out."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class RunStopped(RuntimeError):
    """A run that ended early for a known reason; nothing saved is lost."""

    def __init__(self, reason: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(reason)
