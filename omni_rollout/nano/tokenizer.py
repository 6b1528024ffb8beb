"""A small Qwen2-style byte-level BPE tokenizer: one token per word of the prompts and of the pipeline's template."""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from omni_rollout.nano import render

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""`QwenImagePipeline.prompt_template_encode`, word for word."""

PREFIX_TOKENS = 34
"""Tokens before the prompt in the template. QwenImagePipeline hard-codes it, so a tokenizer with another count is unusable."""

PROMPT_WIDTH = 16
"""Fixed width in tokens of the nano recipe's prompts, the template's suffix included."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

EXTRA_WORDS = "a photo of the cat and a dog sitting on a table, with text; hello world"
"""Words for other people's tests; anything else still tokenizes, byte by byte."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _corpus(template: str) -> list[str]:
    texts = (*render.NUMBERS, *render.DIGITS, *render.WORDS)
    prompts = [render.prompt_for(text, color) for text in texts for color in render.COLORS]
    for token in SPECIAL_TOKENS:
        template = template.replace(token, "")
    return [*template.split("{}"), EXTRA_WORDS, *prompts]


def make_tokenizer(template: str = TEMPLATE, prefix_tokens: int = PREFIX_TOKENS) -> Qwen2Tokenizer:
    """Of `template`, with a `{}` for the prompt, each word is one token.

    Raises RuntimeError if what stands before the prompt is not exactly `prefix_tokens` long.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    # The vocabulary's bound is never reached: merging goes on until every word of the corpus is one token.
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[], show_progress=False
    )
    bpe.train_from_iterator(_corpus(template), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]  # annotated as strings, passed on to BPE, which takes pairs
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
    )
    prefix = tokenizer(template.split("{}")[0]).input_ids
    if len(prefix) != prefix_tokens:
        raise RuntimeError(
            f"the template's prefix has {len(prefix)} tokens, the pipeline drops {prefix_tokens}: "
            "extend the tokenizer's corpus so that each template word is one token; "
            f"got {tokenizer.convert_ids_to_tokens(prefix)}"
        )
    return tokenizer
