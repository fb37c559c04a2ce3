"""What a user is told when the hub does not give a model, a tokenizer or a data set."""

from __future__ import annotations


def out_of_reach(error: BaseException) -> bool:
    """Whether the cause is that the hub was not asked or did not answer, and the cache does not have it."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        cause = cause.__cause__
    return False


def why_not(error: BaseException) -> str:
    """What transformers or huggingface_hub raised, in one line."""
    from huggingface_hub import constants

    if out_of_reach(error):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"{why} and the cache does not have it"
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    unfinished = first.endswith((":", "Client Error."))
    return f"{first} {more[0]}" if unfinished and more else first


def download_command(name: str, revision: str | None, *options: str) -> str:
    """The command that brings a repository into the cache, at the commit that is asked for."""
    return " ".join(["hf download", name, *options, *([f"--revision {revision}"] if revision else [])])
