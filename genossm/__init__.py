"""genossm: state-space models for 100-kb DNA windows, from FASTA and peaks to genome-wide predictions.

The public names are loaded when first used (PEP 562), so `import genossm` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "AccessibilityModel": "genossm.models.accessibility",
    "Genome": "genossm.genome",
    "Interval": "genossm.interval",
    "PreparedDataset": "genossm.dataset",
    "WindowDataset": "genossm.loaders",
    "WindowLoader": "genossm.stream_loader",
    "check": "genossm.pipelines.check",
    "compare": "genossm.pipelines.compare",
    "evaluate": "genossm.pipelines.evaluate",
    "fetch": "genossm.pipelines.fetch",
    "load": "genossm.checkpoint",
    "merge": "genossm.pipelines.merge",
    "model_info": "genossm.pipelines.model_info",
    "predict": "genossm.pipelines.predict",
    "prepare": "genossm.pipelines.prepare",
    "simulate": "genossm.pipelines.simulate",
    "train": "genossm.pipelines.train",
}

__all__ = [
    "AccessibilityModel",
    "Genome",
    "Interval",
    "PreparedDataset",
    "WindowDataset",
    "WindowLoader",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "fetch",
    "load",
    "merge",
    "model_info",
    "predict",
    "prepare",
    "simulate",
    "train",
]

if TYPE_CHECKING:
    from genossm.checkpoint import load
    from genossm.dataset import PreparedDataset
    from genossm.genome import Genome
    from genossm.interval import Interval
    from genossm.loaders import WindowDataset
    from genossm.models.accessibility import AccessibilityModel
    from genossm.pipelines.check import check
    from genossm.pipelines.compare import compare
    from genossm.pipelines.evaluate import evaluate
    from genossm.pipelines.fetch import fetch
    from genossm.pipelines.merge import merge
    from genossm.pipelines.model_info import model_info
    from genossm.pipelines.predict import predict
    from genossm.pipelines.prepare import prepare
    from genossm.pipelines.simulate import simulate
    from genossm.pipelines.train import train
    from genossm.stream_loader import WindowLoader
else:
    # Hidden from type checkers: to them a misspelled name stays an error.
    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'genossm' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
