"""Prompt cleaning, and a small random UMT5 loaded and run as the real one is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError, InputError
from model.text import MAX_TEXT_TOKENS, NEGATIVE_PROMPT, TextEncoder, clean_prompt
from pipeline.facts import RenderFacts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("text")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(root / "tokenizer")
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(root / "text_encoder", max_shard_size="4KB")
    return root


@pytest.fixture(scope="module")
def encoder(folder) -> TextEncoder:
    return TextEncoder.load(folder, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a red\n\tcircle  ", "a red circle"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("schÃ¶n", "schön"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(raw, clean):
    assert clean_prompt(raw) == clean


def test_default_negative_prompt_is_clean_text():
    assert len(NEGATIVE_PROMPT) > 100
    assert clean_prompt(NEGATIVE_PROMPT) == NEGATIVE_PROMPT


def test_storyboards_steer_away_from_what_the_model_was_trained_to_steer_away_from() -> None:
    assert RenderFacts().negative_prompt == NEGATIVE_PROMPT


def test_prompts_are_padded_on_the_right_to_the_full_length(encoder):
    text, mask = encoder.encode(["a red circle", ""])
    assert text.shape == (2, 1, MAX_TEXT_TOKENS, 16)
    assert mask[0].tolist() == [1] * 4 + [0] * (MAX_TEXT_TOKENS - 4)
    assert mask[1].sum() == 1


def test_valid_states_do_not_depend_on_the_other_prompts(encoder):
    alone, mask = encoder.encode(["a red circle"])
    together, _ = encoder.encode(["blue", "a  red\ncircle"])
    valid = mask[0].bool()
    torch.testing.assert_close(together[1, 0, valid], alone[0, 0, valid], atol=1e-5, rtol=0)
    assert not torch.allclose(
        encoder.encode(["a blue circle"])[0][0, 0, valid], alone[0, 0, valid], atol=1e-3
    )


def test_long_prompts_are_cut(encoder):
    _, mask = encoder.encode(["red " * 1000])
    assert int(mask.sum()) == MAX_TEXT_TOKENS


def test_fp32_shards_load_as_bfloat16(folder, encoder):
    assert len(list((folder / "text_encoder").glob("*.safetensors"))) > 1
    small = TextEncoder.load(folder, "cpu", torch.bfloat16)
    text, mask = small.encode(["a red circle"])
    assert text.dtype == torch.bfloat16
    wanted = encoder.encode(["a red circle"])[0][0, 0, mask[0].bool()]
    error = (text[0, 0, mask[0].bool()].float() - wanted).abs().max()
    assert 0 < error < 0.1 * wanted.abs().max()


def test_no_prompt_is_refused(encoder):
    with pytest.raises(InputError):
        encoder.encode([])


def test_missing_folder_and_missing_weights_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="has no folder tokenizer"):
        TextEncoder.load(tmp_path, "cpu", torch.float32)
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    part = tmp_path / "text_encoder"
    part.mkdir()
    (part / "config.json").write_text((folder / "text_encoder" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="holds no"):
        TextEncoder.load(tmp_path, "cpu", torch.float32)
    tensors = {}
    for shard in (folder / "text_encoder").glob("*.safetensors"):
        tensors |= load_file(shard)
    lost = "encoder.final_layer_norm.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        TextEncoder.load(tmp_path, "cpu", torch.float32)
    assert caught.value.problems == [f"missing: {lost} [16]"]


def test_tokenizer_may_set_a_shorter_length(folder, tmp_path):
    for part in ("tokenizer", "text_encoder"):
        (tmp_path / part).mkdir()
        for file in (folder / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 8}))
    text, _ = TextEncoder.load(tmp_path, "cpu", torch.float32).encode(["a red circle"])
    assert text.shape == (1, 1, 8, 16)
