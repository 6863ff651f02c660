"""A folder or a hub id -> a checkpoint folder on disk, checked. No code of a checkpoint is downloaded."""

import errno
import fnmatch
import hashlib
import logging
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import constants, get_cached_repo_tree, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    CacheNotFound,
    DryRunError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

from ov_decidiffusion.arguments import check_path
from ov_decidiffusion.conversion.checkpoint import (
    EMBEDDED_CHECKPOINT,
    OPTIONAL_FILES,
    PLAIN_FILES,
    SHARDS,
    TINY_FILES,
    WEIGHTED_PARTS,
    Access,
    check_checkpoint,
    check_tiny_decoder,
    missing_files,
    missing_message,
)
from ov_decidiffusion.errors import CheckpointError
from ov_decidiffusion.model_folder.integrity import read_json
from ov_decidiffusion.model_folder.layout import TINY_DECODER
from ov_decidiffusion.model_folder.writing import check_disk

logger = logging.getLogger(__name__)

# By Ollin Boer Bohan, MIT licence; for the latents of Stable Diffusion's autoencoder, which has this scaling factor.
TINY_DECODER_ON_HUB, TINY_SCALING_FACTOR = "madebyollin/taesd", 0.18215
LOCAL_HINT = (
    f"Without a network, use the embedded checkpoint ({EMBEDDED_CHECKPOINT}), or give the path of a folder that "
    "holds a downloaded checkpoint."
)


