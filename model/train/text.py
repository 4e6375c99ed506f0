"""The bundled checkpoint's own small UMT5 and tokenizer.

The tokenizer is byte-pair encoding over lower-cased words, learnt from captions, with every printable ASCII
character in its vocabulary, so that words it never saw are spelt instead of lost. The encoder is trained
together with the DiT.
"""

from __future__ import annotations

import random
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from model import world

VOCABULARY = 512
MAX_TOKENS = 64
PADDED_TO = 32
WIDTH = 128


def new_tokenizer(captions: int = 4000) -> PreTrainedTokenizerFast:
    """A tokenizer learnt from drawn captions; ids 0, 1, 2 are <pad>, </s>, <unk> as in UMT5."""
    rng = random.Random(0)
    films = (world.draw_film(i, two_shapes=0.5) for i in range(captions))
    texts = [world.caption(film.scene, rng) for film in films]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=[*string.ascii_lowercase, *string.digits, *string.punctuation],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def new_encoder() -> UMT5EncoderModel:
    """An untrained UMT5 encoder of two layers."""
    config = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config)


class Prompter(nn.Module):
    """Tokenizer and encoder together: prompts -> states [B,1,L,C] and mask [B,L].

    L is a multiple of 32, so that batches have one shape and a compiled step is compiled once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder

    def forward(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        batch = self.tokenizer(
            prompts,
            padding=True,
            pad_to_multiple_of=PADDED_TO,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        batch = batch.to(self.encoder.device)
        mask = batch["attention_mask"]
        states = self.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        return states.unsqueeze(1), mask

    def save(self, folder: Path) -> None:
        """Write tokenizer/ and text_encoder/ in the official layout."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)


def new_prompter(seed: int) -> Prompter:
    """An untrained pair."""
    torch.manual_seed(seed)
    return Prompter(new_tokenizer(), new_encoder())
