# SPDX-License-Identifier: Apache-2.0
"""The model class `gptneox` of lm-evaluation-harness, over the paged engine.

`python -m gptneox.evaluation.lm_eval_model` has the command line of `lm_eval` and registers this
class first; lm_eval 0.4 has no hook for registering models of other packages. In Python, importing
this module registers the class.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from gptneox import interpreter

if __name__ == "__main__":
    interpreter.require(["-m", "gptneox.evaluation.lm_eval_model", *sys.argv[1:]])
    if find_spec("lm_eval") is None:
        sys.exit(
            f"lm_eval is missing; type: {sys.executable} -m pip install 'lm_eval>=0.4.13,<0.5'"
        )

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gptneox.cli import read_settings
from gptneox.config.environment import Environment
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import EMBEDDED_CHECKPOINT
from gptneox.engine.api import Completion, raise_failure
from gptneox.engine.loop import EngineLoop
from gptneox.engine.paged import PagedEngine
from gptneox.engine.sequence import SamplingParams
from gptneox.evaluation.lm_eval_options import MAX_GEN_TOKS, read_options
from gptneox.hub import find_checkpoint
from gptneox.session import load_engine, start

AUTO_BATCH_SIZE = 16

# A request of `_loglikelihood_tokens`: texts (the cache key), context ids, continuation ids.
TokenRequest = tuple[Any, list[int], list[int]]


@register_model("gptneox")
class GPTNeoXLM(TemplateLM):  # type: ignore[misc]  # lm_eval is optional and has no types
    """Scores and generates as the Hugging Face backend does; the softmax is always fp32.

    Under torchrun the ranks share one model; ranks above 0 follow rank 0 and exit with it.
    """

    _rank, _world_size = 0, 1  # lm_eval's data parallelism is not used

    def __init__(
        self,
        pretrained: str = "",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        **engine: Any,
    ) -> None:
        """Load a checkpoint.

        Args:
            pretrained: checkpoint directory, or OWNER/NAME on a hub; empty: the embedded one.
            dtype: auto, float16, bfloat16 or float32.
            device: as [model] device; a suffix such as ":0" is ignored. None for auto.
            batch_size: maximum number of requests in a batch, or "auto".
            max_batch_size: upper limit for "auto".
            max_length: tokens of context and continuation together; None for config.json's value.
            add_bos_token: None for the tokenizer's default.
            engine: more keys of [engine], such as block_size and memory_fraction.

        Raises:
            ValueError, OSError, RuntimeError: with a message for the user.
        """
        super().__init__()
        if str(batch_size).startswith("auto"):
            batch_size = min(AUTO_BATCH_SIZE, max_batch_size or AUTO_BATCH_SIZE)
        path = EMBEDDED_CHECKPOINT
        if pretrained:
            from_modelscope = Environment.read().use_modelscope
            path = find_checkpoint(pretrained, from_modelscope=from_modelscope)
        config = ModelConfig.from_pretrained(path)
        # With dynamic rope, `max_position_embeddings` below cannot exceed config.json's value.
        default_length = config.max_position_embeddings - config.rope_is_dynamic
        self._max_length = max_length or default_length
        options = {
            "model_path": path,
            "dtype": dtype,
            "device": (device or "auto").split(":")[0],
            "attention": "paged",
            "max_batch_size": batch_size,
            # max_length + 1 tokens can be scored, because the last one is only predicted.
            "max_position_embeddings": self._max_length + 1,
            **engine,
        }
        argv = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        try:
            settings = read_settings(argv, Path())
        except SystemExit as error:
            raise ConfigError(f"--model_args: {', '.join(engine)} are not all known") from error
        chosen_device, self._group = start(settings)
        paged = load_engine(settings, chosen_device, self._group)
        assert isinstance(paged, PagedEngine)
        self._engine, self._loop = paged, EngineLoop(paged)
        self.tokenizer = paged.tokenizer
        self._batch_size, self._device = int(batch_size), chosen_device.torch_device
        self._add_bos_token = add_bos_token
        if self._group.rank > 0:
            self._loop.follow()
            sys.exit(0)
        # The other ranks wait while lm_eval reads data or computes its metrics.
        waiting = contextlib.ExitStack()
        waiting.enter_context(self._loop.idle())
        waiting.callback(self._loop.stop)
        atexit.register(waiting.close)

    def _run(
        self, work: list[tuple[list[int], SamplingParams]], what: str, hide: bool
    ) -> list[Completion]:
        """The completions of all requests in order, with a progress bar."""
        outputs: list[Completion] = []
        # Several batches per call keep the engine full between updates of the bar.
        chunk_size = 8 * self._batch_size
        remaining = iter(work)
        with tqdm(total=len(work), desc=what, disable=hide) as bar:
            while chunk := list(islice(remaining, chunk_size)):
                outputs += self._loop.generate([c[0] for c in chunk], [c[1] for c in chunk])
                raise_failure(outputs[-len(chunk) :])
                bar.update(len(chunk))
        return outputs

    # -- what lm_eval asks about the model -------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The end-of-text id."""
        eos_token_id = self.tokenizer.eos_token_id
        ids = self._engine.eos_token_ids if eos_token_id is None else (eos_token_id,)
        if not ids:
            raise ConfigError("neither the tokenizer nor config.json names an end-of-text token")
        return int(ids[0])

    @property
    def prefix_token_id(self) -> int:
        """The id used as the context of a text without one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Default number of new tokens."""
        return MAX_GEN_TOKS

    @property
    def batch_size(self) -> int:
        """Maximum number of requests in a batch."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """Part of lm_eval's cache keys."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; `add_bos_token` is the default for special tokens; a BOS is never doubled."""
        if add_special_tokens is None:
            add_special_tokens = self._add_bos_token
            if string.startswith(self.tokenizer.decode([self.prefix_token_id])):
                add_special_tokens = False
        if add_special_tokens is None:
            return list(self.tokenizer.encode(string))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    # -- what lm_eval asks of the model ----------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it) per request.

        Pairs that are too long are truncated on the left. Requests that differ only in the last
        token, such as the letters of a multiple-choice question, share one forward pass.
        """
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens; 1 to {self.max_length} "
                    "can be scored"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            groups.setdefault((tuple(tokens[:-1]), len(continuation)), []).append(i)
        # Longest first, so that an error of memory comes early; sorted, to share prefixes.
        keys = sorted(groups, key=lambda key: (-len(key[0]), key))
        work = []
        for prefix, num_scored in keys:
            last_ids = tuple(sorted({requests[i][2][-1] for i in groups[prefix, num_scored]}))
            params = SamplingParams(
                max_new_tokens=1,
                ignore_eos=True,
                obey_rules=False,
                logprobs=0,
                logprob_token_ids=last_ids,
                prompt_logprobs=1 if num_scored > 1 else None,
                prompt_logprobs_start=max(1, len(prefix) - num_scored + 1),
            )
            work.append((list(prefix), params))
        outputs = self._run(work, "log-likelihoods", disable_tqdm)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for key, output in zip(keys, outputs, strict=True):
            prompt_logprobs = output.prompt_logprobs
            total = sum(token.logprob for token in prompt_logprobs)
            prompt_is_greedy = all(token.token_id in token.top for token in prompt_logprobs)
            for i in groups[key]:
                last_id = requests[i][2][-1]
                is_greedy = prompt_is_greedy and output.token_ids[0] == last_id
                results[i] = (total + output.logprobs[0].top[last_id], is_greedy)
                request_args = requests[i][0]
                if request_args is not None:
                    self.cache_hook.add_partial("loglikelihood", request_args, results[i])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in windows of `max_length`; each token is scored once."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(part)) for part in parts]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = [sum(score for score, _ in islice(scores, count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut before the first stop string."""
        work, stops = [], []
        for request in requests:
            context, options = request.args
            # The model needs at least one token.
            token_ids = self.tok_encode(context) or [self.prefix_token_id]
            params, stop = read_options(options, len(token_ids))
            room = self.max_length - params.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {params.max_new_tokens}; fewer than the model's "
                    f"{self.max_length} positions are expected (--gen_kwargs max_gen_toks=N "
                    "overrides the task)"
                )
            work.append((token_ids[-room:], params))
            stops.append(stop)
        outputs = self._run(work, "texts", disable_tqdm)
        texts = []
        for request, output, stop in zip(requests, outputs, stops, strict=True):
            text = postprocess_generated_text(output.text, stop, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts


def main() -> None:
    """The command line of lm_eval, with `--model gptneox` as its default."""
    from lm_eval.__main__ import cli_evaluate

    arguments: Seq[str] = sys.argv[1:]
    named = any(text.split("=")[0] in ("--model", "-m") for text in arguments)
    runs = not arguments or arguments[0] in ("run",) or arguments[0].startswith("-")
    if runs and not named and not {"-h", "--help"} & set(arguments):
        sys.argv += ["--model", "gptneox"]
    cli_evaluate()


if __name__ == "__main__":
    main()
