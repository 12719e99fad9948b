"""Models by their id at the Hugging Face hub: out of its cache, or fetched into it.

Where the cache is, with which token and whether the network may be asked at all, is said as everywhere: `HF_HOME`,
`HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.
"""

from collections.abc import Callable
from pathlib import Path

from planes.assets import FILES_OF_INTEREST
from planes.wire.errors import HeadraceError

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What vLLM loads a model from, its own code (`--trust-remote-code`) included."""
_COPIES = ("original/*", "metal/*", "consolidated*")
"""The same weights in other forms."""


class ModelNotFetched(HeadraceError):  # noqa: N818 - names what is wrong
    """Neither the hub's cache here nor the hub gave the model."""

    code = "model_not_fetched"


def fetched_model(model: str, revision: str | None, *, has_weights: bool, progress: Callable[[str], None]) -> Path:
    """The directory of a model's snapshot, fetched where it is not in the cache.

    Args:  revision: branch, tag or commit; None: main.  has_weights: without them only what a gateway needs.
    Raises:  ModelNotFetched.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - half a second, and few need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    disable_progress_bars()
    progress(f"looking for {model} in the hub's cache and at the hub")
    wanted = [*FILES_OF_INTEREST, *(_WEIGHTS if has_weights else ())]
    name = model if revision is None else f"{model} at revision {revision}"
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=list(_COPIES))
    except GatedRepoError as exc:
        raise ModelNotFetched(f"{name} is gated: ask for access at the hub and set HF_TOKEN") from exc
    except RevisionNotFoundError as exc:
        raise ModelNotFetched(f"{model} has no revision {revision} at the hub (--revision)") from exc
    except RepositoryNotFoundError as exc:
        raise ModelNotFetched(
            f"{name} is no directory here and unknown at the hub; if it is private, set HF_TOKEN"
        ) from exc
    except LocalEntryNotFoundError as exc:
        raise ModelNotFetched(
            f"{name} is no directory here, not in the hub's cache {_cache()}, and the hub cannot be asked "
            f"({_why(exc)}): fetch it where there is a network (hf download) and bring the cache, or name a directory"
        ) from exc
    except (HFValidationError, HfHubHTTPError, OSError) as exc:
        raise ModelNotFetched(f"{name} could not be fetched from the hub: {' '.join(str(exc).split())}") from exc
    needed = ["tokenizer.json", *(["config.json"] if has_weights else [])]
    if missing := [each for each in needed if not Path(found, each).is_file()]:
        raise ModelNotFetched(f"{name}: its snapshot {found} has no {' and no '.join(missing)}")
    return Path(found)


def _cache() -> str:
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    return str(HF_HUB_CACHE)


def _why(exc: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    cause = exc.__cause__ or exc
    return f"{type(cause).__name__}: {' '.join(str(cause).split())}"
