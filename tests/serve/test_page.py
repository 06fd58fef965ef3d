"""The page at ``/`` in a real browser, in front of a real server: what people do with it, with and without eyes."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_serve.serve.keyfile import add_key
from gpt_serve.train.data.datasets import open_dataset
from tests.browser import FLAGS, chromium, missing
from tests.serve.harness import ServerProcess, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
AXE = ROOT / "export" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
# A mask of 2x1 pixels, classes 0 and 1; palette: 0 red, 1 blue.
MASK = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABAQMAAADO7O3JAAAABlBMVEX/AAAAAP9sof2OAAAACklEQVR4nGNwAAAAQgBBKTf07wAA"
    "AABJRU5ErkJggg=="
)

ANSWER = {"task": "digits", "revision": "0" * 12}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """A server of the shipped tasks."""
    yield from serving(ROOT / "adapters" / "mae-vit-tiny-32", engine="torch")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("the Python package playwright")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The page, loaded; anything that the browser complains about, or asks of another host, fails the test."""
    context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"])
    made = context.new_page()
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    made.on(
        "request",
        lambda request: request.url.startswith((server.url, "blob:", "data:")) or complaints.append(request.url),
    )
    made.goto(server.url + "/")
    made.get_by_role("checkbox", name="digits").wait_for()
    yield made
    context.close()
    # A refusal is shown to the visitor; the console's line about it is the browser's own.
    assert [text for text in complaints if "the server responded with a status of" not in text] == []


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handwritten 5 of scikit-learn's."""
    path = tmp_path_factory.mktemp("images") / "digit.png"
    path.write_bytes(open_dataset("digits", 0).test[0].read())
    return path


def choose(page: Any, *tasks: str) -> None:
    for box in page.get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("value") in tasks)


def ask(page: Any) -> Any:
    """Press the button; the answers, once they are there."""
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("answered for").wait_for()
    return page.locator("article")


def answer_with(page: Any, body: dict[str, Any]) -> None:
    """Have predictions answered by ``body`` from now on: for fields that no shipped task has."""
    page.route("**/predict", lambda route: route.fulfill(json=body))


def paste(page: Any, event: str, files: dict[str, bytes]) -> None:
    """Dispatch a paste or a drop as the browser does when a visitor does it."""
    script = """([event, files]) => {
        const data = new DataTransfer(), types = {png: "image/png", txt: "text/plain"};
        for (const [name, bytes] of files)
            data.items.add(new File([new Uint8Array(bytes)], name, {type: types[name.split(".").at(-1)]}));
        const options = {bubbles: true, cancelable: true};
        document.body.dispatchEvent(event === "paste"
            ? new ClipboardEvent("paste", {...options, clipboardData: data})
            : new DragEvent("drop", {...options, dataTransfer: data}));
    }"""
    page.evaluate(script, [event, [[name, list(content)] for name, content in files.items()]])


# Asking


def test_the_answers_are_the_servers(page: Any, server: ServerProcess, digit: Path) -> None:
    page.set_input_files("#file", digit)
    choose(page, "digits", "flowers")
    articles = ask(page)
    assert articles.count() == 2
    for number, task in enumerate(("digits", "flowers")):
        expected = server.predict(task, digit.read_bytes(), top_k="5").json()
        article = articles.nth(number)
        assert article.get_by_role("heading").text_content() == task
        assert f"revision {expected['revision']}" in article.text_content()
        assert article.locator(".label").all_text_contents() == [item["label"] for item in expected["predictions"]]
        shown = article.locator(".value").all_text_contents()
        assert shown == [f"{100 * item['probability']:.1f}%" for item in expected["predictions"]]
        widths = article.locator(".bar").evaluate_all(
            "bars => bars.map(bar => parseFloat(bar.style.getPropertyValue('--share')))"
        )
        assert widths == pytest.approx([100 * item["probability"] for item in expected["predictions"]], abs=1e-3)


def test_where_an_adapter_looks_is_shown_on_request(page: Any, digit: Path) -> None:
    page.set_input_files("#file", digit)
    choose(page, "digits")
    article = ask(page).first
    article.get_by_role("button", name="Where does it look?").focus()
    page.keyboard.press("Enter")
    picture = article.get_by_role("img", name="Where digits looks in digit.png")
    picture.wait_for()
    assert picture.evaluate("async (picture) => { await picture.decode(); return picture.naturalWidth; }") >= 256
    assert "times an even share" in article.locator("figcaption").text_content()
    assert page.evaluate("document.activeElement.tagName") == "FIGURE"


