"""What `model_info` finds: the numbers, as plain values and as a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the GPU in a training step.

    Attributes:
        weights: parameters and buffers.
        gradients: of the step before, which are there until the backward pass begins.
        optimiser: AdamW's two averages.
        average: the running average of the weights.
        kept: what the forward pass keeps for the backward pass, with the batch.
        temporary: what there is beside all that when most is in use.
        libraries: workspaces of cuBLAS, one in each of the two threads that multiply.
        peak: the sum; `torch.cuda.max_memory_allocated()` of a step kernel by kernel.
        graphs: what CUDA graphs hold beyond that, where `train` records them; else 0.
        operator: what runs at the peak.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    kept: int
    temporary: int
    libraries: int
    peak: int
    graphs: int
    operator: str

    @property
    def in_all(self) -> int:
        """Bytes that PyTorch holds for training as `train` does it."""
        return self.peak + self.graphs


@dataclass(frozen=True)
class PredictionMemory:
    """Bytes on the GPU while predicting, named as for training."""

    weights: int
    temporary: int
    libraries: int
    peak: int
    operator: str


@dataclass(frozen=True)
class Measured:
    """`torch.cuda.max_memory_allocated()` of real steps on `device`, in bytes, and the estimates over it."""

    device: str
    training: int | None
    training_ratio: float | None
    prediction: int | None
    prediction_ratio: float | None


@dataclass(frozen=True)
class ModelInfo:
    """What `model_info` finds.

    Attributes:
        name: the configuration or run.
        parameters: by part: stem, each kind of mixer, MLPs, norms, decoder, heads.
        layers: layers of each kind of mixer.
        bin_bp, trunk_bp: base pairs of an output bin, and of a bin of the layers.
        receptive_field_bp: base pairs that an output may depend on; None where that is unlimited.
        strands: what `predict` gives, see `AccessibilityModel.strands`.
        length_bp, batch_size: what the costs are for.
        precision, prediction_precision: what training and prediction compute in on a GPU.
        forward_flops: of one forward pass of the batch.
        training_flops: of the forward and backward pass.
        prediction_flops: of `predict`, which runs both strands where it averages them.
        training, prediction: memory, None where not asked for.
        measured: None where not asked for.
    """

    name: str
    parameters: dict[str, int]
    layers: dict[str, int]
    bin_bp: int
    trunk_bp: int
    receptive_field_bp: int | None
    strands: str
    length_bp: int
    batch_size: int
    precision: str
    prediction_precision: str
    forward_flops: int | None = None
    training_flops: int | None = None
    prediction_flops: int | None = None
    training: TrainingMemory | None = None
    prediction: PredictionMemory | None = None
    measured: Measured | None = None

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "total_parameters": self.total_parameters}

    def text(self) -> str:
        """All of it for people."""
        reach = "unlimited" if self.receptive_field_bp is None else f"{self.receptive_field_bp:,} bp"
        trunk = "" if self.trunk_bp == self.bin_bp else f" from layers at {self.trunk_bp} bp"
        lines = [
            f"{self.name}: {self.total_parameters:,} parameters",
            f"output bins of {self.bin_bp} bp{trunk}; receptive field: {reach}",
            "",
        ]
        for part, count in self.parameters.items():
            layers = f", {self.layers[part]} x" if part in self.layers else ""
            lines.append(f"  {part + layers:28}{count:>14,}")
        lines += ["", f"for {self.batch_size} x {self.length_bp:,} bp"]
        bases = self.batch_size * self.length_bp
        for name, flops in (
            ("forward", self.forward_flops),
            ("forward and backward", self.training_flops),
            ("predict", self.prediction_flops),
        ):
            if flops is not None:
                lines.append(f"  {name:28}{flops / 1e9:>14,.1f} GFLOP  {flops / bases / 1e6:.3f} MFLOP/bp")
        for name, memory in (
            (f"training memory, {self.precision}", self.training),
            (f"prediction memory, {self.prediction_precision}", self.prediction),
        ):
            if memory is not None:
                lines.append(f"  {name:28}{memory.peak / 2**30:>14.3f} GiB    most in {memory.operator}")
                parts = {
                    part: size for part, size in asdict(memory).items() if isinstance(size, int) and size
                }
                del parts["peak"]
                parts.pop("graphs", None)
                lines += [f"    {part:26}{size / 2**20:>14,.1f} MiB" for part, size in parts.items()]
                if isinstance(memory, TrainingMemory) and memory.graphs:
                    lines.append(f"  {'training, with CUDA graphs':28}{memory.in_all / 2**30:>14.3f} GiB")
        lines += _measured_lines(self.measured)
        return "\n".join(lines)


def _measured_lines(measured: Measured | None) -> list[str]:
    if measured is None:
        return []
    lines = ["", f"measured on {measured.device}"]
    for name, size, ratio in (
        ("training memory", measured.training, measured.training_ratio),
        ("prediction memory", measured.prediction, measured.prediction_ratio),
    ):
        if size is not None and ratio is not None:
            lines.append(f"  {name:24}{size / 2**30:>12.3f} GiB   estimate / measured {ratio:.3f}")
    return lines
