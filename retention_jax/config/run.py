"""One training run: its data, loss, optimiser and mesh."""

import dataclasses
import math
from typing import Literal

from retention_jax.config.checks import check_types, require
from retention_jax.config.evaluation import EvalConfig
from retention_jax.config.model import GateConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The gate stage's loss: kl_weight * KL + ce_weight * CE + capacity_weight * capacity."""

    kl_weight: float = 0.5
    ce_weight: float = 0.5  # next-token cross-entropy
    capacity_weight: float = 1.0  # lambda_cap
    budget: int = 128  # M of the capacity loss
    capacity: Literal["global", "local"] = "global"
    capacity_mean: Literal["positive", "all"] = "positive"  # over positions above budget (released code) or all (paper)
    kl: Literal["forward", "reverse"] = "forward"  # KL(teacher || student) or KL(student || teacher)
    labels: Literal["next", "released"] = "next"  # which positions KL and CE count: `losses.py` says both
    released_block: int | None = None  # tokens; labels="released" only: blocks that no prediction crosses
    vocab_block: int = 4096  # tokens whose vocabulary logits exist at one time, on each device

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            *[
                (getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}")
                for n in ("kl_weight", "ce_weight", "capacity_weight")
            ],
            (self.budget >= 1, f"budget must be at least 1, got {self.budget}"),
            (self.vocab_block >= 1, f"vocab_block must be at least 1, got {self.vocab_block}"),
            (
                self.released_block is None or (self.released_block >= 2 and self.labels == "released"),
                "released_block must be None or at least 2, and goes with labels='released' only, got "
                f"{self.released_block} and labels={self.labels!r}",
            ),
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping by global norm."""

    learning_rate: float = 2e-4
    final_learning_rate: float = 1e-6
    # Steps in which the rate rises to learning_rate. A run of fewer steps is the start of that rise, and ends below it.
    warmup_steps: int = 100
    weight_decay: float = 0.01
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 1.0
    accumulation: int = 1  # micro-batches a step; the batch is cut into so many

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (self.learning_rate > 0, f"learning_rate must be positive, got {self.learning_rate}"),
            (self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}"),
            (self.clip_norm > 0, f"clip_norm must be positive, got {self.clip_norm}"),
            (self.accumulation >= 1, f"accumulation must be at least 1, got {self.accumulation}"),
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Documents of one task, prepared once by a TFDS builder, packed into rows of `length` tokens.

    recall: the synthetic task. text: the bytes of one file. chat: conversations and texts under a model's tokenizer.
    """

    task: Literal["recall", "text", "chat"] = "recall"
    length: int = 192
    batch_size: int = 32  # rows a step, over all processes
    path: str = ""  # text: the file to read
    heldout: float = 0.1  # text: share of the file, at its end, kept for evaluation
    files: tuple[str, ...] = ()  # chat: sources, see `data/sources.py`: FILE, *.parquet, hf://datasets/...
    weights: tuple[float, ...] = ()  # chat: how often documents come from each of `files`; () by how many they have
    tokenizer: str = ""  # chat: checkpoint that the tokenizer is from; in a TrainConfig, "" is the backbone
    chat_template: str = ""  # chat: Jinja file in place of the tokenizer's own template
    min_length: int = 2  # chat: shorter documents are left out; tokens
    too_long: Literal["cut", "drop"] = "cut"  # chat: what happens to documents of more than `length` tokens
    documents: int = 32_768  # recall: how many streams to make
    document_lengths: tuple[int, ...] = (192,)  # recall: stream lengths, each for an equal share of documents
    decoys: float = 0.3  # recall: share of slots that are decoys
    copies: float = 0.0  # recall: share of documents, the first ones, that repeat a random sequence instead
    shuffle: bool = True  # False reads documents as they were made: copies, then the lengths in turn, a curriculum
    cache_dir: str = "~/.cache/retention_jax"  # where builders write array_record files

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (self.length >= 2, f"length must be at least 2, got {self.length}"),
            (self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}"),
            (self.task != "text" or bool(self.path), "path must name a text file for task='text'"),
            (0 < self.heldout < 1, f"heldout must be in (0, 1), got {self.heldout}"),
            (self.task != "chat" or bool(self.files), "files must name the conversations for task='chat'"),
            (
                not self.weights or (len(self.weights) == len(self.files) and min(self.weights) > 0),
                f"weights must be () or a positive number for each of files, got {self.weights} for {self.files}",
            ),
            (
                2 <= self.min_length <= max(self.length, 2),
                f"min_length must be from 2 to length={self.length}, got {self.min_length}",
            ),
            (self.documents >= 1, f"documents must be at least 1, got {self.documents}"),
            (
                self.task != "recall"
                or (bool(self.document_lengths) and all(3 <= n <= self.length for n in self.document_lengths)),
                f"document_lengths must be numbers from 3 to length={self.length}, got {self.document_lengths}",
            ),
            (0 <= self.decoys <= 0.6, f"decoys must be in [0, 0.6], got {self.decoys}"),
            (0 <= self.copies <= 1, f"copies must be in [0, 1], got {self.copies}"),
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes, over all devices of all processes; `sharding.py` says what each of them cuts."""

    data: int = -1  # -1, for at most one axis: as many as the others leave
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        sizes = dataclasses.asdict(self)
        require(
            self,
            *[(n >= 1 or n == -1, f"{axis} must be at least 1, or -1, got {n}") for axis, n in sizes.items()],
            (list(sizes.values()).count(-1) <= 1, f"only one axis may be -1, got {sizes}"),
        )

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """The mesh that a flag such as --mesh=data:2,tensor:4 asks for. Axes that are not named have size 1.

        Raises:
          ValueError: where the text is not of this form, names an axis twice, or a size is wrong.
        """
        axes = tuple(field.name for field in dataclasses.fields(cls))
        parts = [(part, *part.partition(":")[::2]) for part in text.split(",")]
        bad = [part for part, axis, size in parts if axis not in axes or not size.removeprefix("-").isdecimal()]
        if bad or len({axis for _, axis, _ in parts}) < len(parts):
            raise ValueError(
                f"--mesh must be as in data:2,fsdp:4, each of the axes {', '.join(axes)} at most once; got "
                f"{', '.join(map(repr, bad)) or repr(text)}"
            )
        return cls(**dict.fromkeys(axes, 1) | {axis: int(size) for _, axis, size in parts})

    def over(self, devices: int) -> dict[str, int]:
        """The size of every axis on so many devices; raises ValueError if they do not multiply to that."""
        sizes = dataclasses.asdict(self)
        given = math.prod(n for n in sizes.values() if n != -1)
        resolved = {axis: devices // given if n == -1 else n for axis, n in sizes.items()}
        if math.prod(resolved.values()) != devices:
            asked = " * ".join(f"{axis} {n}" for axis, n in sizes.items())
            raise ValueError(f"mesh: the axes must multiply to the {devices} devices there are, got {asked}")
        return resolved


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run and the evaluation that ends it."""

    stage: Literal["backbone", "gates"]  # next-token training of a small backbone, or gates on a frozen one
    data: DataConfig
    eval: EvalConfig
    model: ModelConfig | None = None  # the backbone to train; a gate run on a given `backbone` reads it from there
    gate: GateConfig = GateConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    backbone: str = ""  # stage gates: folder of the frozen weights; "builtin:recall" is shipped with the package
    gates: str = ""  # stage gates: folder of gates to start from, of the kind that `gate` says; "": fresh ones
    backbone_steps: int = 0  # stage gates with no `backbone`: train one first, for so many steps
    backbone_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=3e-3, final_learning_rate=6e-5)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen backbone; gates are float32
    steps: int = 1000
    seed: int = 0
    remat: bool = False  # recompute a layer's activations in the backward pass
    checkpoint_every: int = 500  # steps
    checkpoint_keep: int = 2
    eval_every: int = 0  # steps, a multiple of checkpoint_every: `eval` is scored while training; 0: only at the end
    log_every: int = 10  # steps
    profile_start: int = 0  # first step of the profiler window
    profile_steps: int = 0  # its length; 0 profiles nothing

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self,
            (self.steps >= 1, f"steps must be at least 1, got {self.steps}"),
            (
                self.data.batch_size % self.optimizer.accumulation == 0,
                f"data.batch_size must be a multiple of optimizer.accumulation, got {self.data.batch_size} and "
                f"{self.optimizer.accumulation}",
            ),
            (
                self.stage == "backbone" or bool(self.backbone) != (self.backbone_steps > 0),
                "stage='gates' needs either backbone, the frozen weights' folder, or backbone_steps to train one",
            ),
            (
                self.stage == "gates" or not (self.backbone or self.backbone_steps),
                "backbone and backbone_steps go with stage='gates' only",
            ),
            (
                not self.gates or (self.stage == "gates" and bool(self.backbone)),
                f"gates, a folder to start from, goes with stage='gates' and a given backbone only, got {self.gates!r}",
            ),
            (
                bool(self.backbone) == (self.model is None),
                "model is needed to train a backbone, and must be None where `backbone` names one",
            ),
            (
                self.data.task != "chat" or bool(self.data.tokenizer or self.backbone),
                "data.tokenizer is needed for data.task='chat' where no `backbone` has one",
            ),
            (
                self.model is None or self.model.dtype == "float32",
                "a backbone is trained in float32: model.dtype must be 'float32'",
            ),
            *[
                (getattr(self, n) >= 1, f"{n} must be at least 1, got {getattr(self, n)}")
                for n in ("checkpoint_every", "checkpoint_keep", "log_every")
            ],
            (
                self.eval_every >= 0 and self.eval_every % max(self.checkpoint_every, 1) == 0,
                f"eval_every must be 0 or a multiple of checkpoint_every={self.checkpoint_every}, got "
                f"{self.eval_every}",
            ),
            (not self.eval_every or bool(self.eval.tasks), "eval_every needs eval.tasks"),
        )

    def check_mesh(self, sizes: dict[str, int], model: ModelConfig) -> None:
        """Raises ValueError, with everything that is wrong, where the batch, rows or heads do not fit a mesh."""
        rows, heads = sizes["data"] * sizes["fsdp"], sizes["context"] * sizes["tensor"]
        parts = rows * self.optimizer.accumulation
        require(
            self,
            (
                self.data.batch_size % parts == 0,
                f"data.batch_size must be a multiple of mesh data * fsdp * optimizer.accumulation = {parts}, got "
                f"{self.data.batch_size}",
            ),
            (
                self.data.length % sizes["context"] == 0,
                f"data.length must be a multiple of mesh context = {sizes['context']}, got {self.data.length}",
            ),
            (
                model.num_heads % heads == 0,
                f"the model's query heads must be a multiple of mesh context * tensor = {heads}, got {model.num_heads}",
            ),
        )

    @property
    def resolved_data(self) -> DataConfig:
        """`data`, with the backbone's tokenizer where it names none."""
        return dataclasses.replace(self.data, tokenizer=self.data.tokenizer or self.backbone)
