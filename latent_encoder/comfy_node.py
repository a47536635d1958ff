"""One node of ComfyUI as a function: its required inputs checked once, its output unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errors import SetupError
from latent_encoder.releases import TESTED
from utils import get_value_at_index


class Node:
    """A ComfyUI node that can be called, V1 (a class with `FUNCTION`) or V3 (`io.ComfyNode`) alike."""

    def __init__(self, node_id: str, node_class: Any, supplied: Sequence[str]) -> None:
        """Prepare calls of the node with the inputs `supplied`.

        Raises:
            SetupError: this release's node requires another input and declares no default for it.
        """
        self._call = getattr(node_class(), node_class.FUNCTION)
        self._defaults = _declared_defaults(node_id, node_class, supplied)
        self.inputs = frozenset().union(*(node_class.INPUT_TYPES().get(kind, ()) for kind in ("required", "optional")))

    def __call__(self, **inputs: Any) -> Any:
        """Run the node and return its first output."""
        return get_value_at_index(self.run(**inputs), 0)

    def run(self, **inputs: Any) -> Any:
        """Run the node and return all its outputs, as the node has them."""
        return self._call(**{**self._defaults, **inputs})


def _declared_defaults(node_id: str, node_class: Any, supplied: Sequence[str]) -> dict[str, Any]:
    """Return the node's own defaults for required inputs that we do not supply; newer releases may add inputs."""
    required: dict[str, Any] = node_class.INPUT_TYPES().get("required", {})
    options = {name: spec[1] if len(spec) > 1 else {} for name, spec in required.items() if name not in supplied}
    without = [name for name, option in options.items() if "default" not in option]
    if without:
        raise SetupError(f"This ComfyUI's node {node_id} requires {', '.join(without)}, which has no default ({TESTED}).")
    return {name: option["default"] for name, option in options.items()}
