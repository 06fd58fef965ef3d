"""The browser example: its page answers what onnxruntime in Python answers, or says in one sentence why it does not.

A headless Chromium is driven by `export/browser/test.mjs`; without Chromium, Node or `npm ci` the tests skip, and fail
where ``CI`` is ``true``.
"""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from gpt_serve.adapters.parse import parse_preprocess
from gpt_serve.images.decode import decode
from gpt_serve.images.preprocess import preprocess_image
from gpt_serve.specs import Preprocess
from tests.browser import chromium, missing, program

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "export" / "browser"
OURS = {
    "format": "gpt-serve-onnx/1",
    "kind": "single",
    "input": "uint8",
    "output": "probabilities",
    "labels": "[]",
    "preprocess": '{"exif": true}',
}
REFUSED = {
    "missing.onnx": "cannot be fetched",
    "text.onnx": "is not an ONNX file",
    "foreign.onnx": "is not a graph of format gpt-serve-onnx/1",
    "multi.onnx": "holds several tasks",
    "float.onnx": "must take uint8 and give probabilities",
    "logits.onnx": "must take uint8 and give probabilities",
    "unturned.onnx": "ignores the EXIF orientation",
    "broken.onnx": "cannot be run by this browser",
}


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_nothing_is_skipped_in_silence_by_ci(ci: str, outcome: type[BaseException], monkeypatch) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="needs no-such-browser or no-such-other"):
        program("no-such-browser", "no-such-other")


# The page in a browser


@pytest.fixture(scope="module")
def driver() -> list[str]:
    """The command that drives the page, without its last arguments: the address and a folder for a profile."""
    if not (PAGE / "node_modules" / "playwright-core").is_dir():
        missing("`npm ci` in export/browser")
    return [program("node"), str(PAGE / "test.mjs"), chromium()]


