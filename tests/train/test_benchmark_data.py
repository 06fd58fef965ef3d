"""The published splits of FGVC and VTAB-1K, in the layouts that their lists come in."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from gpt_serve.adapters.adapter import Adapter
from gpt_serve.adapters.store import AdapterStore
from gpt_serve.cli.main import main
from gpt_serve.engine.engine import Engine
from gpt_serve.engine.evaluate import evaluate_task
from gpt_serve.errors import DataError, UsageError
from gpt_serve.images.decode import decode
from gpt_serve.model.backbone import Backbone
from gpt_serve.train.closing.close import ClosingJob, close_gates
from gpt_serve.train.data.datasets import find_benchmark, open_dataset, open_evaluation
from gpt_serve.train.data.sources.published import published
from gpt_serve.train.data.views import View
from gpt_serve.train.distributed import World
from gpt_serve.train.fit import build_module, train_adapter
from gpt_serve.train.inputs import Inputs
from gpt_serve.train.job import TrainingJob
from gpt_serve.train.loop import Trainer
from gpt_serve.train.recipes.paper_table import find_task, table_tasks
from gpt_serve.train.recipes.recipe import PROTOCOLS, make_recipe, prepared
from tests.tiny_vit import PREPROCESS
from tests.train.conftest import COLOURS, Recorder, write_colours, write_pictures

LISTS = ("train800", "val200", "test")


def write_vtab(root: Path, folder: str = "patch_camelyon", counts: tuple[int, int, int] = (4, 2, 2)) -> Path:
    """A task of two classes with so many images in the three lists."""
    task = root / "vtab-1k" / folder
    start = 0
    for name, count in zip(LISTS, counts, strict=True):
        names = [f"images/{'test' if name == 'test' else 'train'}/{start + index:06d}.jpg" for index in range(count)]
        write_pictures([task / image for image in names])
        (task / f"{name}.txt").write_text("".join(f"{image} {index % 2}\n" for index, image in enumerate(names)))
        start += count
    return task


def write_fgvc(root: Path, folder: str, paths: dict[str, dict[str, int]], images: str = "") -> Path:
    task = root / "fgvc" / folder
    for split, listed in paths.items():
        write_pictures([task / images / name for name in listed])
        (task / f"{split}.json").write_text(json.dumps(listed))
    return task


BIRDS = {
    "train": {"002.Crow/a.jpg": 2, "001.Auk/b.jpg": 1, "001.Auk/c.jpg": 1},
    "val": {"002.Crow/d.jpg": 2},
    "test": {"001.Auk/e.jpg": 1, "002.Crow/f.jpg": 2},
}


def test_vtab_splits_are_those_of_the_lists(data_root: Path) -> None:
    task = write_vtab(data_root)
    dataset = open_dataset("vtab/camelyon", seed=3)
    assert dataset.labels == ("0", "1")
    for split, name in zip((dataset.train, dataset.val, dataset.test), LISTS, strict=True):
        lines = [line.split() for line in (task / f"{name}.txt").read_text().splitlines()]
        assert [(sample.name, str(sample.target)) for sample in split] == [(str(task / p), t) for p, t in lines]
        assert all(sample.read() == Path(sample.name).read_bytes() for sample in split)
    assert [s.name for s in open_evaluation("vtab/camelyon", ("0", "1")).test] == [s.name for s in dataset.test]


def test_every_task_of_the_paper_opens_by_its_name_and_by_the_usual_folder(data_root: Path) -> None:
    kinds = {"VTAB-1K": "vtab", "FGVC": "fgvc"}
    named = {}
    for task in table_tasks():
        found = find_task(task)
        assert found is not None
        if found[1] in kinds:
            named[task] = kinds[found[1]]
    assert {task for task, kind in named.items() if kind == "vtab"} == set(published("vtab")["tasks"])
    assert {task for task, kind in named.items() if kind == "fgvc"} == set(published("fgvc")["tasks"])
    assert len(named) == 24
    for task, kind in named.items():
        assert find_benchmark(task) == find_benchmark(f"{kind}/{task}") == (kind, task)
        folder = published(kind)["tasks"][task]["folder"]
        assert find_task(folder) == (task, {"vtab": "VTAB-1K", "fgvc": "FGVC"}[kind])


@pytest.mark.parametrize("folder", ["patch_camelyon", "camelyon", "Patch-Camelyon"])
def test_other_spellings_of_a_folder_are_found(data_root: Path, folder: str) -> None:
    write_vtab(data_root, folder)
    assert len(open_dataset("vtab/patch_camelyon", 0).train) == 4


def test_labels_may_be_named(data_root: Path) -> None:
    task = write_vtab(data_root)
    (task / "labels.txt").write_text("no tumour\ntumour\n")
    assert open_dataset("vtab/camelyon", 0).labels == ("no tumour", "tumour")
    reversed_labels = ("tumour", "no tumour")
    assert [sample.target for sample in open_evaluation("vtab/camelyon", reversed_labels).test] == [1, 0]
    (task / "labels.txt").write_text("tumour\n")
    with pytest.raises(DataError, match="has 1 lines for 2 classes"):
        open_dataset("vtab/camelyon", 0)


def test_fgvc_classes_are_the_ids_in_order_named_by_their_folders(data_root: Path) -> None:
    task = write_fgvc(data_root, "CUB_200_2011", BIRDS, "images")
    dataset = open_dataset("fgvc/cub", seed=0)
    assert dataset.labels == ("001.Auk", "002.Crow")
    assert [sample.target for sample in dataset.train] == [1, 0, 0]
    assert [(sample.name, sample.target) for sample in dataset.val] == [(str(task / "images/002.Crow/d.jpg"), 1)]
    assert len(dataset.test) == 2


def test_fgvc_classes_without_folders_of_their_own_are_named_by_their_ids(data_root: Path) -> None:
    flowers = {split: {f"jpg/{split}{n}.jpg": 7 + 3 * (n % 2) for n in range(2)} for split in BIRDS}
    write_fgvc(data_root, "OxfordFlower", flowers)
    dataset = open_dataset("flowers", seed=0)
    assert dataset.labels == ("7", "10")
    assert [sample.target for sample in dataset.test] == [0, 1]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train800.txt", None, r"train800.txt is missing"),
        ("val200.txt", "", "lists no images"),
        ("val200.txt", "images/train/000000.jpg\n", "line 1: 'images/train/000000.jpg' is not 'path class'"),
        ("val200.txt", "images/train/000000.jpg one\n", "is not 'path class'"),
        ("test.txt", "images/test/nowhere.jpg 1\n", "test.txt names 'images/test/nowhere.jpg', which .* lacks"),
        ("test.txt", "images/test/000006.jpg 2\n", "test.txt: class 2 of .* is none of the 2 classes"),
        ("test.txt", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_list_that_does_not_match_is_one_line(
    data_root: Path, file: str, text: str | bytes | None, message: str
) -> None:
    path = write_vtab(data_root) / file
    path.unlink()
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("vtab/camelyon", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "test.json is missing"),
        ("{", "is not valid JSON"),
        ("[1]", "must map paths of images to class ids"),
        ('{"001.Auk/e.jpg": "auk"}', "'auk', not an integer"),
        ('{"001.Auk/e.jpg": 3}', "class 3 .* none of the 2 classes"),
        ('{"001.Auk/gone.jpg": 1}', "list and images do not match"),
    ],
)
def test_a_json_list_that_does_not_match_is_one_line(data_root: Path, text: str | None, message: str) -> None:
    path = write_fgvc(data_root, "CUB_200_2011", BIRDS, "images") / "test.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("cub", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("vtab/svhn", ["vtab-1k/svhn is missing", "get_vtab1k.py"]),
        ("fgvc/dogs", ["fgvc/Stanford-dogs is missing", "images.tar from http://vision", "train.json", "KMnP/vpt"]),
        ("nabirds", ["--data fgvc/nabirds", "nabirds.tar.gz", "GPT_SERVE_DATA"]),
    ],
)
def test_a_missing_folder_tells_what_belongs_there(data_root: Path, source: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(source, 0)
    assert all(word in str(caught.value) for word in words)
    assert str(data_root) in str(caught.value) and "\n" not in str(caught.value)


def test_the_published_preprocessing() -> None:
    """FGVC: the shorter side to 256 of 224, cropped. VTAB: squashed."""
    spec = type(PREPROCESS)(**PREPROCESS.to_dict() | {"input_size": (224, 224), "crop_pct": 0.9})
    fgvc, vtab = prepared(spec, "fgvc"), prepared(spec, "vtab")
    assert (fgvc.crop_mode, fgvc.input_size[0] / fgvc.crop_pct, fgvc.interpolation) == ("center", 256, "bilinear")
    assert (vtab.crop_mode, vtab.interpolation) == ("squash", "bilinear")
    assert fgvc.mean == vtab.mean == spec.mean
    assert prepared(spec, "backbone") == spec
    assert PROTOCOLS["vtab"]["augment"] == "none" and PROTOCOLS["fgvc"]["augment"] == "crop-flip"


@pytest.fixture
def colour_task(data_root: Path, tmp_path: Path) -> Path:
    """A VTAB task of four classes, three of which occur, in wide images whose left half tells nothing."""
    for split, count in (("train", 8), ("val", 3), ("test", 4)):
        write_colours(tmp_path / "pictures", split, count, seed=count)
    task = data_root / "vtab-1k" / "kitti"
    for split, name in zip(("train", "val", "test"), LISTS, strict=True):
        lines = []
        for target, colour in enumerate(COLOURS):
            for path in sorted((tmp_path / "pictures" / split / colour).iterdir()):
                copy = task / "images" / f"{split}-{colour}-{path.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                wide = Image.new("RGB", (200, 20))
                wide.paste(Image.open(path).resize((30, 20)), (170, 0))
                wide.save(copy)
                lines.append(f"images/{copy.name} {target}")
        (task / f"{name}.txt").write_text("\n".join(lines))
    return task


def run(*arguments: str) -> tuple[int, dict[str, object] | None, str]:
    result = CliRunner().invoke(main, list(arguments))
    found = json.loads(result.stdout) if result.exit_code == 0 and "--json" in arguments else None
    return result.exit_code, found, result.stderr


@pytest.mark.slow
def test_train_follows_the_protocol_of_vtab(colour_task: Path, tmp_path: Path) -> None:
    adapters = str(tmp_path / "adapters")
    common = ["--adapters", adapters, "--device", "cpu"]
    train = ["train", "--task", "kitti", "--method", "linear", "--epochs", "6", "--batch-size", "8", *common, "--json"]
    code, summary, err = run(*train)
    assert code == 0 and summary is not None, err
    assert "images as for VTAB" in err
    assert all(" val " not in line for line in err.splitlines() if line.startswith("epoch"))
    assert summary["recipe"] | {"augment": "none", "preprocess": "vtab", "final_fit": True} == summary["recipe"]  # type: ignore[operator,index]
    assert summary["data"] | {"source": "kitti", "train": 24, "val": 9, "test": 12} == summary["data"]  # type: ignore[operator,index]
    metrics = summary["metrics"]
    assert "val_accuracy" not in metrics and metrics["best_epoch"] == 5  # type: ignore[operator,index]
    # What tells the classes apart lies where a centre crop does not reach.
    assert metrics["test_accuracy"] > 0.9  # type: ignore[index]
    stored = AdapterStore(Path(adapters)).load("kitti").adapter
    assert stored.preprocess.crop_mode == "squash" and stored.labels == ("0", "1", "2", "3")
    code, found, err = run("eval", "--task", "kitti", "--data", "vtab/kitti-dist", *common, "--json")
    assert code == 0 and found is not None, err
    assert found["accuracy"] == pytest.approx(metrics["test_accuracy"])  # type: ignore[index]
    assert found["n"] == 12
    assert "-" in CliRunner().invoke(main, ["tasks", "--adapters", adapters]).stdout.split()[-1]


def test_flags_override_the_protocol(colour_task: Path, tmp_path: Path) -> None:
    flags = ["--preprocess", "backbone", "--no-final-fit", "--augment", "crop", "--method", "linear", "--epochs", "1"]
    adapters = ["--adapters", str(tmp_path / "adapters"), "--device", "cpu", "--json"]
    code, summary, err = run("train", "--task", "kitti", *flags, *adapters)
    assert code == 0 and summary is not None, err
    chosen = {"augment": "crop", "preprocess": "backbone", "final_fit": False}
    assert summary["recipe"] | chosen == summary["recipe"]  # type: ignore[operator,index]
    assert "val_accuracy" in summary["metrics"]  # type: ignore[operator]


@pytest.mark.slow
def test_a_fully_fine_tuned_model_follows_the_protocol_too(colour_task: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["train", "--task", "kitti", "--method", "full", "--epochs", "1", "--adapters", str(tmp_path / "a")]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("kitti: final fit of 1 epochs, test accuracy ")
    assert result.stdout.endswith("kitti.safetensors and is not served\n")


def test_a_final_fit_needs_test_images_and_leaves_none_to_close_gates_by(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    recipe = make_recipe("adamw", prompts=2, epochs=2, final_fit=True)
    untested = tmp_path / "untested"
    shutil.copytree(colours / "train", untested / "train")
    with pytest.raises(DataError, match="--final-fit leaves only test images"):
        train_adapter(tiny, TrainingJob("colours", str(untested), tmp_path / "a", recipe), Recorder(), World())
    train_adapter(tiny, TrainingJob("colours", str(colours), tmp_path / "a", recipe), Recorder(), World())
    with pytest.raises(UsageError, match="validation images, which decide: train it with --no-final-fit"):
        close_gates(tiny, ClosingJob("colours", str(colours), tmp_path / "a"), Recorder())
    code, _, err = run("train", "--task", "x", "--data", str(colours), "--final-fit", "--close-gates")
    assert code == 2 and "--no-final-fit" in err and err.count("\n") == 1


def final(backbone: Backbone, data: Path, adapters: Path, recorder: Recorder, **changes: bool) -> Adapter:
    recipe = make_recipe("adamw", prompts=2, epochs=3, final_fit=True, augment="none", prompt_dropout=0.0)
    train_adapter(backbone, TrainingJob("colours", str(data), adapters, recipe, **changes), recorder, World())
    return AdapterStore(adapters).load("colours").adapter


def test_a_final_fit_is_the_last_epoch_of_training_on_both_splits(
    tiny: Backbone, colours: Path, tmp_path: Path
) -> None:
    """Against a folder where the same images are all in train, which nothing is selected by either."""
    published_last = final(tiny, colours, tmp_path / "a", Recorder())
    dataset = open_dataset(str(colours), 0)
    ordered = [*dataset.train, *dataset.val]

    recipe = make_recipe("adamw", prompts=2, epochs=3, augment="none", prompt_dropout=0.0)
    torch.manual_seed(recipe.seed)
    module = build_module(tiny, recipe, 3)
    view = View(ordered, tiny.spec.preprocess, None, "none", 0)
    Trainer(tiny, module, recipe, train=view, val=view, world=World(), inputs=Inputs(0)).fit(
        lambda *_: None, lambda _: None
    )
    torch.testing.assert_close(published_last.head_weight, module.head.weight.detach())
    assert published_last.prompt is not None and module.prompt is not None
    torch.testing.assert_close(published_last.prompt, module.prompt.detach())


def test_an_interrupted_final_fit_resumes_to_the_same_adapter(tiny: Backbone, colours: Path, tmp_path: Path) -> None:
    whole = final(tiny, colours, tmp_path / "a", Recorder())
    with pytest.raises(KeyboardInterrupt):
        final(tiny, colours, tmp_path / "b", Recorder(interrupt_at=1))
    resumed = final(tiny, colours, tmp_path / "b", Recorder(), resume=True)
    assert torch.equal(whole.head_weight, resumed.head_weight)


def test_unreadable_images_may_leave_out_classes_that_never_had_any(
    colour_task: Path, tmp_path: Path, tiny: Backbone
) -> None:
    (bad := next((colour_task / "images").glob("train-red-*"))).write_bytes(b"broken")
    recipe = make_recipe("adamw", method="linear", epochs=1, preprocess="vtab")
    job = TrainingJob("kitti", "vtab/kitti", tmp_path / "a", recipe, skip_unreadable=True)
    summary = train_adapter(tiny, job, recorder := Recorder(), World())
    assert summary is not None and summary["data"]["train"] == 23
    assert [image.name for image in recorder.bad] == [str(bad)]


def test_the_engine_prepares_images_as_the_adapter_was_trained(
    colour_task: Path, tmp_path: Path, tiny: Backbone
) -> None:
    recipe = make_recipe("adamw", method="linear", epochs=6, batch_size=8, augment="none", preprocess="vtab", lr=0.05)
    train_adapter(tiny, TrainingJob("kitti", "vtab/kitti", tmp_path / "a", recipe), Recorder(), World())
    assert decode(open_dataset("vtab/kitti", 0).test[0].read()).shape == (3, 20, 200)
    assert tiny.spec.preprocess.crop_mode == "center"
    engine = Engine(tiny, AdapterStore(tmp_path / "a"))
    recorded = AdapterStore(tmp_path / "a").load("kitti").adapter.training["metrics"]["test_accuracy"]
    assert evaluate_task(engine, "kitti", "vtab/kitti")["accuracy"] == recorded > 0.6
