"""The model of "Find the circuit of a behaviour" while the page is built."""

from pathlib import Path

import vpd_lens
from vpd_lens.experiments.quickstart_target import get_target
from vpd_lens.models import load_model

TARGET_STEPS, STEPS = 700, 120
folder = Path("runs/quickstart")
if (folder / "vpd" / "decomposition").exists():
    made = "The outputs on this page are those of `runs/quickstart`."
else:
    folder = Path("runs/docs")
    made = (
        f"The outputs on this page are those of a smaller run, made while the page was built: "
        f"{TARGET_STEPS} steps of the target's training and {STEPS} of the decomposition's."
    )
    if not (folder / "vpd" / "decomposition").exists():
        target, tokens, _ = get_target(folder / "target", TARGET_STEPS, 0)
        config = vpd_lens.VPDConfig.small(steps=STEPS)
        begun = (folder / "vpd" / "checkpoint").exists()
        run = {"output": folder / "vpd", "resume": begun, "progress": False}
        vpd_lens.decompose(target, tokens, config, **run)
model = vpd_lens.load(folder / "vpd" / "decomposition", load_model(folder / "target"))
