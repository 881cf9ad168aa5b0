"""The schema of a config: its sections as frozen models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StringConstraints, model_validator
from pydantic.json_schema import GenerateJsonSchema

from hvd_lars import optimizers, sources
from hvd_lars.config.schedule import Schedule
from hvd_lars.optimizers import LarsSettings, Optimizer
from hvd_lars.settings.durations import Duration
from hvd_lars.settings.fields import DurationField, PeriodField, Positive, Section, key
from hvd_lars.sources import Data
from hvd_lars.tuning import TuneSettings

# Sections with several kinds, chosen by their ``name``.
KINDS = {"data": sources.KINDS, "optimizer": optimizers.KINDS}
_STEPS = r"^steps [1-9][0-9]*-[1-9][0-9]*$"
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Run(Section):
    """Folder, seed, limits and console of a run."""

    name: Name = key(
        binds="nothing",
        default="run",
        description="used in the run folder's name and on the console",
    )
    dir: str | None = key(
        binds="nothing", default=None, description="run folder; runs/NAME-TIME when absent"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = key(
        binds="run",
        default=0,
        description="seeds weights, sample order, augmentation and dropout",
    )
    expect_world_size: Positive | None = key(
        binds="nothing", default=None, description="refuse any other world size"
    )
    allow_other_data: bool = key(
        binds="nothing",
        default=False,
        description="resume or evaluate with data that differs from the run's; applies once",
    )
    max_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = key(
        binds="nothing",
        default=None,
        description="stop with a checkpoint and exit code 75 after this many hours",
    )
    rank_timeout: Annotated[float, Field(ge=5, allow_inf_nan=False)] = key(
        binds="nothing",
        default=120.0,
        description="end the job after this many seconds without a heartbeat from a rank",
    )
    stall_timeout: Annotated[float, Field(ge=5, allow_inf_nan=False)] = key(
        binds="nothing",
        default=1800.0,
        description="end the job after this many seconds without progress on any rank",
    )
    console: Literal["auto", "bar", "lines", "none"] = key(
        binds="nothing",
        default="auto",
        description="auto: a bar in a terminal, lines elsewhere and under a launcher",
    )
    loggers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...], Field(strict=False)
    ] = key(binds="nothing", default=(), description="programs that also receive the records")


class Comm(Section):
    """How ranks communicate."""

    backend: Literal["auto", "horovod", "mpi", "local"] = key(
        binds="nothing",
        default="auto",
        description="auto: horovod for several ranks, or mpi if it is missing; local for one",
    )
    bucket_mb: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = key(
        binds="nothing",
        default=25.0,
        description="gradients are summed in buckets of this many MiB; auto: the size with the "
        "fastest trial step",
    )
    compression: Literal["none", "fp16"] = key(
        binds="nothing",
        default="none",
        description="fp16: all-reduce gradients as scaled float16 (Horovod only)",
    )


class Model(Section):
    """The network: one of hvd_lars, a torchvision classifier, ``timm/NAME``, or one's own."""

    name: str = key(
        binds="run and recipe",
        default="digits_alexnet",
        description="a network of hvd_lars, a torchvision classifier, timm/NAME, or "
        "package.module:function of your own",
    )
    options: dict[str, Any] = key(
        binds="run and recipe",
        default={},
        description="keyword arguments of the network's constructor or of your function",
    )
    init_from: str | None = key(
        binds="recipe",
        default=None,
        description="weights to start from: a run folder, .safetensors or .pth",
    )
    zero_init_last_gamma: bool = key(
        binds="run and recipe",
        default=False,
        description="residual branches start at zero (Goyal et al. 2017, §5.1)",
    )
    fc_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = key(
        binds="run and recipe",
        default=None,
        description="standard deviation of the last layer's initial weights; its bias is 0",
    )
    bn_momentum: Annotated[float, Field(gt=0, le=1)] | None = key(
        binds="run and recipe",
        default=None,
        description="weight of each batch in BatchNorm's running statistics",
    )
    bn_sync_ranks: Positive = key(
        binds="run and recipe",
        default=1,
        description="compute BatchNorm statistics over groups of this many ranks",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = key(
        binds="run",
        default=None,
        description="decay of a moving average of the weights, which is evaluated too",
    )
    checkpoint_blocks: bool = key(
        binds="nothing",
        default=False,
        description="activation checkpointing of residual blocks, to save memory",
    )


class Train(Section):
    """Length, batch sizes and precision of training, and the intervals of its records."""

    duration: DurationField = key(binds="run and recipe", description="length of the whole run")
    global_batch: Positive = key(
        binds="run and recipe", description="samples per step, over all ranks"
    )
    micro_batch: Positive = key(
        binds="nothing",
        default=256,
        description="maximum samples per rank and pass; determines the accumulation",
    )
    eval_batch: Positive = key(
        binds="nothing", default=512, description="samples that a rank evaluates at once"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = key(
        binds="run and recipe",
        default=0.0,
        description="share of the label spread over all classes",
    )
    precision: Literal["fp32", "bf16", "fp16"] = key(
        binds="run and recipe",
        default="fp32",
        description="precision of forward and backward; weights and sums stay float32",
    )
    channels_last: bool = key(
        binds="nothing", default=False, description="memory format of images and weights"
    )
    verify_every: Positive | None = key(
        binds="nothing",
        default=None,
        description="steps between checks that all ranks have the same parameter checksum",
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = key(
        binds="recipe",
        default=10,
        description="consecutive steps that may be skipped because a gradient is not finite",
    )
    compile: bool = key(binds="nothing", default=False, description="torch.compile the network")
    cuda_graphs: Literal["auto", True, False] = key(
        binds="nothing",
        default="auto",
        description="run micro-batches from CUDA graphs; auto: on a GPU, if nothing is against it",
    )
    eval_every: DurationField = key(
        binds="nothing",
        default=Duration(1, "epochs"),
        description="interval between evaluations on the whole test set",
    )
    log_every: DurationField = key(
        binds="nothing",
        default=Duration(10, "steps"),
        description="interval between log lines, each a mean over it",
    )
    log_layers_every: DurationField = key(
        binds="nothing",
        default=Duration(1, "epochs"),
        description="interval between records of all layers' norms, trust ratios and noise",
    )
    profile: Annotated[str, StringConstraints(pattern=_STEPS)] | None = key(
        binds="nothing",
        default=None,
        description="write a profile of these steps, such as 'steps 50-55'",
    )
    threads: Positive | None = key(
        binds="nothing", default=None, description="CPU threads per rank; cores / ranks if absent"
    )

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """First and last step of ``profile``."""
        if self.profile is None:
            return None
        first, last = self.profile.removeprefix("steps ").split("-")
        return int(first), int(last)

    @model_validator(mode="after")
    def _profile_has_steps(self) -> Train:
        steps = self.profiled_steps
        if steps is not None and steps[0] > steps[1]:
            raise ValueError(f"profile is {self.profile!r}; the first step is after the last")
        return self

    @model_validator(mode="after")
    def _durations_are_positive(self) -> Train:
        for name in ("duration", "eval_every", "log_every", "log_layers_every"):
            if getattr(self, name).value <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        return self


class Checkpoint(Section):
    """When the training state is saved."""

    every: PeriodField = key(
        binds="nothing",
        default=Duration(5, "epochs"),
        description="interval between checkpoints; minutes are allowed too",
    )
    keep_last: Positive = key(
        binds="nothing", default=2, description="checkpoints to keep; older ones are removed"
    )
    commit_every: Positive = key(
        binds="nothing",
        default=20,
        description="steps between the snapshots in memory that an elastic job resumes from",
    )


class Recipe(Section):
    """The origin of a bundled config; does not change the run."""

    net: str = key(binds="nothing", description="the paper's name of the network")
    source: str = key(binds="nothing", description="paper, table or file, and its address")
    top1: Annotated[float, Field(gt=0, le=100)] | None = key(
        binds="nothing", default=None, description="published top-1 accuracy in percent"
    )
    obtained: str = key(binds="nothing", description="how the accuracy was obtained")
    recalled: str | None = key(
        binds="nothing", default=None, description="facts not read from a primary source"
    )
    departures: Annotated[tuple[str, ...], Field(strict=False)] = key(
        binds="nothing", default=(), description="differences from the published setting"
    )


class Config(Section):
    """A whole training run."""

    extends: str | None = key(
        binds="nothing",
        default=None,
        description="a file, beside this one or bundled, that supplies keys missing here",
    )
    recipe: Recipe | None = key(
        binds="nothing", default=None, description="origin of a bundled config"
    )
    run: Run = Run()
    comm: Comm = Comm()
    data: Annotated[Data, Discriminator("name")]
    model: Model = Model()
    optimizer: Annotated[Optimizer, Discriminator("name")] = LarsSettings()
    schedule: Schedule
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    tune: TuneSettings | None = key(
        binds="nothing", default=None, description="the search of hvd-lars tune"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, tree: Any) -> Any:
        """Choose LARS, and for data with a root whatever form is found there."""
        optimizer, data = (
            tree.get(key) if isinstance(tree, dict) else None for key in ("optimizer", "data")
        )
        if isinstance(optimizer, dict) and "name" not in optimizer:
            tree = tree | {"optimizer": {"name": "lars"} | optimizer}
        if isinstance(data, dict) and "name" not in data and "root" in data:
            tree = tree | {"data": {"name": "auto"} | data}
        return tree

    @model_validator(mode="after")
    def _trials_have_the_unit_of_the_run(self) -> Config:
        duration, whole = None if self.tune is None else self.tune.duration, self.train.duration
        if duration is not None and (duration.unit != whole.unit or duration.value > whole.value):
            raise ValueError(
                f"tune.duration is {duration}; it must be in {whole.unit}, as train.duration, and "
                f"at most {whole}"
            )
        return self

    def why_no_graphs(self, ranks: int) -> str:
        """Return the setting that keeps a run over ``ranks`` from CUDA graphs; empty if none does.

        Beside it, the machine and the network have to suit.
        """
        if self.train.compile:
            return "train.compile is on"
        if self.model.bn_sync_ranks > 1:
            return "model.bn_sync_ranks: BatchNorm exchanges statistics during forward"
        if self.model.checkpoint_blocks:
            return "model.checkpoint_blocks: blocks are computed again in backward"
        sharded = self.optimizer.placement == "sharded" and ranks > 1
        if sharded and self.train.cuda_graphs == "auto":
            return "optimizer.placement: sharded parameters arrive during forward"
        return ""

    def with_section(self, section: str, settings: Section) -> Config:
        """Return the config with another, already validated section."""
        return self.model_copy(update={section: settings})

    def with_values(self, section: str, **values: object) -> Config:
        """Return the config with other values in one section, without validating them."""
        changed = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: changed})


class _Schema(GenerateJsonSchema):
    """Write defaults as in the YAML."""

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Duration) else super().encode_default(dft)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a config file, for editors."""
    dialect = {"$schema": GenerateJsonSchema.schema_dialect}
    return dialect | Config.model_json_schema(schema_generator=_Schema)
