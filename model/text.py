"""Prompts to the states that the transformer reads: cleaning, tokenising, UMT5 encoding.

Legend: B prompts, L text tokens (at most 512, padded on the right), C width of the encoder.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
from torch import Tensor

from model.errors import CheckpointError, InputError
from model.weights import load_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

MAX_TEXT_TOKENS = 512

NEGATIVE_PROMPT = (
    "washed out or oversaturated colours, too bright, too dark, flat light, blurry, out of focus, noise, "
    "compression blocks, ghosting, flicker, a frozen picture, jerky motion, things that melt, split or pop, "
    "wrong anatomy, extra fingers or limbs, distorted faces, crowded background, subtitles, captions, logos, "
    "watermarks, borders"
)
"""What guidance steers away from unless a request names something else. `pipeline.facts` has the same words."""


def clean_prompt(prompt: str) -> str:
    """Repair broken Unicode, resolve HTML entities (twice: some are escaped twice), collapse white space."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(repaired.split())


class TextEncoder:
    """UMT5 encoder and tokenizer of a checkpoint folder."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: UMT5EncoderModel) -> None:
        self._tokenizer = tokenizer
        self._model = model
        # A small checkpoint may read fewer tokens; large tokenizers leave this at a number without meaning.
        self.max_tokens = min(MAX_TEXT_TOKENS, tokenizer.model_max_length)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Read <folder>/tokenizer and <folder>/text_encoder (safetensors only). Raises CheckpointError."""
        # Imported here: transformers takes seconds, and most users of this module only clean prompts.
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

        for needed in ("tokenizer", "text_encoder"):
            if not (Path(folder) / needed).is_dir():
                raise CheckpointError(f"{folder}: has no folder {needed}")
        part = Path(folder) / "text_encoder"
        try:
            tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer", local_files_only=True)
            config = UMT5Config.from_pretrained(part, local_files_only=True)
            with torch.device("meta"):
                model = UMT5EncoderModel(config)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{folder}: the text encoder cannot be loaded ({error})") from error
        # Like the other networks: tensor by tensor to the device, so that the host never holds all of it.
        load_weights(model, part, device=device, dtype=dtype)
        return cls(tokenizer, model.eval().requires_grad_(False))

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States [B,1,L,C] in the type of the weights and mask [B,L] (1 for valid tokens) of the cleaned
        prompts.

        Longer prompts are cut at L tokens, as the model was trained.
        """
        if not prompts:
            raise InputError("prompts: at least one is needed")
        tokens = self._tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="max_length",
            padding_side="right",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        ).to(self._model.device)
        states = self._model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states[:, None], tokens.attention_mask