def test_a_refused_look_says_why_and_may_be_tried_again(page: Any, digit: Path) -> None:
    page.set_input_files("#file", digit)
    choose(page, "digits")
    article = ask(page).first
    page.route(
        "**/attention/*", lambda route: route.fulfill(status=503, json={"title": "Overloaded", "detail": "full"})
    )
    button = article.get_by_role("button", name="Where does it look?")
    button.click()
    article.get_by_text("503 Overloaded: full").wait_for()
    page.unroute("**/attention/*")
    button.click()
    article.get_by_role("img").wait_for()


@pytest.mark.parametrize("how", ["paste", "drop"])
def test_an_image_may_be_pasted_or_dropped(page: Any, digit: Path, how: str) -> None:
    paste(page, how, {"notes.txt": b"x"})
    assert "not an image" in page.get_by_role("alert").text_content()
    paste(page, how, {"notes.txt": b"x", "five.png": digit.read_bytes()})
    page.get_by_alt_text("The chosen image, five.png").wait_for()
    assert page.get_by_role("alert").text_content() == ""
    choose(page, "digits")
    assert ask(page).locator(".label").first.text_content() == "5"


def test_a_photo_may_be_taken(page: Any) -> None:
    page.get_by_role("button", name="Take a photo").click()
    page.get_by_role("button", name="Use this picture").click()
    page.get_by_alt_text("The chosen image, photo.jpg").wait_for()
    assert page.get_by_label("Camera").is_hidden()
    choose(page, "caltech101")
    assert ask(page).locator(".label").count() == 5


