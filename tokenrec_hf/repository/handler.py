"""What a Hugging Face Inference Endpoint runs to answer requests from this repository."""

from typing import Any

from transformers import pipeline


class EndpointHandler:
    """The pipeline of the repository.

    Args:
        path: the folder of the repository.
    """

    def __init__(self, path: str = ""):
        # The task is this repository's own.
        self.recommend = pipeline("generative-retrieval", model=path, trust_remote_code=True)  # type: ignore[call-overload]

    def __call__(self, data: dict[str, Any]) -> Any:
        """The recommendations for `inputs`, one request or a list, with the pipeline's arguments in `parameters`."""
        try:
            return self.recommend(data["inputs"], **data.get("parameters") or {})
        except (KeyError, TypeError, ValueError) as error:
            return {"error": str(error.args[0])}
