"""Every error that the package raises on purpose.

The message of each is one line for the person who caused it and says what to do::

    GPTServeError
    ├── UsageError             an option or argument that cannot work
    ├── DataError              a dataset that cannot be trained or evaluated on
    ├── BackboneError          a backbone that cannot be used
    │   ├── UnsupportedBackbone    not a plain Vision Transformer
    │   └── CheckpointError        weights that do not fit, or cannot be read
    ├── AdapterError           an adapter that cannot be used
    │   ├── InvalidTaskName        not [a-z0-9][a-z0-9._-]{0,63}
    │   ├── UnknownTask            no adapter of that name
    │   ├── InvalidAdapter         a file that is not a valid adapter
    │   ├── BackboneMismatch       trained on another backbone
    │   └── BankFull               no room for it on the device
    ├── ExportError            a graph that cannot be made, opened, or that does not answer as torch does
    ├── ImageError             an image that cannot be used
    │   ├── ImageTooLarge          too many bytes or pixels
    │   ├── UnsupportedImage       not JPEG, PNG or WebP
    │   └── UndecodableImage       damaged or truncated
    ├── ServerError            a server that does not answer, or not as GPT-Serve does
    └── RequestError           a request that the server turns away
        ├── InvalidRequest         a field is missing or malformed
        ├── InvalidKey             no key, or one that the server does not know
        ├── TaskForbidden          a task that the key does not open
        ├── TurnedAway             no room for it just now
        │   ├── RateLimited            more requests than the key allows
        │   └── Overloaded             too many requests are waiting
        ├── NotReady               starting, restarting or draining
        └── DeadlineExceeded       no answer in time

Nothing here knows exit codes (``cli/``) or HTTP status codes (``serve/``).
"""

from typing import ClassVar, Self


class GPTServeError(Exception):
    """Base of every deliberate error. ``str(error)`` is a single line for the user."""

    named: ClassVar[dict[str, "type[GPTServeError]"]] = {}
    """Every class of the tree by its name, for errors that travel between processes."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        GPTServeError.named[cls.__name__] = cls

    def fresh(self) -> Self:
        """A new error of the same class and message, to raise in place of one that is kept.

        Raising an exception writes to it (traceback, context): one that is raised twice, or from two threads, mixes
        the tracebacks of both and keeps everything alive that they hold.
        """
        return type(self)(*self.args)


def revive(name: str, message: str) -> GPTServeError:
    """The error that another process sent as its class's name and its message.

    A name that is not in the tree, such as that of an exception nobody raised on purpose, gives a `GPTServeError`.
    """
    return GPTServeError.named.get(name, GPTServeError)(message)


class UsageError(GPTServeError):
    """An option or argument that cannot work."""


class DataError(GPTServeError):
    """A dataset that cannot be trained or evaluated on."""


class BackboneError(GPTServeError):
    """A backbone that cannot be used."""


class UnsupportedBackbone(BackboneError):
    """The model is not a plain Vision Transformer."""


class CheckpointError(BackboneError):
    """Weights that do not fit the model or cannot be read."""


class AdapterError(GPTServeError):
    """An adapter that cannot be used."""


class InvalidTaskName(AdapterError):
    """The name does not match ``[a-z0-9][a-z0-9._-]{0,63}``."""


class UnknownTask(AdapterError):
    """No adapter of that name is stored."""


class InvalidAdapter(AdapterError):
    """The file is not a valid adapter."""


class BackboneMismatch(AdapterError):
    """The adapter was trained on a backbone with other weights."""


class BankFull(AdapterError):
    """There is no room for the adapter on the device: everything there is in use, or it is too large."""


class ExportError(GPTServeError):
    """An ONNX graph that cannot be made or opened, or that does not answer as torch does."""


class ImageError(GPTServeError):
    """An image that cannot be used."""


class ImageTooLarge(ImageError):
    """The image has too many bytes or pixels."""


class UnsupportedImage(ImageError):
    """The bytes are not JPEG, PNG or WebP."""


class UndecodableImage(ImageError):
    """The image is damaged or truncated."""


class ServerError(GPTServeError):
    """A server that cannot be reached, fails, or does not answer as GPT-Serve does; raised by `gpt_serve.client`."""


class RequestError(GPTServeError):
    """A request that the server turns away."""


class InvalidRequest(RequestError):
    """A field of the request is missing or malformed."""


class InvalidKey(RequestError):
    """The request has no key, or one that the server does not know."""


class TaskForbidden(RequestError):
    """The request's key does not open the task."""


class TurnedAway(RequestError):
    """There is no room for the request just now.

    Attributes:
        seconds: after which trying again may help.
    """

    def __init__(self, message: str, seconds: float = 1.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class RateLimited(TurnedAway):
    """The key's owner has more requests a second, or more images in flight, than the key allows."""


class Overloaded(TurnedAway):
    """Too many requests are waiting."""


class NotReady(RequestError):
    """The server is starting, restarting its worker or draining."""


class DeadlineExceeded(RequestError):
    """No answer came within the request's deadline."""
