# SPDX-License-Identifier: Apache-2.0
"""Translates `generation_kwargs` of lm-evaluation-harness to parameters of the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gptneox.config.errors import ConfigError
from gptneox.engine.sequence import MAX_STOP_STRINGS, SamplingParams

MAX_GEN_TOKS = 256  # default of a task, as in the Hugging Face backend
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SERVED: dict[str, Callable[[Any], Any]] = {
    "top_k": int, "top_p": float, "repetition_penalty": float, "seed": int,
}  # fmt: skip

# Options of transformers and vLLM, with the value that leaves the text as it is.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n", "best_of"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "min_tokens", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "diversity_penalty"), 0),
    **dict.fromkeys(("penalty_alpha", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), 1),
    **dict.fromkeys(("ignore_eos", "renormalize_logits", "remove_invalid_values"), False),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), True),
}
# Likewise when sampling. Without sampling these options have no effect at all.
_NEUTRAL_WHEN_SAMPLING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
# Options that never change the text, as long as there is one beam.
_WITHOUT_EFFECT = {
    *("use_cache", "cache_implementation", "pad_token_id", "length_penalty", "early_stopping"),
    *("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"),
    *("output_hidden_states", "low_memory"),
}


def read_options(options: Mapping[str, Any], num_context: int) -> tuple[SamplingParams, list[str]]:
    """Parameters of the engine, and all stop strings, for a task's generation_kwargs.

    Args:
        options: those of the task file or of --gen_kwargs. By default the likeliest token is
            chosen; `do_sample: false` overrides a temperature.
        num_context: tokens of the context, which `max_length` includes.

    Raises:
        ConfigError: an option that would change the text is not served.

    Source: lm_eval.models.utils.normalize_gen_kwargs, and the options of `generate`.
    """
    given = {name: value for name, value in options.items() if value not in (None, "", [], {})}
    until = given.pop("until", [])
    stop = [until] if isinstance(until, str) else [text for text in until if text]
    chosen: dict[str, Any] = {"max_new_tokens": _num_new(given, num_context)}
    temperature = float(given.pop("temperature", 0.0 if not given.get("do_sample") else 1.0))
    if not given.pop("do_sample", temperature > 0):
        temperature = 0.0
    for name, kind in _SERVED.items():
        if name in given:
            chosen[name] = kind(given.pop(name))
    if temperature == 0.0:  # without sampling these have no effect
        chosen.pop("top_k", None)
        chosen.pop("top_p", None)
    neutral = _NEUTRAL | (_NEUTRAL_WHEN_SAMPLING if temperature > 0 else {})
    ignored = _WITHOUT_EFFECT | (set() if temperature > 0 else set(_NEUTRAL_WHEN_SAMPLING))
    unknown = {
        name: value
        for name, value in given.items()
        if name not in ignored and not (name in neutral and neutral[name] == value)
    }
    if unknown:
        shown = ", ".join(f"{name}: {value}" for name, value in unknown.items())
        raise ConfigError(
            f"generation option {shown} is not served; leave it out, or override it with "
            "--gen_kwargs"
        )
    shown_stop = tuple(stop[:MAX_STOP_STRINGS])  # any further ones only cut the finished text
    return SamplingParams(temperature=temperature, stop=shown_stop, **chosen), stop


def _num_new(given: dict[str, Any], num_context: int) -> int:
    """Remove the options for the length from `given`; returns the number of new tokens."""
    lengths = [given.pop(name, None) for name in _LENGTH_NAMES]
    num_new = next((int(n) for n in lengths if n is not None), MAX_GEN_TOKS)
    total = given.pop("max_length", None)
    if total is None:
        return num_new
    if int(total) <= num_context:
        raise ConfigError(
            f"max_length {total} leaves no room after a context of {num_context} tokens; give "
            "max_gen_toks, which counts new tokens only"
        )
    return int(total) - num_context
