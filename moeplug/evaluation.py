"""Measure what a scheme costs a model on a text: perplexity of both, their ratio, and how often both agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplug.errors import CheckpointError, InputOutputError, UsageError
from moeplug.integrations.transformers import tokenizer_of

WINDOW_TOKENS = 512
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextScore:
    """One model's score on a text: summed negative log likelihood in nats, tokens predicted, and its first choices."""

    nll: float
    tokens: int
    choices: Tensor

    @property
    def perplexity(self) -> float:
        """Return exp of the mean negative log likelihood of a token."""
        return float(torch.tensor(self.nll / self.tokens, dtype=torch.float64).exp())


@dataclass(frozen=True)
class Inputs:
    """What a model is to continue and to be measured on: read and encoded before a weight is.

    ids: (n,) int64, the tokens of the text file.
    """

    tokenizer: Any
    prompt: str | None
    text: Path | None
    ids: Tensor | None


def read_inputs(checkpoint: Path, prompt: str | None, text: Path | None, limit: int | None = None) -> Inputs:
    """Return the inputs of a checkpoint's model, or raise what would otherwise come up after a long load."""
    if prompt is not None:
        check_prompt(prompt)
    tokenizer = load_tokenizer(checkpoint)
    return Inputs(tokenizer, prompt, text, None if text is None else encode_file(tokenizer, text, limit))


def load_tokenizer(path: Path) -> Any:
    """Return a checkpoint's tokenizer, or raise CheckpointError where it has none that makes tokens."""
    tokenizer = tokenizer_of(path)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there is no file
        raise CheckpointError(f"{path}: there is no tokenizer.json, or no token in it; --prompt and --text need one")
    return tokenizer


def encode_file(tokenizer: Any, file: Path, limit: int | None = None) -> Tensor:
    """Return a text file's token ids (n,) int64, at most `limit`."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputOutputError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: byte {error.start} is not UTF-8; --text takes a plain text file") from error
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() < 2:
        raise UsageError(f"{file}: {ids.numel()} tokens; at least 2 are needed to predict one")
    return ids[:limit]


@torch.inference_mode()
def score_text(model: Any, ids: Tensor, progress: Progress | None = None) -> TextScore:
    """Return a causal language model's score on token ids (n,), in windows that do not overlap.

    Each token but a window's first is predicted once, from what stands before it in the window; float32 log softmax.
    """
    device = next(model.parameters()).device
    window = min(WINDOW_TOKENS, getattr(model.config, "max_position_embeddings", WINDOW_TOKENS) or WINDOW_TOKENS)
    nll, tokens, choices = 0.0, 0, []
    for number, part in enumerate(torch.split(ids, window)):
        if part.numel() < 2:  # a last token alone: nothing stands before it
            continue
        logits = model(part[None].to(device), use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, part[1:].to(device), reduction="none")
        nll += float(losses.double().sum())
        tokens += losses.numel()
        choices.append(logits.argmax(-1).cpu())
        if progress is not None:
            progress(number * window + part.numel(), ids.numel())
    if not torch.isfinite(torch.tensor(nll)):
        raise CheckpointError("the model's likelihood of this text is not finite: its weights or its kernel are wrong")
    return TextScore(nll, tokens, torch.cat(choices))


def compare(reference: TextScore, scheme: TextScore) -> dict[str, float | int]:
    """Return perplexity of the unquantized model and of the scheme, their ratio, and top-1 agreement (0 to 1)."""
    return {
        "tokens": scheme.tokens,
        "perplexity_reference": reference.perplexity,
        "perplexity_scheme": scheme.perplexity,
        "perplexity_ratio": scheme.perplexity / reference.perplexity,
        "top1_agreement": float((reference.choices == scheme.choices).double().mean()),
    }


def check_prompt(prompt: str) -> None:
    """Raise UsageError for a prompt that no tokenizer can read."""
    if not prompt.strip():
        raise UsageError("the prompt is empty; give the model at least one word")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text come as lone surrogates
        raise UsageError(f"the prompt is not UTF-8 from its character {error.start} on") from error


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float = 0.0, streamer: Any = None
) -> str:
    """Return what the model writes after the prompt; temperature 0 takes the likeliest token each time."""
    check_prompt(prompt)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(next(model.parameters()).device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    options = {"max_new_tokens": max_new_tokens, "return_dict_in_generate": False, "streamer": streamer, **sampling}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    try:
        output = model.generate(**inputs, pad_token_id=pad, **options)
    except (ValueError, TypeError, IndexError) as error:  # what transformers makes of values that it did not check
        raise CheckpointError(
            f"transformers cannot generate with the model's generation_config.json: {type(error).__name__}: {error}; "
            "correct the file, or remove it"
        ) from error
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text
