"""Decompositions on the Hugging Face hub: `push`, `find` and `published`.

A repository is a decomposition's folder as `vpd.save` writes it, with a card. It may hold more:

| | |
|---|---|
| `report.json`, `*.png` | an evaluation report, and its plots in the card |
| `harvest/` | what its subcomponents respond to |
| `labels.json` | what they are called |
| `model/` | the base model, as a Hugging Face directory |

Whatever goes wrong on the way to the hub becomes a `HubError` here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from vpd_lens import storage
from vpd_lens.decomposition.labels import FILE as LABELS
from vpd_lens.description import DecompositionRecord
from vpd_lens.errors import ArtefactError, HubError, InputError, VPDError, did_you_mean, first_line
from vpd_lens.model_card import REPORT, write_card

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

    from vpd_lens.analysis.harvest import Harvest
    from vpd_lens.decomposition.handle import Decomposition
    from vpd_lens.evaluation.report import EvalReport

MODEL, HARVEST = "model", "harvest"
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Of a Hugging Face directory: configuration, weights and tokenizer, and no pickles.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def find(where: str | Path, revision: str | None = None, also: Collection[str] = ()) -> Path:
    """The folder `where`, or where a repository of that name has been downloaded to.

    Args:
        where: A folder, or `"user/name"` if there is neither such a folder nor a folder `user`.
        revision: A commit, branch or tag; makes `where` a repository.
        also: Folders of the repository that are needed too, such as `"model"` or `"harvest"`.

    Raises:
        ArtefactError: If there is no such folder, or no decomposition in the repository.
        HubError: If the hub cannot be reached, refuses, or has no such repository.
    """
    name = str(where)
    if revision is None:
        folder = Path(where).expanduser()
        try:
            return storage.existing_folder(folder)
        except ArtefactError:
            if not _REPOSITORY.fullmatch(name):
                raise
            if folder.parent.is_dir():  # a misspelt run, and no reason to ask the hub for it
                beside = [str(folder.parent / found) for found in sorted(os.listdir(folder.parent))]
                raise ArtefactError(
                    f"{name}: there is no such directory in {folder.parent}"
                    f"{did_you_mean(name, beside)}. A repository of this name on the hub is asked "
                    'for by revision="main".'
                ) from None
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(name, f"{name}: there is no such directory here. On the hub"):
        try:
            record = Path(hf_hub_download(name, storage.RECORD, revision=revision))
        except RemoteEntryNotFoundError:
            raise ArtefactError(
                f"{name}: there is no {storage.RECORD} in this repository, so it is no "
                "decomposition by vpd_lens. `vpd-lens list --hub` lists those there are."
            ) from None
        wanted = [*storage.read_json(record).get("files", ()), storage.RECORD, REPORT, LABELS]
        wanted += [f"{part}/*" for part in also]
        commit = record.parent.name  # of both calls, though somebody may push in between
        return Path(snapshot_download(name, revision=commit, allow_patterns=wanted))


def push(
    decomposition: Decomposition | str | Path,
    repository: str,
    *,
    report: EvalReport | None = None,
    harvest: Harvest | None = None,
    include_model: bool = False,
    licence: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a decomposition with vpd_lens",
) -> str:
    """Publish a decomposition on the Hugging Face hub, with a card; returns the commit's address.

    It takes an account there, and a token with the right to write (`hf auth login`). The repository
    is made if need be, and all is uploaded in one commit.

    Args:
        decomposition: `model.vpd`, or the folder of a saved one.
        repository: `"user/name"`.
        report: What was measured on it, whose verdict, tables and plots make the card.
        harvest: What its subcomponents respond to. It quotes the texts it was made from.
        include_model: Also upload the base model, as the Hugging Face directory that it was loaded
            from; nobody else could open the decomposition of a model that is not on the hub.
        licence: By the hub's name for it, such as `"mit"`.
        private: Whether a repository that is made is private; `None`: as your account has it.
        revision: A branch, made if need be; `None`: the main one.
        commit_message: What to call the commit.

    Raises:
        InputError: If the report is of another decomposition, or `include_model` asks for a model
            that did not come from a directory.
        ArtefactError: If the harvest is of another decomposition, or a folder is damaged.
        HubError: If the hub cannot be reached or refuses.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise HubError(f"{repository!r} is no name of a repository; expected 'user/name'.")
    with TemporaryDirectory() as place:
        source = Path(place) / "saved"
        if isinstance(decomposition, str | Path):
            source = Path(decomposition).expanduser()
        else:
            decomposition.save(source)
        folder = _shareable(source, Path(place) / "shared", include_model)
        record = storage.read(folder, DecompositionRecord).record
        write_card(folder, record, report, repository, licence)
        if harvest is not None:
            from vpd_lens.decomposition.saving import saved_fingerprint

            harvest.check(saved_fingerprint(folder))
            harvest.save(folder / HARVEST)
        return _upload(folder, repository, private, revision, commit_message)


