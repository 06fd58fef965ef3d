"""A Python client for a GPT-Serve server; needs httpx (``pip install 'gpt-serve[client]'``) and imports no torch.

::

    from gpt_serve.client import Client

    with Client("http://localhost:8000") as client:
        answer = client.predict("flowers", "sunflower.jpg", top_k=3)
        print(answer.best, answer.revision)

`AsyncClient` has the same methods to ``await``. What a server refuses is raised as the error of `gpt_serve.errors` that
it names, such as `UnknownTask` or `UndecodableImage`. Requests that it turned away for the moment, or did not answer,
are sent again: a prediction changes nothing on the server, so sending one twice does no harm.
"""

from importlib.util import find_spec

if find_spec("httpx") is None:
    raise ModuleNotFoundError("gpt_serve.client needs httpx: pip install 'gpt-serve[client]'", name="httpx")

from gpt_serve.client.answers import Answer, ClassShare, Label, Segmentation
from gpt_serve.client.clients import AsyncClient, Client
from gpt_serve.client.retries import Retries

__all__ = ["Answer", "AsyncClient", "ClassShare", "Client", "Label", "Retries", "Segmentation"]
