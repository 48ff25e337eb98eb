"""One good decomposition that ships with the library: of a small model of Python code."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from vpd_lens import storage
from vpd_lens.analysis.harvest import Harvest
from vpd_lens.decomposition import Decomposition
from vpd_lens.decomposition.saving import load
from vpd_lens.errors import ArtefactError
from vpd_lens.evaluation import EvalReport
from vpd_lens.models import load_model

FOLDER = Path(__file__).parent / "assets" / "example"
MODEL, DECOMPOSITION, HARVEST, REPORT = "model", "decomposition", "harvest", "report.json"


class ExampleRecord(storage.Record):
    """What is stored of the example beside its parts, each of which has its own record."""

    kind: ClassVar[str] = "example"
    python: str  # whose standard library's sources the model was trained on
    target_loss: float  # nats per token, held out


def load_example(folder: Path = FOLDER, device: str = "cpu") -> nn.Module:
    """A four-layer TransformerBridge that writes Python, with its decomposition as `model.vpd`.

    About a million parameters, 1024 tokens, a context of 128; trained on the sources of Python's
    standard library, as was its decomposition, by `examples/train_example.py`. Offline.

    Args:
        folder: Another one that `examples/train_example.py` wrote.
        device: Where to put it: `"cpu"`, `"cuda"`, `"cuda:N"`, or `"auto"` for CUDA if there is.

    Raises:
        ArtefactError: If a file is missing or was changed.

    Examples:
        >>> import vpd_lens
        >>> model = vpd_lens.load_example()
        >>> with model.vpd.masked("rounded", threshold=0.1):
        ...     print(model.generate("import o", max_new_tokens=4, do_sample=False, verbose=False))
    """
    _checked(folder)
    return load(folder / DECOMPOSITION, load_model(folder / MODEL, device=device))


def example_harvest(vpd: Decomposition | None = None, folder: Path = FOLDER) -> Harvest:
    """What every subcomponent of the example responds to: fewer tokens and examples than usual.

    Raises:
        ArtefactError: If a file is missing or was changed, or it is not of `vpd`.
    """
    _checked(folder)
    return Harvest.load(folder / HARVEST, vpd)


def example_report(folder: Path = FOLDER) -> EvalReport:
    """What was measured on the example, on text it was not trained on, with its audit and verdict.

    Raises:
        ArtefactError: If the file is missing or was changed.
    """
    _checked(folder)
    return EvalReport.from_json(folder / REPORT)


def _checked(folder: Path) -> None:
    """Refuse a folder of which any file is not as it was written."""
    try:
        artefact = storage.read(folder, ExampleRecord)
        for name in artefact.files:
            artefact.file(name)
    except ArtefactError as error:
        raise ArtefactError(f"the example is damaged: {error} Reinstall vpd-lens.") from None
