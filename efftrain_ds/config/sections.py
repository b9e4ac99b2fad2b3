"""Models of the ``"efftrain"`` section. DeepSpeed's own keys (batch, ZeRO, precision, clipping) are never repeated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ..core.durations import parse_duration
from ..core.strict import StrictModel
from ..data.holdout import HoldOutConfig


def _check_duration(text: str) -> str:
    parse_duration(text)
    return text


def _check_steps(text: str) -> str:
    if parse_duration(text).seconds is not None:
        raise ValueError(f'only steps, epochs and percent are possible here ("500st", "2ep", "10%"), found {text!r}')
    return text


DurationText = Annotated[str, AfterValidator(_check_duration)]
StepText = Annotated[str, AfterValidator(_check_steps)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RunConfig(StrictModel):
    """What is run and where its files go. Exactly one of `epochs` and `steps` is given."""

    seed: int = Field(0, ge=0)
    """Seed of every decision, sample order and augmentation."""
    epochs: float | None = Field(None, gt=0)
    """Budget in epochs at full cost (with a compute-paced method: "equivalent epochs")."""
    steps: int | None = Field(None, gt=0)
    """Budget in optimizer steps, where your own loop fixes it (embedded use)."""
    output: str = "runs/default"
    """Folder for checkpoints, TensorBoard, journal and the resolved configuration."""
    keep_old_state: bool = True
    """Where parameters change in mid-run: keep the old optimizer state until the new one stands, so that a failure is
    rolled back. false frees it piece by piece (less memory, no way back but the last checkpoint)."""

    @model_validator(mode="after")
    def _one_budget(self) -> RunConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError('give "epochs" or "steps", not both')
        return self


class EmaConfig(StrictModel):
    """Exponential moving average of the fp32 master weights, sharded like the ZeRO partitions."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Weight of the old average in one step."""
    warmup: bool = True
    """Use min(decay, (1 + t) / (10 + t)) at step t, so that short runs have a useful average."""


class InitConfig(StrictModel):
    """Weights to start from, and what becomes of their head. A resume goes before it."""

    weights: str = Field(min_length=1)
    """A safetensors file with timm's names, a run folder or checkpoint of ours, or "timm:NAME" for timm's weights."""
    average: bool | None = None
    """Take the average of the weights of a checkpoint of ours; null takes it where there is one."""
    head: Literal["same", "map", "new"] = "same"
    """"same" takes the head as it is, "map" its rows by class, "new" leaves the head as it was drawn."""
    labels: str | None = None
    """With "map": label set of the weights' head, as in data.labels.target."""
    target: str | None = None
    """With "map": label set of this model; null takes data.labels.target, else the shards' class names."""
    missing: Literal["error", "new"] = "error"
    """With "map": "new" draws the rows of classes that the weights' head does not have."""
    head_scale: float = Field(1.0, gt=0)
    """With "new": factor on the drawn head, e.g. 0.001."""

    @model_validator(mode="after")
    def _together(self) -> InitConfig:
        if (self.head == "map") != (self.labels is not None):
            raise ValueError('head "map" and labels belong together: labels names the classes of the weights\' head')
        if self.head != "map" and (self.target is not None or self.missing != "error"):
            raise ValueError('target and missing have an effect with head "map" only')
        if self.head != "new" and self.head_scale != 1.0:
            raise ValueError('head_scale has an effect with head "new" only')
        return self