@pytest.mark.parametrize("name", ["digit.png", """a'b; "c", $(touch made) d.png"""])
def test_the_command_gets_the_same_answer(page: Any, digit: Path, tmp_path: Path, name: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    shutil.copy(digit, tmp_path / name)
    page.set_input_files("#file", tmp_path / name)
    choose(page, "digits")
    page.get_by_label("Answers per task").fill("2")
    shown = ask(page).locator(".label").all_text_contents()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    command = page.evaluate("navigator.clipboard.readText()")
    assert command == page.locator("#curl").text_content()
    run = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [item["label"] for item in json.loads(run.stdout)["predictions"]] == shown and len(shown) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_what_is_missing_is_said(page: Any, digit: Path) -> None:
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("alert").text_content() == "Choose an image first."
    page.set_input_files("#file", digit)
    choose(page)
    page.get_by_role("button", name="Ask").click()
    assert page.get_by_role("alert").text_content() == "Choose at least one task."


def test_a_refusal_is_shown_beside_the_other_answers(page: Any, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    choose(page, "digits")
    assert "415 Unsupported image type" in ask(page).text_content()


def test_tasks_share_a_request_and_each_has_its_own_answer(page: Any, server: ServerProcess, digit: Path) -> None:
    posted: list[str] = []
    page.on("request", lambda request: request.method == "POST" and posted.append(request.url))
    problem = {"title": "Unknown task", "status": 404, "detail": "no such task", "task": "flowers"}
    page.set_input_files("#file", digit)
    choose(page, "digits", "flowers")
    assert ask(page).count() == 2
    assert len(posted) == 1
    assert page.locator("#curl").text_content().count("-F task=") == 2
    page.route("**/predict", lambda route: route.fulfill(json=[{**ANSWER, "predictions": []}, problem]))
    articles = ask(page)
    assert "revision 000000000000" in articles.nth(0).text_content()
    assert "404 Unknown task: no such task" in articles.nth(1).text_content()


# What only some tasks answer


def test_a_stranger_is_marked(page: Any, digit: Path) -> None:
    answer_with(page, {"task": "digits", "revision": "0" * 12, "predictions": [], "known": 0.02, "unknown": True})
    page.set_input_files("#file", digit)
    choose(page, "digits")
    shown = ask(page).text_content()
    assert "Probably none of this task's classes" in shown and "2.0%" in shown


def test_a_mask_lies_over_the_image_with_a_legend(page: Any, digit: Path) -> None:
    classes = [{"id": 0, "label": "sky", "share": 0.25}, {"id": 1, "label": "sea", "share": 0.75}]
    answer_with(
        page,
        {"task": "digits", "revision": "0" * 12, "kind": "segmentation", "width": 2, "height": 1}
        | {"classes": classes, "mask": MASK},
    )
    page.set_input_files("#file", digit)
    choose(page, "digits")
    article = ask(page)
    assert article.locator(".label").all_text_contents() == ["sea", "sky"]
    colours = article.locator(".swatch").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    assert colours == ["rgb(0, 0, 255)", "rgb(255, 0, 0)"]
    mask = page.get_by_alt_text("Mask of digits")
    assert mask.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [2, 1]
    assert mask.bounding_box() == page.locator("article").get_by_alt_text("digit.png").bounding_box()
    page.get_by_role("slider", name="Mask").fill("0")
    assert mask.evaluate("image => getComputedStyle(image).opacity") == "0"


def test_labels_are_text(page: Any, digit: Path) -> None:
    label = "<img src=x onerror=alert(1)>"
    answer_with(page, {"task": "digits", "revision": "0" * 12, "predictions": [{"label": label, "probability": 1.0}]})
    page.set_input_files("#file", digit)
    choose(page, "digits")
    assert ask(page).locator(".label").text_content() == label


# The server's state


def test_the_state_of_the_server_is_shown(page: Any, digit: Path) -> None:
    page.set_input_files("#file", digit)
    choose(page, "digits", "flowers", "caltech101")
    ask(page)
    page.get_by_text("Ready.").wait_for()
    terms = page.locator("#server dt").all_text_contents()
    state = dict(zip(terms, page.locator("#server dd").all_text_contents(), strict=True))
    assert (state["Tasks"], state["Backbone"]) == ("3", "mae-vit-tiny-32")
    assert (state["Adapters on the device"], state["Adapters in host memory"]) == ("3", "3")
    assert state["Requests being answered"] == state["Restarts of the worker"] == "0"
    assert state["Device memory that they take"].endswith(" MiB")


def test_thousands_of_tasks_are_found_by_name(page: Any) -> None:
    many = [{"task": f"task-{number}", "method": "gated", "classes": 2} for number in range(3000)]
    page.route("**/tasks", lambda route: route.fulfill(json={"tasks": [*many, {"task": "bad", "error": "refused"}]}))
    page.reload()
    page.get_by_text("2901 more: type a part of the name above.").wait_for()
    assert page.get_by_role("checkbox").count() == 100
    page.get_by_label("Show tasks whose name contains").fill("-2999")
    page.get_by_role("checkbox", name="task-2999").check()
    page.get_by_label("Show tasks whose name contains").fill("bad")
    assert page.get_by_role("checkbox", name="bad refused").is_disabled()
    assert page.get_by_role("checkbox", name="task-2999").is_checked()  # what is chosen stays in sight


def test_a_server_that_wants_a_key_gets_it(browser: Any, digit: Path, tmp_path: Path) -> None:
    """The key opens one task, and so not the metrics."""
    key, _ = add_key(tmp_path / "keys.json", "acme", tasks=("digits",))
    for guarded in serving(ROOT / "adapters" / "mae-vit-tiny-32", engine="torch", keys=str(tmp_path / "keys.json")):
        page = browser.new_page()
        page.goto(guarded.url + "/")
        page.get_by_text("401 Unauthorized").wait_for()
        page.get_by_text("Key", exact=True).click()
        page.get_by_label("Key for this server").fill(key)
        page.get_by_label("Key for this server").press("Tab")
        page.get_by_text("Ready.").wait_for()
        assert page.get_by_role("checkbox").count() == 1
        assert page.locator("#server dt").all_text_contents() == ["Tasks", "Backbone"]
        page.set_input_files("#file", digit)
        choose(page, "digits")
        assert ask(page).locator(".label").first.text_content() == "5"
        command = page.locator("#curl").text_content()
        assert key not in command and "X-API-Key: $GPT_SERVE_KEY" in shlex.split(command)
        page.close()


# With a keyboard, a screen reader, a telephone


def test_everything_can_be_done_with_a_keyboard(page: Any, digit: Path) -> None:
    page.set_input_files("#file", digit)
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        focused = page.evaluate("[document.activeElement.id, document.activeElement.value]")
        reached.append(focused[0] or focused[1])
        if focused[1] == "digits" and not page.get_by_role("checkbox", name="digits").is_checked():
            page.keyboard.press("Space")
        if focused[0] == "ask":
            page.keyboard.press("Enter")
            break
    assert reached == ["file", "photograph", "filter", "caltech101", "digits", "flowers", "top-k", "ask"]
    page.get_by_text("2 tasks answered for digit.png").wait_for()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.get_by_label("Answers per task").focus()
    assert page.evaluate(outline) == "solid"


def test_what_changes_is_read_out(page: Any, digit: Path) -> None:
    page.set_input_files("#file", digit)
    choose(page, "digits")
    ask(page)
    said = page.get_by_role("status").all_text_contents()
    assert said == ["Ready.", "1 task answered for digit.png."]
    tree = page.locator("main").aria_snapshot()
    assert 'heading "digits" [level=3]' in tree and "100.0%" in tree


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_no_rule_of_accessibility_is_broken(page: Any, digit: Path, scheme: str, width: int) -> None:
    if not AXE.is_file():
        missing("`npm ci` in export/browser")
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.set_input_files("#file", digit)
    choose(page, "digits", "flowers")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run()")
    assert len(found["passes"]) > 15
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []


def test_the_interface_is_described_without_a_connection(page: Any, server: ServerProcess) -> None:
    page.goto(server.url + "/docs")
    page.locator(".opblock", has_text="/predict").first.wait_for()
