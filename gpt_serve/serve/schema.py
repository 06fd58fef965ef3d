"""What ``/docs`` says of each route: models for the OpenAPI page only; the handlers build their answers directly."""

from typing import Any, Literal, get_args

from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema

from gpt_serve.serve.inputs import EVERY, MAX_IMAGES, MAX_TASKS, MAX_TOP_K
from gpt_serve.serve.messages import MaskFormat
from gpt_serve.serve.problems import MEDIA_TYPE
from gpt_serve.specs import DEFAULT_TOP_K, TASK_PATTERN

_KNOWN = "Share of the validation images that lie at least as far from what the task was trained on; where it can tell"
_UNKNOWN = "Whether the image is unlike what the task was trained on: as 95 % of the validation images are not"


class LabelProbability(BaseModel):
    label: str
    probability: float


class PredictAnswer(BaseModel):
    task: str
    revision: str
    predictions: list[LabelProbability]
    known: float | SkipJsonSchema[None] = Field(None, ge=0, le=1, description=_KNOWN)
    unknown: bool | SkipJsonSchema[None] = Field(None, description=_UNKNOWN)


class ClassShare(BaseModel):
    id: int
    label: str
    share: float


class RunLengths(BaseModel):
    id: int
    size: tuple[int, int]
    counts: str


class SegmentationAnswer(BaseModel):
    task: str
    revision: str
    kind: Literal["segmentation"]
    width: int
    height: int
    classes: list[ClassShare]
    mask: str | list[RunLengths] | None = None


class Problem(BaseModel):
    type: str
    title: str
    status: int
    detail: str


class TaskProblem(Problem):
    task: str


class Attention(BaseModel):
    task: str
    revision: str
    block: int
    most: float
    picture: str


class TaskEntry(BaseModel):
    task: str
    kind: Literal["classification", "segmentation"] | None = None
    method: str | None = None
    backbone: str | None = None
    classes: int | None = None
    prompts: int | None = None
    revision: str | None = None
    size_bytes: int | None = None
    val_accuracy: float | None = None
    val_miou: float | None = None
    created: str | None = None
    error: str | None = None


class TaskList(BaseModel):
    tasks: list[TaskEntry]


class TaskDetail(TaskEntry):
    labels: list[str]


class Alive(BaseModel):
    status: str


class Ready(Alive):
    backbone: str
    backbone_sha256: str


_PROBLEM = {"schema": Problem.model_json_schema()}
_MEANING = {
    400: "A field is missing, unknown or malformed",
    401: "The key is missing or wrong",
    403: "The key does not open this",
    404: "Unknown task",
    408: "The body did not arrive in time",
    413: "Body or pixel count over the limit",
    415: "Neither a form nor JSON, or the image is not JPEG, PNG or WebP",
    422: "The image cannot be decoded",
    429: "The key's limit is reached; see Retry-After",
    503: "Overloaded, not ready, shutting down, or the task's adapter is refused; see Retry-After",
    504: "The deadline passed",
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _MEANING[status], "content": {MEDIA_TYPE: _PROBLEM}} for status in statuses}


# Parameters are described here and read by the routes themselves: FastAPI's own checks would answer otherwise.
_NAME = {"type": "string", "pattern": f"^{TASK_PATTERN.pattern}$"}
_IN_PATH = {"name": "task", "in": "path", "required": True, "schema": _NAME}
_TOP_K = {
    "type": "integer",
    "minimum": 1,
    "maximum": MAX_TOP_K,
    "description": f"How many labels to list. Without it {DEFAULT_TOP_K}, or where images have several labels all that "
    "are above their threshold",
}


_MASK = {
    "enum": list(get_args(MaskFormat)),
    "default": "png",
    "description": "of a segmentation task: a PNG in base64 whose pixels are class ids, COCO run lengths, or nothing",
}


def _body(task: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    fields = {"task": task, "tasks": _ALL_TASKS, "image": image, "top_k": _TOP_K, "mask": _MASK}
    schema = {
        "type": "object",
        "required": ["image"],
        "oneOf": [{"required": ["task"]}, {"required": ["tasks"]}],
        "properties": fields,
        "additionalProperties": False,
    }
    return {"schema": schema}


def _list_of(item: dict[str, Any], most: int, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1, "maxItems": most, **more}


_ALL_TASKS = {"const": EVERY, "description": "in place of task: all tasks that the key opens"}
_NAMES = _list_of(_NAME, MAX_TASKS, uniqueItems=True)
_FILE = {"type": "string", "format": "binary", "minLength": 1, "description": "JPEG, PNG or WebP file"}
_BASE64 = {"type": "string", "format": "byte", "minLength": 1, "description": "the file in base64, or as a data: URI"}
_CONTENT = {
    "multipart/form-data": _body(_NAMES, _list_of(_FILE, MAX_IMAGES)),  # in a form, one is a list of one
    "application/json": _body({"anyOf": [_NAME, _NAMES]}, {"anyOf": [_BASE64, _list_of(_BASE64, MAX_IMAGES)]}),
}
_IMAGE_BODY = {
    "required": True,
    "content": {f"image/{kind}": {"schema": _FILE} for kind in ("jpeg", "png", "webp")},
}
_PREDICT_PROBLEMS = _problems(400, 401, 403, 404, 408, 413, 415, 422, 429, 503, 504)

_ANSWER = PredictAnswer | SegmentationAnswer
_BY_TASK = list[_ANSWER | TaskProblem]
_PICTURE = {"image/png": {"schema": {"type": "string", "format": "binary"}}}
_PREDICTED: dict[int | str, dict[str, Any]] = {
    200: {"content": _PICTURE, "description": "With Accept: image/png, the mask of a segmentation task is a PNG file"},
    **_PREDICT_PROBLEMS,
}

PREDICT: dict[str, Any] = {
    "response_model": _ANSWER | list[_ANSWER | Problem] | _BY_TASK | list[_BY_TASK],
    "responses": _PREDICTED,
    "openapi_extra": {
        "requestBody": {"required": True, "content": _CONTENT},
    },
}
PREDICT_TASK: dict[str, Any] = {
    "response_model": _ANSWER | list[_ANSWER | Problem],
    "responses": _PREDICTED,
    "openapi_extra": {
        "requestBody": _IMAGE_BODY,
        "parameters": [
            _IN_PATH,
            {"name": "top_k", "in": "query", "schema": _TOP_K},
            {"name": "mask", "in": "query", "schema": _MASK},
        ],
    },
}
ATTENTION: dict[str, Any] = {
    "response_model": Attention,
    "responses": _PREDICT_PROBLEMS,
    "openapi_extra": {"requestBody": _IMAGE_BODY, "parameters": [_IN_PATH]},
}
TASKS: dict[str, Any] = {"response_model": TaskList, "responses": _problems(401, 503)}
TASK: dict[str, Any] = {
    "response_model": TaskDetail,
    "responses": _problems(400, 401, 403, 404, 503),
    "openapi_extra": {"parameters": [_IN_PATH]},
}
HEALTH: dict[str, Any] = {"response_model": Alive}
READY: dict[str, Any] = {"response_model": Ready, "responses": _problems(503)}
METRICS: dict[str, Any] = {"responses": {200: {"content": {"text/plain": {}}}} | _problems(401, 403)}
