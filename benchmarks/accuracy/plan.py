"""What the accuracy study runs: methods, tasks, learning rates, ablations."""

from dataclasses import dataclass, field, replace
from typing import Any

SEEDS = (0, 1, 2)
EPOCHS = {"flowers": 10, "caltech101": 7, "digits": 5}  # about 360 steps of 16 images each
FOLDERS = {"flowers": "flowers12", "caltech101": "caltech101", "digits": "digits"}
SEARCHED_ON = "flowers"  # the learning rate of each method is chosen on its validation images
COMMON = ("--batch-size", "16", "--schedule", "step", "--warmup", "1")
OF_TASK: dict[str, tuple[str, ...]] = {"digits": ("--augment", "crop")}  # mirrored digits are other digits
HEAD_RATE = 0.02  # of every method with prompts and a random head; their own rate is searched
LDA_HEAD_RATE = 0.002  # of those whose head starts from discriminant analysis
STANDARD = ("--norm", "standard")
TOKENS = ("--prompt-init", "tokens")
LDA = (*STANDARD, "--head-init", "lda", "--select", "loss")


@dataclass(frozen=True)
class Variant:
    """A method as the study trains it.

    Attributes:
        flags: of ``gpt-serve train``.
        rates: learning rates to choose from; of the prompts, gates and temperatures where there are any.
        head_rate: the head's, when it is not searched.
        seeds: fewer for what was only tried on the way.
        tasks: likewise.
    """

    name: str
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    head_rate: float | None = HEAD_RATE
    seeds: tuple[int, ...] = SEEDS
    tasks: tuple[str, ...] = tuple(FOLDERS)

    def rate_flags(self, lr: float) -> tuple[str, ...]:
        """The learning rate, with the head's own where it has one."""
        scale = 1.0 if self.head_rate is None else self.head_rate / lr
        return ("--lr", f"{lr:g}", "--head-lr-scale", f"{scale:g}")


@dataclass(frozen=True)
class Run:
    """One training run."""

    variant: Variant
    task: str
    lr: float
    seed: int
    more: tuple[str, ...] = ()
    share: float = 1.0  # of the training images

    @property
    def name(self) -> str:
        """Of its file: unlike that of any other run."""
        parts = [self.task, self.variant.name.replace(", ", "-"), f"lr{self.lr:g}", f"seed{self.seed}", *self.more]
        if self.share < 1:
            parts.append(f"share{self.share:g}")
        return "-".join(part.strip("-").replace(" ", "-") for part in parts)

    @property
    def method(self) -> str:
        """A name of ``--method``."""
        return self.variant.flags[self.variant.flags.index("--method") + 1]

    @property
    def epochs(self) -> int:
        """As many steps from fewer images."""
        return round(EPOCHS[self.task] / self.share)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of ``gpt-serve train``, without data and output."""
        return (
            *("--task", self.task, "--recipe", "full" if self.method == "full" else "adamw"),
            *("--epochs", str(self.epochs), "--seed", str(self.seed)),
            *COMMON,
            *OF_TASK.get(self.task, ()),
            *self.variant.flags,
            *self.variant.rate_flags(self.lr),
            *self.more,
        )


def selects_by_loss(summary: dict[str, Any]) -> bool:
    """Whether a run's epochs, and so its learning rates, are compared by validation loss."""
    return bool(summary["recipe"].get("select") == "loss")


def adamw(name: str, *flags: str) -> Variant:
    """By AdamW, with a small random head.

    Args:
        flags: of ``gpt-serve train``.
    """
    return Variant(name, flags, (0.01, 0.05))


def lda(name: str, *flags: str) -> Variant:
    """With prompts beside a head from discriminant analysis."""
    return Variant(name, (*flags, *LDA), (0.01, 0.05), LDA_HEAD_RATE)


def tried(name: str, *flags: str) -> Variant:
    """As `adamw`, with a single seed on two tasks."""
    return replace(adamw(name, *flags), seeds=SEEDS[:1], tasks=("flowers", "caltech101"))


