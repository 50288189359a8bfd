"""A Whisper model for faster-whisper that hears the same word in all speech."""

from pathlib import Path

import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)


SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"]
SPECIAL += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{i * 0.02:.2f}|>" for i in range(1501))]


def write_whisper(folder: Path, word: str) -> Path:
    """The real architecture and format, a thousandth of the size; its text is `word` over and over."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), f"Ġ{word}"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    end = tokenizer.token_to_id(SPECIAL[0])
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=tokenizer.token_to_id(SPECIAL[1]),
        suppress_tokens=[],
        begin_suppress_tokens=[end],
    )
    model = WhisperForConditionalGeneration(config)
    decoder = model.model.decoder
    with torch.no_grad():  # whatever is heard, the last state is the same, and one word is nearest to it
        decoder.layer_norm.weight.zero_()
        decoder.layer_norm.bias.fill_(1.0)
        decoder.embed_tokens.weight[len(tokens) - 1] = 1.0
    source, target = folder / "transformers", folder / "tiny-whisper"
    model.save_pretrained(source)
    tokenizer.save(str(source / "tokenizer.json"))
    names = dict.fromkeys(("unk_token", "eos_token", "bos_token", "pad_token"), SPECIAL[0])
    PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **names).save_pretrained(source)
    WhisperFeatureExtractor().save_pretrained(source)
    files = ["tokenizer.json", "preprocessor_config.json"]
    TransformersConverter(str(source), copy_files=files).convert(str(target))
    return target
