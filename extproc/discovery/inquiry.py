"""Asks one engine whether it is up, and what it is."""

from collections.abc import Mapping, Sequence

from extproc.discovery.fetch import Client, FetchError, fetch
from extproc.discovery.info import MODEL_INFO_PATHS, SERVER_INFO_PATHS, WorkerInfo, parse_info


async def check_health(
    client: Client, base_url: str, path: str, timeout_s: float, headers: Mapping[str, str]
) -> str | None:
    """None when the engine says that it is up (a 2xx status), else why it is taken to be down.

    SGLang's `/health` answers 503 while the model loads and while the engine shuts down.
    """
    try:
        answer = await fetch(client, f"{base_url}/{path.removeprefix('/')}", timeout_s=timeout_s, headers=headers)
    except FetchError as error:
        return str(error)
    return None if 200 <= answer.status < 300 else f"{path} answered status {answer.status}"


async def ask_info(client: Client, base_url: str, timeout_s: float, headers: Mapping[str, str]) -> WorkerInfo:
    """What the engine says about itself; empty when it says nothing. The second endpoint completes the first."""
    info = await _first_answer(client, base_url, SERVER_INFO_PATHS, timeout_s, headers)
    if info.model is None or info.mode is None:
        info = info.completed_by(await _first_answer(client, base_url, MODEL_INFO_PATHS, timeout_s, headers))
    return info


async def _first_answer(
    client: Client, base_url: str, paths: Sequence[str], timeout_s: float, headers: Mapping[str, str]
) -> WorkerInfo:
    for path in paths:
        try:
            answer = await fetch(client, base_url + path, timeout_s=timeout_s, headers=headers)
        except FetchError:
            return WorkerInfo()  # no answer at all: the older name of the same endpoint would not get one either
        if answer.status == 200:
            info = parse_info(answer.body)
            if not info.empty:
                return info
    return WorkerInfo()
