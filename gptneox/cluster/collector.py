# SPDX-License-Identifier: Apache-2.0
"""A finished completion from what rank 0 sends of a request, step by step."""

from __future__ import annotations

from collections.abc import Callable

from gptneox.engine.api import Completion
from gptneox.server.service import Delta
from gptneox.server.wire import Output


class Collector:
    """The outputs of a request, until they are a finished completion."""

    def __init__(self, on_finished: Callable[[Completion], None]) -> None:
        self._on_finished, self._whole = on_finished, Delta(0)

    def take(self, output: Output) -> None:
        """Add a step's output."""
        self._whole.add(Delta.of(0, output))
        if output.finish_reason:
            self._on_finished(completion_of(self._whole, output.error))


def completion_of(whole: Delta, error: str) -> Completion:
    """The finished completion of a request."""
    ended_by = [] if whole.end_id is None else [whole.end_id]
    token_ids = [*whole.token_ids, *whole.cut_ids, *ended_by]
    end_logprob = [whole.end_logprob] if whole.end_logprob else []
    return Completion(
        0,
        new_text=whole.text,
        new_token_ids=token_ids,
        finish_reason=whole.finish_reason,
        stop_reason=whole.stop_reason,
        error=error,
        text=whole.text,
        token_ids=token_ids,
        logprobs=[*whole.logprobs, *whole.cut_logprobs, *end_logprob],
        prompt_logprobs=whole.prompt_logprobs,
    )
