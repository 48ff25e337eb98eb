"""Files of what subcomponents do in data, for the viewers' panels of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vpd_lens.files import atomic_directory, write_json


@runtime_checkable
class Cards(Protocol):
    """What the export needs of a `vpd_lens.analysis.harvest.Harvest`."""

    def check(self, fingerprint: str) -> None:
        """Raise `ArtefactError` for another decomposition than the one harvested."""
        ...

    def card(self, site: str, index: int) -> dict[str, Any] | None:
        """Everything about a subcomponent, or `None` if it never fired."""
        ...


def write_feature_files(folder: Path, features: dict[int, tuple[str, int]], harvest: Cards) -> None:
    """Write one file per feature into a folder, which is replaced.

    Args:
        folder: The folder.
        features: Site and subcomponent of each feature number.
        harvest: What is known of them.
    """
    with atomic_directory(folder) as new:
        for number, (site, index) in features.items():
            # A file also for those that never fired, as the viewer fails on a missing one.
            card = harvest.card(site, index) or {"density": 0, "examples": [], "output_tokens": []}
            write_json(new / f"{number}.json", _feature(number, f"{site}:{index}", card))


def _feature(number: int, name: str, card: dict[str, Any]) -> dict[str, Any]:
    """A feature in the viewers' format, without the histogram, which a harvest does not have."""
    examples = [_example(example) for example in card["examples"]]
    highest = max((max(example["tokens_acts_list"]) for example in examples), default=1.0)
    return {
        "transcoder_id": name,
        "index": number,
        "examples_quantiles": [{"quantile_name": "Top examples", "examples": examples}],
        "top_logits": [found["token"] for found in card["output_tokens"]],
        "bottom_logits": [],
        "act_min": 0.0,
        "act_max": highest,
        "activation_frequency": card["density"],
    }


def _example(example: dict[str, Any]) -> dict[str, Any]:
    # The viewers colour from 0 up; a subcomponent that is unimportant at a token does nothing.
    strengths = zip(example["importance"], example["activation"], strict=True)
    return {
        "tokens_acts_list": [importance * abs(activation) for importance, activation in strengths],
        "train_token_ind": example["focus"],
        "is_repeated_datapoint": False,
        "tokens": list(example["tokens"]),
    }
