"""megascale: pretraining and continual training of language models on megatron-core.

`plan` lays one batch of sequences out on ranks; `model_cost` says what they take. `load_run` reads
what a config describes, `train` runs it, `read_metrics` reads what a run has measured. What a
training loop of your own needs beside a plan is in `megascale.mesh`, parts of planners are in
`megascale.planner`.
"""

from typing import TYPE_CHECKING

from megascale.exports import lazily

if TYPE_CHECKING:
    from megascale import mesh as mesh
    from megascale import planner as planner
    from megascale.api import load_run as load_run
    from megascale.api import model_cost as model_cost
    from megascale.api import plan as plan
    from megascale.api import read_metrics as read_metrics
    from megascale.api import train as train

__version__ = "0.2.0"

__all__ = ["load_run", "model_cost", "plan", "read_metrics", "train"]

_PACKAGES = {name: f"{__name__}.{name}" for name in ("mesh", "planner")}

__getattr__, __dir__ = lazily(__name__, {**dict.fromkeys(__all__, "megascale.api"), **_PACKAGES})