def _shareable(source: Path, folder: Path, include_model: bool) -> Path:
    """A copy of a decomposition whose record names no directory of this machine."""
    artefact = storage.read(source, DecompositionRecord)
    origin = artefact.record.origin
    path = artefact.folder / origin.source if origin is not None and origin.is_folder else None
    if include_model and path is None:
        raise InputError(
            "include_model: the base model was not loaded from a directory. One on the hub need "
            "not be included; of one that was made in Python, save the Hugging Face model with "
            "save_pretrained, load that directory, and decompose it."
        )
    record = artefact.record
    if origin is not None and path is not None:
        shared = origin.model_copy(update={"source": f"./{MODEL}"}) if include_model else None
        name = Path(record.base_model.model_name or path).name
        base = record.base_model.model_copy(update={"model_name": name})
        record = record.model_copy(update={"origin": shared, "base_model": base})
    if record.other_origin is not None and record.other_origin.is_folder:
        record = record.model_copy(update={"other_origin": None})
    tensors = {name: artefact.tensors(name) for name in ("subcomponents", "causal_importance")}
    storage.write(folder, record, tensors)
    if (artefact.folder / LABELS).is_file():
        shutil.copyfile(artefact.folder / LABELS, folder / LABELS)
    if include_model and path is not None:
        files = [file for pattern in _MODEL_FILES for file in path.glob(pattern)]
        if not any(file.suffix == ".safetensors" for file in files):
            raise InputError(f"include_model: {path} has no weights as safetensors.")
        (folder / MODEL).mkdir()
        for file in files:
            shutil.copyfile(file, folder / MODEL / file.name)
    return folder


def _upload(
    folder: Path, repository: str, private: bool | None, revision: str | None, message: str
) -> str:
    from huggingface_hub import HfApi

    api, one = HfApi(), (REPORT, LABELS)
    with hub_errors(repository, f"{repository}: nothing was published. On the hub"):
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            # Of an earlier one, what this one has no more.
            delete_patterns=["*.safetensors", "*.png", *one, f"{MODEL}/*", f"{HARVEST}/*"],
        )
    return str(commit.commit_url)


def published(search: str | None = None, author: str | None = None) -> list[ModelInfo]:
    """The decompositions on the hub: all, those that `search` finds, or those of an author.

    Raises:
        HubError: If the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with hub_errors("", "The decompositions on the hub cannot be listed"):
        found = HfApi().list_models(
            filter="vpd_lens", search=search, author=author, cardData=True, full=True
        )
        return list(found)


@contextmanager
def hub_errors(repository: str, what: str) -> Iterator[None]:
    """Make whatever the hub's client raises a `HubError` that says what to do."""
    try:
        yield
    except VPDError:
        raise
    except Exception as error:  # of the client, of its HTTP library, of the operating system
        raise HubError(f"{what}: {_advice(repository, error)}") from None


def _advice(repository: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"access to {repository} has to be granted; ask for it on its page, and log in."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no such revision. Check the commit, branch or tag."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no {repository!r}, or it is private and you are not logged in. Check the "
            "name, or run `hf auth login`."
        )
    if status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError):
        return (
            f"you have no permission ({first_line(error)}). Run `hf auth login` with a token that "
            "has the right to write, and check that the user or organisation is yours."
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} cannot be the name of a repository."
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, so only what was downloaded before can be had. Unset it."
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return f"the hub answered {first_line(error)}. Try again later."
    return (
        f"it cannot be reached ({type(error).__name__}: {first_line(error)}). Check the network "
        "and HF_ENDPOINT."
    )