@pytest.fixture(scope="module")
def site(driver: list[str], flowers_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the page's folder with graphs to load and images to drop."""
    folder = tmp_path_factory.mktemp("site")
    for file in [*PAGE.glob("*.html"), *PAGE.glob("*.js")]:
        shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(PAGE / "node_modules")
    (folder / "flowers.onnx").symlink_to(flowers_graph)
    (folder / "text.onnx").write_text("no graph")
    write_graph(folder / "foreign.onnx", {"format": "other/1"})
    write_graph(folder / "multi.onnx", OURS | {"kind": "multi"})
    write_graph(folder / "float.onnx", OURS | {"input": "float"})
    write_graph(folder / "logits.onnx", OURS | {"output": "logits"})
    write_graph(folder / "unturned.onnx", OURS | {"preprocess": '{"exif": false}'})
    write_graph(folder / "broken.onnx", OURS)
    for name, data in images().items():
        (folder / name).write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


def write_graph(path: Path, metadata: dict[str, str]) -> None:
    model = onnx.ModelProto(ir_version=10)
    onnx.helper.set_model_props(model, metadata)
    path.write_bytes(model.SerializeToString())


def images() -> dict[str, bytes]:
    """Files whose answers tell: colourful ones of odd sizes, one turned by EXIF, one with its ends to be cut off."""
    rng = np.random.default_rng(0)

    def picture(width: int, height: int) -> Image.Image:
        blobs = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        return blobs.resize((width, height), Image.Resampling.BICUBIC)

    turned = Image.Exif()
    turned[0x0112] = 6
    translucent = picture(90, 120)
    translucent.putalpha(Image.linear_gradient("L").resize(translucent.size))
    return {
        "wide.png": encode(picture(211, 97), "PNG"),
        "small.png": encode(picture(20, 23), "PNG"),
        "ribbon.png": encode(Image.fromarray(rng.integers(0, 256, (7, 4001, 3), dtype=np.uint8)), "PNG"),
        "translucent.png": encode(translucent, "PNG"),
        "turned.jpg": encode(picture(160, 90), "JPEG", exif=turned, quality=95),
    }


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def shown(
    driver: list[str], site: Path, address: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the page shows after each step: one browser for all of them, because it takes seconds to start."""
    chosen = [*images(), "notes.txt"]
    steps = {f"choose {name}": {"query": "", "file": str(site / name), "how": "choose"} for name in chosen}
    steps["drop wide.png"] = {"query": "", "file": str(site / "wide.png"), "how": "drop"}
    steps |= {name: {"query": f"?graph={name}"} for name in REFUSED}
    done = subprocess.run(
        [*driver, address, str(tmp_path_factory.mktemp("profile"))],
        input=json.dumps(list(steps.values())),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(steps, json.loads(done.stdout), strict=True))


def answer(site: Path, data: bytes, **changes: Any) -> dict[str, float]:
    """What onnxruntime in Python answers for the server's preprocessing, the most probable class first."""
    session = onnxruntime.InferenceSession(site / "flowers.onnx", providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocess = replace(Preprocess(**parse_preprocess(metadata["preprocess"])), **changes)
    pixels = preprocess_image(decode(data, exif=preprocess.exif), preprocess)
    (probabilities,) = session.run(None, {"images": pixels.permute(1, 2, 0)[None].numpy()})[0]
    answers = zip(json.loads(metadata["labels"]), probabilities.tolist(), strict=True)
    return dict(sorted(answers, key=lambda pair: -pair[1]))


@pytest.mark.parametrize("step", [*(f"choose {name}" for name in images()), "drop wide.png"])
def test_the_page_answers_what_python_answers(shown, site, step):
    data = (site / step.split()[1]).read_bytes()
    expected = list(answer(site, data).items())[:5]
    page = shown[step]
    assert page["error"] == ""
    assert [label for label, _, _ in page["classes"]] == [label for label, _ in expected]
    values = [float(value) for _, value, _ in page["classes"]]
    assert values == pytest.approx([probability for _, probability in expected], abs=1e-4)
    assert [text for _, _, text in page["classes"]] == [f"{100 * value:.1f} %" for value in values]
    assert page["status"] == f"{step.split()[1]}: {expected[0][0]}, {page['classes'][0][2]}."


def test_the_exif_orientation_matters_to_the_answer(site):
    data = images()["turned.jpg"]
    upright, lying = answer(site, data), answer(site, data, exif=False)
    assert max(abs(upright[label] - lying[label]) for label in upright) > 0.01


def test_the_page_names_the_task_and_the_revision(shown, site):
    metadata = onnxruntime.InferenceSession(site / "flowers.onnx").get_modelmeta().custom_metadata_map
    assert shown["drop wide.png"]["task"] == f"flowers (revision {metadata['revision']})"


def test_a_file_that_is_no_image_is_refused(shown):
    page = shown["choose notes.txt"]
    assert page["error"].startswith("notes.txt is not an image that this browser can read: ")
    assert page["classes"] == []


@pytest.mark.parametrize("graph", REFUSED)
def test_a_graph_that_the_page_cannot_use_is_refused(shown, graph):
    assert shown[graph]["error"].startswith(f"{graph} {REFUSED[graph]}")
    assert shown[graph]["status"] == ""


# Its parts, without a browser

RESIZE = """
import { readFileSync } from "node:fs";
const { scaleAndCrop } = await import(process.argv[1]);
const { height, width, rgba, preprocess } = JSON.parse(readFileSync(0, "utf8"));
const data = new Uint8ClampedArray(Buffer.from(rgba, "base64"));
process.stdout.write(Buffer.from(scaleAndCrop({ data, height, width }, preprocess)));
"""


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("shape", "input_size", "crop_mode"),
    [
        ((301, 452), (32, 32), "center"),
        ((64, 41), (224, 224), "center"),
        ((90, 200), (16, 49), "center"),
        ((77, 50), (33, 20), "squash"),
    ],
)
def test_scaling_equals_the_servers(shape, input_size, crop_mode, interpolation):
    preprocess = Preprocess(input_size, 0.9, crop_mode, interpolation, (0.5,) * 3, (0.5,) * 3)
    rgba = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    expected = preprocess_image(torch.from_numpy(rgba[..., :3]).permute(2, 0, 1), preprocess).permute(1, 2, 0).numpy()
    image = {"height": shape[0], "width": shape[1], "rgba": base64.b64encode(rgba.tobytes()).decode()}
    done = subprocess.run(
        [program("node"), "--input-type=module", "--eval", RESIZE, (PAGE / "resize.js").as_uri()],
        input=json.dumps(image | {"preprocess": asdict(preprocess)}).encode(),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    got = np.frombuffer(done.stdout, np.uint8).reshape(expected.shape)
    difference = np.abs(got.astype(int) - expected)
    # Equal where torch has its fixed-point filter (x86 with AVX2); elsewhere it rounds floats.
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_the_lock_file_pins_every_package_and_names_no_host():
    text = (PAGE / "package-lock.json").read_text()
    packages = json.loads(text)["packages"]
    own = packages.pop("")
    assert "://" not in text and "resolved" not in text
    assert all(package["version"] and package["integrity"] for package in packages.values())
    assert own["dependencies"] == json.loads((PAGE / "package.json").read_text())["dependencies"]
