"""The text role: prompts to embeddings."""

from __future__ import annotations

from typing import cast

from actors.base import ActorContext, Stopwatch, mapped_errors, produced, write_tensors
from model.checkpoint import load_text
from model.text import TextEncoder
from pipeline.params import TextParams
from pipeline.tasks import Order, Produced


class TextActor:
    """Holds the text encoder. Orders: `text`."""

    def setup(self, context: ActorContext) -> None:
        self._context = context
        with mapped_errors():
            self._encoder: TextEncoder | None = load_text(
                context.checkpoint_path, device=context.device, dtype=context.dtype
            )

    def run(self, order: Order) -> Produced:
        """Encode the order's prompt: text [1,L,C], mask [L]."""
        watch, params = Stopwatch(), cast(TextParams, order.task.params)
        assert self._encoder is not None
        with mapped_errors():
            text, mask = self._encoder.encode([params["prompt"]])
            path = f"{order.attempt_path}/text.safetensors"
            file = write_tensors(self._context, path, {"text": text[0], "mask": mask[0]})
        return produced((file,), watch)

    def close(self) -> None:
        self._encoder = None