VARIANTS = [
    Variant("linear", ("--method", "linear"), (0.02, 0.1), None),
    adamw("vpt-shallow", "--method", "vpt-shallow"),
    adamw("vpt-deep", "--method", "vpt-deep"),
    adamw("spt-shallow", "--method", "spt-shallow"),
    adamw("spt-deep", "--method", "spt-deep"),
    adamw("gated", "--method", "gated"),
    Variant("full", ("--method", "full"), (3e-4, 1e-3), None),
    Variant("linear, LDA", ("--method", "linear", *LDA), (0.002, 0.01), None),
    lda("gated, LDA", "--method", "gated", *TOKENS),
]
ON_THE_WAY = [
    replace(
        tried("gated, SGD", "--method", "gated", "--optimizer", "sgd", "--weight-decay", "0", "--head-init", "kaiming"),
        rates=(0.1, 0.25),
        head_rate=None,
    ),
    replace(tried("linear, standard", "--method", "linear", *STANDARD), rates=(0.02, 0.1), head_rate=None),
    tried("gated, standard", "--method", "gated", *TOKENS, *STANDARD),
    tried("spt-deep, standard", "--method", "spt-deep", *STANDARD),
    tried("gated-deep, standard", "--method", "gated-deep", *TOKENS, *STANDARD),
    replace(
        lda("gated-deep, LDA", "--method", "gated-deep", *TOKENS), seeds=SEEDS[:1], tasks=("flowers", "caltech101")
    ),
]
BY_NAME = {variant.name: variant for variant in [*VARIANTS, *ON_THE_WAY]}


@dataclass(frozen=True)
class Ablation:
    """Runs of one method, or of a few, that differ in one thing.

    Attributes:
        settings: what is varied, by its label in table and plot: the method and more flags.
        tasks: on which.
        shares: instead of flags, shares of the training images.
    """

    name: str
    title: str
    settings: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("flowers",)
    seeds: tuple[int, ...] = SEEDS[:2]
    shares: tuple[float, ...] = ()


NMI = ("vpt-deep", "spt-deep", "gated")  # whose prompts' mutual information with patch tokens is recorded


def _prompts(count: str) -> tuple[str, ...]:
    """No flag for the 10 that all runs have, so that these are not run twice."""
    return () if count == "10" else ("--prompts", count)


PROMPTS = ("1", "10", "50", "100")
SHARED = ("linear", "vpt-deep", "spt-deep", "gated", "gated, LDA", "full")
ABLATIONS = [
    Ablation(
        "components",
        "Gates, temperatures and hard gates on shallow prompts (Table 4)",
        {
            "prompts": ("vpt-shallow", ()),
            "+ gates": ("gated", ("--no-temperature",)),
            "+ gates and temperatures": ("gated", ()),
            "+ hard gates and temperatures": ("gated", ("--gate", "hard")),
        },
        seeds=SEEDS,
    ),
    Ablation(
        "steps",
        "From gated prompts to the default (the head's rate is 0.02, from LDA on 0.002, there 0.01 without prompts)",
        {
            "gated": ("gated", ()),
            "+ tokens, standard norm": ("gated, standard", ()),
            "+ head from LDA": ("gated, LDA", ()),
            "without prompts": ("linear, LDA", ()),
            "prompts in every block": ("gated-deep, LDA", ()),
        },
        tasks=("flowers", "caltech101"),
        seeds=SEEDS[:1],
    ),
    Ablation(
        "first-block",
        "The block that shallow prompts enter (Fig. 1)",
        {str(block): ("vpt-shallow", ("--first-block", str(block)) if block else ()) for block in (0, 3, 6, 9, 11)},
    ),
    Ablation(
        "initialisation",
        "How deep prompts start (SPT)",
        {
            "random": ("vpt-deep", ()),
            "tokens": ("spt-deep", ()),
            **{init: ("vpt-deep", ("--prompt-init", init)) for init in ("kmeans", "mean", "max")},
        },
    ),
    Ablation(
        "prompts",
        "Prompts (Fig. 7, Table 7)",
        {count: ("gated", _prompts(count)) for count in PROMPTS},
    ),
    Ablation(
        "share",
        "Share of the training images, with as many steps (SPT)",
        {name: (name, ()) for name in SHARED},
        shares=(0.25, 0.5, 1.0),
        seeds=SEEDS[:1],
    ),
]