def find_checkpoint(
    checkpoint: str | Path,
    revision: str | None = None,
    allow_pickles: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """Turn a folder or a hub id into a checked folder on disk.

    Args:
        checkpoint: a local folder in the layout of ``Deci/DeciDiffusion-v1-0``, or a hub id such as that one.
            From the hub only the needed files are downloaded, into the hub's own cache, and compared with the hashes
            that the hub states. Broken connections are resumed, and after an interruption finished files are not
            downloaded again. ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` are honoured.
        revision: a branch, tag or commit of the hub's repository; its main branch by default.
        allow_pickles: accept weights that exist as a pickle only. They are read without running code, but safetensors
            cannot hold code in the first place.
        token: the access token for the hub; None takes the one from ``hf auth login`` or HF_TOKEN.
        local_files_only: use the hub's cache only, and contact no hub.

    Raises:
        CheckpointError: the folder lacks a part, a file is cut short, or the hub cannot provide the checkpoint.

    Example:
        >>> from ov_decidiffusion import find_checkpoint
        >>> find_checkpoint("checkpoints/tiny-decidiffusion").name
        'tiny-decidiffusion'
    """
    folder = check_path("checkpoint", checkpoint, "a folder or a hub id")
    if not folder.is_dir():
        if folder == EMBEDDED_CHECKPOINT:
            raise CheckpointError(
                "The embedded checkpoint comes with the project's repository, in checkpoints/tiny-decidiffusion, and "
                "not with the installed library: clone the repository and give that folder, or give a hub id such as "
                "'Deci/DeciDiffusion-v1-0'."
            )
        if folder.is_absolute() or str(checkpoint).startswith((".", "~")) or str(checkpoint).count("/") != 1:
            raise CheckpointError(
                f"`checkpoint` must be a folder or a hub id such as 'Deci/DeciDiffusion-v1-0', got '{checkpoint}', "
                "which is no folder here."
            )
        folder = _download(str(checkpoint), Access(revision, allow_pickles, token, local_files_only))
    check_checkpoint(folder, allow_pickles)
    return folder


def discard_download(repo_id: str) -> int:
    """Delete a repository from the hub's cache; a converted folder does not need it.

    Returns:
        the number of bytes freed; 0 if nothing was there.
    """
    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return 0
    kept = [repo for repo in cache.repos if repo.repo_type == "model" and repo.repo_id == repo_id]
    plan = cache.delete_revisions(*(revision.commit_hash for repo in kept for revision in repo.revisions))
    plan.execute()
    return plan.expected_freed_size


def find_tiny_decoder(checkpoint: Path, local: bool) -> Path | None:
    """The folder of a tiny decoder for a checkpoint's latents; None if there is none.

    Args:
        checkpoint: a checked folder; its own ``tiny_decoder/`` is preferred.
        local: look nowhere else. Otherwise, if the checkpoint has Stable Diffusion's latents, the published tiny
            decoder for them is downloaded. If that fails, a warning is logged, and the conversion goes on without it.
    """
    if (checkpoint / TINY_DECODER).is_dir():
        return checkpoint / TINY_DECODER
    vae = read_json(checkpoint / "vae" / "config.json")
    latents = vae.get("scaling_factor", TINY_SCALING_FACTOR), vae.get("latent_channels", 4)  # diffusers' defaults
    if local or latents != (TINY_SCALING_FACTOR, 4):
        return None
    try:
        folder = Path(snapshot_download(TINY_DECODER_ON_HUB, allow_patterns=list(TINY_FILES)))
        _check_hashes(folder, TINY_FILES)
        check_tiny_decoder(folder, vae)
        from ov_decidiffusion.conversion.torch_modules import (
            load_tiny_decoder,  # takes seconds, and most checkpoints have no tiny decoder
        )

        load_tiny_decoder(folder)
        return folder
    except Exception as error:  # whatever it is, the checkpoint is complete without a tiny decoder
        logger.warning(
            'There is no tiny decoder in this folder: %s cannot be downloaded (%s). Everything but decoder="tiny" '
            "works; to have it, delete the folder later and convert again.",
            TINY_DECODER_ON_HUB,
            error,
        )
        return None


def _download(repo_id: str, access: Access) -> Path:
    place = f"'{repo_id}'" + (f" at revision '{access.revision}'" if access.revision else "")
    endpoint = urllib.parse.urlsplit(constants.ENDPOINT)
    if endpoint.scheme == "http" and endpoint.hostname not in ("127.0.0.1", "localhost", "::1"):
        logger.warning(
            "HF_ENDPOINT is %s: over plain http, anybody on the network path can change files.", constants.ENDPOINT
        )
    try:
        wanted, new = _needed_files(repo_id, access)
        options = {"revision": access.revision, "token": access.token, "local_files_only": access.local_files_only}
        folder = Path(snapshot_download(repo_id, allow_patterns=wanted, **options))
        _check_hashes(folder, new)
        return folder
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{place} asks you to accept its terms first: open {constants.ENDPOINT}/{repo_id}, accept them, and "
            "log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{place} does not exist: check the revision, or leave it out for 'main'.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{place} does not exist on {constants.ENDPOINT}, is private, or is gone, and is no folder here: check the "
            f"spelling. {LOCAL_HINT}"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{place} is no valid hub id: {error}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(f"The disk filled up while {place} was downloaded: {error}") from error
        raise _unavailable(place, error, access.local_files_only) from error
    except (HfHubHTTPError, EntryNotFoundError, XetDownloadError, OfflineModeIsEnabled) as error:
        raise _unavailable(place, error, access.local_files_only) from error
    except MemoryError:
        raise
    except Exception as error:  # raised by the libraries that fetch and parse answers, which change between versions
        if _is_of_the_connection(error):
            raise _unavailable(place, error) from error
        raise CheckpointError(
            f"{place} cannot be downloaded: {constants.ENDPOINT} does not answer as a hub does "
            f"({type(error).__name__}: {error}); is HF_ENDPOINT right? {LOCAL_HINT}"
        ) from error


def _is_of_the_connection(error: BaseException) -> bool:
    """Whether the connection failed, by the name of the error's class: the hub's library may use any HTTP library."""
    return isinstance(error, ConnectionError) or "TransportError" in {kind.__name__ for kind in type(error).__mro__}


def _unavailable(place: str, error: BaseException, local_files_only: bool = False) -> CheckpointError:
    """An error that says why the hub does not provide a checkpoint, with its HTTP status if it answered."""
    cause, status = error, None
    while cause is not None and status is None:  # the hub's refusal may be the cause of a cache error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__ or cause.__context__
    if constants.HF_HUB_OFFLINE:
        why = "HF_HUB_OFFLINE is set and it is not in the cache"
    elif local_files_only:
        why = "`local_files_only` is set and it is not in the cache"
    elif status is not None:
        why = f"the hub answers {status}"
    elif isinstance(error, LocalEntryNotFoundError) or _is_of_the_connection(error):
        why = "no connection"
    else:
        why = str(error)
    return CheckpointError(f"{place} cannot be downloaded from {constants.ENDPOINT}: {why}. {LOCAL_HINT}")


def _needed_files(repo_id: str, access: Access) -> tuple[list[str], list[str]]:
    """The files that are needed, with one kind of weights per part and never code; and those of them to download."""
    everything = [*PLAIN_FILES, *OPTIONAL_FILES]
    for part, (config, weights) in WEIGHTED_PARTS.items():
        everything += [f"{part}/{name}" for name in (config, *weights, SHARDS)]
    revision = access.revision
    try:
        if access.local_files_only:
            raise DryRunError("only the cache is to be used")
        options = {"revision": revision, "token": access.token, "dry_run": True}
        files = snapshot_download(repo_id, allow_patterns=everything, **options)
        # A mirror may not state a size: such a file counts as one byte, since it has to be downloaded all the same.
        to_download = {file.filename: (file.file_size or 1) if file.will_download else 0 for file in files}
    except DryRunError:  # the hub cannot be reached; the cache may have everything
        try:
            to_download = {file.path: 0 for file in get_cached_repo_tree(repo_id, revision=revision)}
        except CachedRepoTreeNotFoundError:
            return everything, everything  # the download will fail, and its error says why
    missing = missing_files(to_download)
    if missing:
        raise CheckpointError(missing_message(f"'{repo_id}'", missing, to_download))
    chosen = [name for name in (*PLAIN_FILES, *OPTIONAL_FILES) if name in to_download]
    for part, (config, weights) in WEIGHTED_PARTS.items():
        chosen.append(f"{part}/{config}")
        chosen += [f"{part}/{name}" for name in weights if f"{part}/{name}" in to_download][:1]
        if chosen[-1].endswith(".json"):
            chosen += fnmatch.filter(to_download, f"{part}/{SHARDS}")
    size = sum(to_download.get(name, 0) for name in chosen)
    try:
        if size:  # a cache that has everything may be read-only
            remedy = "free some space, or set HF_HOME to another disk"
            check_disk(Path(constants.HF_HUB_CACHE), size, f"'{repo_id}'", remedy)
    except OSError as error:
        raise CheckpointError(str(error)) from error
    return chosen, [name for name in chosen if to_download.get(name)]


def _check_hashes(folder: Path, names: Iterable[str]) -> None:
    """Compare downloaded files with the names of their blobs, which are the hashes that the hub stated.

    Raises:
        CheckpointError: a file has another hash than the hub stated; it is removed, so that it is downloaded again.
    """
    for name in names:
        if not (folder / name).is_file():
            continue
        blob = (folder / name).resolve()
        hashed = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
        with blob.open("rb") as opened:
            while piece := opened.read(1 << 24):
                hashed.update(piece)
        if len(blob.name) in (40, 64) and hashed.hexdigest() != blob.name:
            (folder / name).unlink()
            blob.unlink(missing_ok=True)
            raise CheckpointError(
                f"{name} is not what {constants.ENDPOINT} says that it is: its hash is {hashed.hexdigest()} and "
                f"should be {blob.name}. It was removed; try again."
            )