class ModelConfig(StrictModel):
    """A timm classification model (used by launch/train.py; ignored in embedded use, except `ema`)."""

    name: str = ""
    """Name for timm.create_model."""
    num_classes: int | None = Field(None, gt=0)
    """Number of classes; null takes the data set's."""
    pretrained: bool = False
    """Start from timm's weights; not together with `init`, see `init.weights`."""
    init: InitConfig | None = None
    """Start from weights with another head or image size, see `InitConfig`; null = off."""
    drop_path: Fraction = 0.0
    """Stochastic depth rate of the last block."""
    kwargs: dict[str, Any] = {}
    """Further keyword arguments of timm.create_model."""
    ema: EmaConfig | None = None
    """Keep an average of the weights and evaluate it too; null = off."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelConfig:
        if self.pretrained and self.init is not None:
            name = self.name or "NAME"
            raise ValueError(
                f'pretrained and init do not go together; init.weights = "timm:{name}" starts from timm\'s weights'
            )
        return self


class RandAugmentConfig(StrictModel):
    """RandAugment on the device, one draw a sample (semantics of timm's rand-mM-nN-mstdS-inc1-pP)."""

    magnitude: float = Field(9.0, ge=0, le=10)
    """Strength 0..10 where no curriculum sets it."""
    num_ops: int = Field(2, ge=0)
    """Operations applied to each sample."""
    magnitude_std: float = Field(0.5, ge=0)
    """Standard deviation of the noise on the magnitude."""
    prob: Fraction = 0.5
    """Probability that a chosen operation is applied."""


class LabelsConfig(StrictModel):
    """Train with the classes of a label set; classes are found by name (synset), never by position."""

    target: str
    """imagenet-1k, -12k, -22k, -21k-goog, -22k-ms, -21k-miil or -21k-miil-w21, or a text file with a class a line."""
    source: str | None = None
    """Label set of the indices in the training shards; null takes the class names of their manifest."""
    val_source: str | None = None
    """Same for the held-out split."""
    missing: Literal["error", "drop"] = "error"
    """"drop" leaves out samples of classes that the target does not have, before training."""
    val_missing: Literal["error", "drop"] | None = None
    """Same for the held-out split; null = as `missing`."""


class DataConfig(StrictModel):
    """Shards and what is done to a sample."""

    train: str = ""
    """Folder with a manifest made by "efftrain shards build", "bundled:fashion_mnist/train", or a remote folder: a URL
    (s3, gs, http, https, file) or "pipe:COMMAND" with {name} for the file."""
    val: str | None = None
    """Same for the held-out split; null = no evaluation."""
    hold_out: HoldOutConfig | None = None
    """Without `val`: evaluate on a part of each class of the training shards, which is not trained on; null = off."""
    samples: int | None = Field(None, gt=0)
    """Training samples, needed to plan where the shards are not at hand; checked against the manifest, `labels`
    and `hold_out`."""
    cache_dir: str | None = None
    """Folder of this node for copies of remote shards; null = "remote" in $EFFTRAIN_CACHE, else in "shards"."""
    cache_gb: float = Field(200.0, gt=0)
    """Size of all copies in GB (10^9 bytes); the least recently used go first."""
    allow_pipe: bool = False
    """Let "pipe:" run its command, with a shell, on every node."""
    labels: LabelsConfig | None = None
    """Map the shards' classes to those of a label set; null = the shards' own."""
    resolution: int = Field(224, gt=0)
    """Side of the training images in pixels at full cost."""
    eval_resolution: int | None = Field(None, gt=0)
    """Side of the evaluation images in pixels; null = resolution."""
    stride: int | None = Field(None, gt=0)
    """Total stride of your own model in pixels (embedded use); null asks the model, as timm's models can tell."""
    workers: int = Field(4, ge=0)
    """Loader processes of each rank."""
    prefetch: int = Field(2, ge=1)
    """Batches each worker prepares ahead."""
    streams: int | None = Field(None, gt=0)
    """Streams of the sample order (null: from the world size of the first start, then kept by the checkpoint)."""
    shuffle_block: int = Field(4096, gt=0)
    """Samples shuffled together inside a stream."""
    decoded_cache_mb: int = Field(0, ge=0)
    """Memory of each worker for decoded images (useful for small data sets); 0 = off."""
    replay_memory: Literal["host", "device"] = "host"
    """Where the buffer of replayed samples lies, if a method asks for one."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of RandomResizedCrop."""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect range of RandomResizedCrop."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of RandomResizedCrop and of the evaluation resize (antialiased)."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    randaugment: RandAugmentConfig | None = RandAugmentConfig()
    """RandAugment; null = off."""
    erasing: Fraction = 0.25
    """Probability of random erasing (per-pixel noise)."""
    mixup: float = Field(0.8, ge=0)
    """Beta parameter of mixup; 0 = off."""
    cutmix: float = Field(1.0, ge=0)
    """Beta parameter of cutmix; 0 = off."""
    mix_prob: Fraction = 1.0
    """Probability that a batch is mixed at all."""
    mix_switch: Fraction = 0.5
    """Probability of cutmix where both are on."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Channel means in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Channel standard deviations in 0..1."""
    eval_crop: float = Field(0.875, gt=0, le=1)
    """Evaluation resizes the short side to resolution / eval_crop and takes the centre."""
    eval_batch: int | None = Field(None, gt=0)
    """Samples of one rank in one evaluation step; null = 2 x the training micro-batch."""
    max_bad_fraction: Fraction = 1e-4
    """Share of unreadable training samples at which the run stops (below it they are counted and left out)."""

    @model_validator(mode="after")
    def _one_evaluation(self) -> DataConfig:
        if self.val is not None and self.hold_out is not None:
            raise ValueError('give "val" or "hold_out", not both: they are two sets of images to evaluate on')
        return self


class LayerDecayConfig(StrictModel):
    """Learning rates that fall from the head to the stem, for fine-tuning."""

    rate: float = Field(gt=0, le=1)
    """Rate of a layer as a share of the next one's."""
    groups: int | None = Field(None, gt=0)
    """Merge the blocks into so many layers of equal length; null makes a layer of each block."""


class OptimConfig(StrictModel):
    """Learning-rate schedule over progress, and the loss. The optimizer itself stands in DeepSpeed's section."""

    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: StepText = "5%"
    """Linear warm-up from 0: "20ep", "500st" or "5%" of the budget."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end."""
    layer_decay: LayerDecayConfig | None = None
    """Smaller rates for lower layers, each a share of the one above it (min_lr too); null = off."""
    label_smoothing: Fraction = 0.1
    """Label smoothing of the cross-entropy."""


class CheckpointConfig(StrictModel):
    """Checkpoints of plain tensors under output/checkpoints."""

    every: DurationText | None = "1ep"
    """Interval; null = only at the end."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints to keep."""
    resume: bool = True
    """Go on from the newest checkpoint of the output folder if there is one."""
    background: bool | Literal["sync"] = False
    """true: copy the state in host memory and write it beside the training (needs host memory for one copy); "sync":
    write it, and wait for the disk beside the training."""
    on_signal: bool = True
    """Save and end with exit code 75 on SIGTERM or SIGINT (launch/train.py)."""


class WandbConfig(StrictModel):
    """A run of Weights & Biases beside TensorBoard; needs ``pip install "efftrain-ds[wandb]"``."""

    project: str = Field(min_length=1)
    """Project the run belongs to."""
    entity: str | None = None
    """User or team; null = the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """"offline" needs neither network nor login; send the files later with "wandb sync"."""


class ObserveConfig(StrictModel):
    """What is shown and logged."""

    tensorboard: bool = True
    """Write TensorBoard files under output/tensorboard."""
    wandb: WandbConfig | None = None
    """Also log to Weights & Biases; null = off."""
    log_every: int = Field(50, gt=0)
    """Optimizer steps between two run lines."""
    images_every: StepText | None = "25%"
    """Interval of the pictures of the batch as the network sees it and of the methods' state; null = off."""
    eval_every: StepText = "10%"
    """Interval of the evaluations (one always follows the last step)."""


class GuardConfig(StrictModel):
    """What is watched while training: on where a method is configured or this key is given, and in launch/train.py."""

    nonfinite: bool = True
    """Apply a step with a non-finite loss or gradient on no rank, and say where it came from."""
    gradients: bool = True
    """Look at every rank's own gradients; false looks at the loss, and at what DeepSpeed itself skips."""
    max_nonfinite: int = Field(5, ge=1)
    """Consecutive non-finite steps that end the run (exit code 76)."""
    decisions: bool = True
    """Compare plan, stage, batch, learning rate and methods' choices between the ranks in every step."""
    stall_s: float | None = Field(600, gt=0)
    """Seconds without progress after which all ranks write their stacks and end (exit code 78); null = off. Used by
    launch/train.py; a loop of your own calls engine.guard.watch(folder)."""


class EffTrainConfig(StrictModel):
    """The whole ``"efftrain"`` section."""

    schema_: Literal[1] = Field(1, alias="schema")
    """Version of this section's format."""
    plugins: list[str] = []
    """Modules to import first; they register further methods."""
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    methods: dict[str, Any] = {}
    """Methods that are on, by name; each value is that method's own configuration."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    guard: GuardConfig | None = GuardConfig()
