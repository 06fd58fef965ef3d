"""What the accuracy study runs: methods, tasks, learning rates, ablations."""

from dataclasses import dataclass, field

SEEDS = (0, 1, 2)
EPOCHS = {"flowers": 10, "caltech101": 7, "digits": 5}  # about 360 steps of 16 images each
FOLDERS = {"flowers": "flowers12", "caltech101": "caltech101", "digits": "digits"}
SEARCHED_ON = "flowers"  # the learning rate of each method is chosen on its validation images
COMMON = ("--batch-size", "16", "--schedule", "step", "--warmup", "1")
OF_TASK: dict[str, tuple[str, ...]] = {"digits": ("--augment", "crop")}  # mirrored digits are other digits
HEAD_RATE = 0.02  # of every method with prompts; their own rate is searched


@dataclass(frozen=True)
class Variant:
    """A method as the study trains it.

    Attributes:
        flags: of ``gpt-serve train``.
        rates: learning rates to choose from; of the prompts, gates and temperatures where there are any.
        head_rate: the head's, when it is not searched.
    """

    name: str
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    head_rate: float | None = HEAD_RATE

    def rate_flags(self, lr: float) -> tuple[str, ...]:
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
        parts = [self.task, self.variant.name, f"lr{self.lr:g}", f"seed{self.seed}", *self.more]
        if self.share < 1:
            parts.append(f"share{self.share:g}")
        return "-".join(part.strip("-").replace(" ", "-") for part in parts)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of ``gpt-serve train``, without data and output."""
        epochs = round(EPOCHS[self.task] / self.share)  # as many steps from fewer images
        return (
            *("--task", self.task, "--recipe", "full" if "full" in self.variant.flags else "adamw"),
            *("--epochs", str(epochs), "--seed", str(self.seed)),
            *COMMON,
            *OF_TASK.get(self.task, ()),
            *self.variant.flags,
            *self.variant.rate_flags(self.lr),
            *self.more,
        )


def adamw(name: str, *flags: str) -> Variant:
    return Variant(name, flags, (0.01, 0.05))


STANDARD = ("--norm", "standard")
TOKENS = ("--prompt-init", "tokens")
VARIANTS = [
    Variant("linear", ("--method", "linear"), (0.02, 0.1), None),
    Variant("linear, standard", ("--method", "linear", *STANDARD), (0.02, 0.1), None),
    adamw("vpt-shallow", "--method", "vpt-shallow"),
    adamw("vpt-deep", "--method", "vpt-deep"),
    adamw("gated", "--method", "gated"),
    Variant(
        "gated, SGD",
        ("--method", "gated", "--optimizer", "sgd", "--weight-decay", "0", "--head-init", "kaiming"),
        (0.1, 0.25),
        None,
    ),
    adamw("spt-shallow", "--method", "spt-shallow"),
    adamw("spt-deep", "--method", "spt-deep"),
    adamw("gated, standard", "--method", "gated", *TOKENS, *STANDARD),
    adamw("spt-deep, standard", "--method", "spt-deep", *STANDARD),
    adamw("gated-deep, standard", "--method", "gated-deep", *TOKENS, *STANDARD),
    Variant("full", ("--method", "full"), (3e-4, 1e-3), None),
]
BY_NAME = {variant.name: variant for variant in VARIANTS}


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
    seeds: tuple[int, ...] = SEEDS
    shares: tuple[float, ...] = ()


PROMPTS = ("1", "5", "20", "50", "100")
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
        tasks=("flowers", "caltech101"),
    ),
    Ablation(
        "norms",
        "What the head of gated prompts sees",
        {norm: ("gated", ("--norm", norm)) for norm in ("pretrained", "fresh", "standard")},
        tasks=("flowers", "caltech101"),
    ),
    Ablation(
        "first-block",
        "The block that shallow prompts enter (Fig. 1)",
        {str(block): ("vpt-shallow", ("--first-block", str(block))) for block in (0, 3, 6, 9, 11)},
    ),
    Ablation(
        "initialisation",
        "How deep prompts start (SPT)",
        {init: ("vpt-deep", ("--prompt-init", init)) for init in ("random", "tokens", "kmeans", "mean", "max")},
    ),
    Ablation(
        "prompts",
        "Prompts (Fig. 7, Table 7)",
        {count: ("gated", ("--prompts", count)) for count in PROMPTS},
        seeds=(0, 1),
    ),
    Ablation(
        "share",
        "Share of the training images, with as many steps (SPT)",
        {"linear": ("linear", ()), "gated, standard": ("gated, standard", ()), "full": ("full", ())},
        shares=(0.25, 0.5, 1.0),
        seeds=(0, 1),
    ),
]
