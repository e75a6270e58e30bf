# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX with the interface of transformers, so that its `generate` runs our model.

The flash path wraps a loaded model (`around`). Other programs use `AutoModelForCausalLM`, which
finds the adapter through modeling_gpt_neox_ascend.py in the checkpoint directory.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, GPTNeoXConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import candidate_generator
from transformers.modeling_outputs import CausalLMOutputWithPast

from gptneox.config.environment import Environment
from gptneox.config.errors import FileError
from gptneox.config.files import read_json
from gptneox.devices import select
from gptneox.kv_cache import ContiguousKVCache
from gptneox.model import GPTNeoX
from gptneox.parallel import init_group
from gptneox.weights.load import find_part, load_model

_Adapter = TypeVar("_Adapter", bound="GPTNeoXForCausalLM")

# Options of AutoModel that have no effect on the result.
_IGNORED_KEYWORDS = {
    "adapter_kwargs",
    "attn_implementation",
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "proxies",
    "revision",
    "token",
    "trust_remote_code",
    "use_safetensors",
}


_CACHE_ARGUMENTS = inspect.signature(Cache.__init__).parameters
# What `generate` calls the cache: "cache" since transformers 5.24.
_INPUTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _INPUTS else "past_key_values"
# The `cache_implementation`s that ours is one of: it grows, and has every position of every layer.
# transformers 4.57 asks a model that assists for the second.
_GROWING = (None, "dynamic", "dynamic_full")


class NeoXCache(Cache):
    """`past_key_values` for `generate`, stored in a `ContiguousKVCache`."""

    is_compileable = False

    def __init__(self, kv: ContiguousKVCache) -> None:
        # transformers before 4.54 has no layers
        arguments: dict[str, Any] = {"layers": []} if "layers" in _CACHE_ARGUMENTS else {}
        super().__init__(**arguments)
        self.kv = kv

    @property
    def is_linear(self) -> list[bool]:
        """Whether layers keep a state in place of positions; transformers 5.24 asks."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cached positions, padding included."""
        return self.kv.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self.kv.select_rows(beam_idx.to(self.kv.ops.torch_device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = torch.arange(self.kv.batch_size).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last positions; the number is negative, as transformers 5 passes it.

        transformers 4 passes how many positions stay: a number above 0.
        """
        length = self.kv.length + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        self.kv.truncate(min(length, self.kv.length))

    def reset(self) -> None:
        """Remove all positions."""
        self.kv.truncate(0)


class GPTNeoXForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """`gptneox.model.GPTNeoX` with the interface of transformers."""

    config_class = GPTNeoXConfig
    base_model_prefix = "gpt_neox"
    _supports_sdpa = True
    _supports_cache_class = True  # transformers before 4.54 asks
    _keys_to_ignore_on_load_missing = None

    def __init__(self, config: GPTNeoXConfig, model: GPTNeoX) -> None:
        """Use `around` or `from_pretrained` instead."""
        super().__init__(config)
        self._model = (model,)  # a tuple hides it from nn.Module: children get HF's names below
        self.gpt_neox, self.embed_out = model.gpt_neox, model.embed_out
        self.starts: list[float] | None = None  # if a list, each step of `generate` appends a time

    @classmethod
    def around(cls: type[_Adapter], model: GPTNeoX) -> _Adapter:
        """Wrap a model that has its weights; nothing is loaded or copied."""
        config = model.config
        adapter = cls(
            GPTNeoXConfig(  # only the keys that `generate` reads
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                max_position_embeddings=model.num_positions,
            ),
            model,
        )
        adapter.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        return adapter.eval()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls: type[_Adapter],
        pretrained_model_name_or_path: str,
        *model_args: Any,
        config: GPTNeoXConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: str | None = None,
        generation_config: GenerationConfig | None = None,
        max_position_embeddings: int = 0,
        kv_cache_dtype: str = "auto",
        **kwargs: Any,
    ) -> _Adapter:
        """Load a checkpoint directory, or this rank's part of one.

        Args:
            pretrained_model_name_or_path: a directory. Under torchrun, a whole checkpoint is
                sliced while it is read; a cut part must have this world size.
            model_args: must be empty.
            config: by default read from the directory.
            dtype: a dtype, or "auto" (default) for the one in config.json.
            torch_dtype: older name of `dtype`.
            device_map: "auto" or a device name; each process uses one device.
            generation_config: by default read from the directory.
            max_position_embeddings: positions of prompt and answer; 0 for config.json's value.
            kv_cache_dtype: "int8" for a cache of keys and values in int8.
            kwargs: Hugging Face's hub options are ignored; others are refused.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: see `gptneox.weights.load.load_model`.
        """
        if unknown := sorted(k for k in kwargs if k not in _IGNORED_KEYWORDS and k[0] != "_"):
            raise ValueError(f"from_pretrained does not take {', '.join(unknown)}")
        if model_args:
            raise ValueError(f"from_pretrained takes no positional arguments, got {model_args}")
        environment = Environment.read()
        path = Path(pretrained_model_name_or_path)
        config = config or _read_config(path)
        device = select(device_map or "auto")
        if environment.world_size > 1:
            device.setup(
                environment.local_rank, environment.local_world_size, environment.omp_num_threads
            )
        group = init_group(environment.rank, environment.world_size, device.dist_backend)
        path, model_config = find_part(path, group)
        generation_config = generation_config or _read_generation_config(path)
        model = GPTNeoX(model_config, device, group, max_position_embeddings)
        adapter = cls(config, model)
        name = str(dtype or torch_dtype or "auto").removeprefix("torch.")
        compute_dtype, notice = device.resolve_dtype(model_config.dtype, name)
        if notice:
            from transformers.utils import logging

            logging.get_logger(__name__).warning(notice)
        load_model(model, path, compute_dtype, kv_cache_dtype=kv_cache_dtype, show_progress=True)
        adapter.generation_config = generation_config
        return adapter.eval()  # type: ignore[no-untyped-call]

    @property
    def model(self) -> GPTNeoX:
        """The wrapped model."""
        return self._model[0]

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.gpt_neox.embed_in

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: the weights are packed for the device. Copy the checkpoint instead."""
        raise NotImplementedError("the loaded weights are packed; copy the checkpoint directory")

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *others: Any,
        **_: Any,
    ) -> None:
        """Give `generate` our cache, unless it has one or does not use any.

        Of `others` the first is the model or the generator that assists.
        """
        cache = model_kwargs.get(CACHE)
        _check_cache(cache)
        if generation_config.cache_implementation not in _GROWING:
            raise ValueError(
                f"cache_implementation {generation_config.cache_implementation!r} is not served; "
                "leave it out"
            )
        is_assisted = generation_config.prompt_lookup_num_tokens or (others and others[0])
        if is_assisted and hasattr(candidate_generator, "_crop_past_key_values"):
            raise ValueError(
                f"transformers {transformers.__version__} serves assisted generation with its own "
                "caches alone; leave it out, or type: pip install 'transformers>=4.57,<6'"
            )
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Inputs of `forward`, without what else `generate` passes.

        That is the tokenizers for stop strings, and transformers 4's `cache_position`: the cache
        knows its length.
        """
        if self.starts is not None:
            self.starts.append(time.perf_counter())
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        foreign = ("tokenizer", "assistant_tokenizer", "cache_position")
        return {k: v for k, v in inputs.items() if k not in foreign}

    def new_cache(self) -> NeoXCache:
        """An empty cache for one batch."""
        model = self.model
        config = model.config
        return NeoXCache(
            ContiguousKVCache(
                model.ops,
                config.num_layers,
                config.num_heads // model.group.world_size,
                config.head_dim,
                model.size.kv_format,
                model.num_positions,
            )
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NeoXCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: NeoXCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a padded batch.

        Args:
            input_ids: [B, S].
            attention_mask: [B, cached + S], 0 at padding; rows may be padded on either side.
            position_ids: [B, S]; by default the index among the unpadded tokens of the row.
            past_key_values: the cache that an earlier call returned.
            use_cache: False to return no cache.
            labels: [B, S]; adds `loss`.
            logits_to_keep: return the last n positions only (0: all), or a tensor of positions.
            cache: transformers 5.24's name of `past_key_values`.
            kwargs: must be None or False (hidden states and attentions are not kept), return_dict
                must not be False.

        Returns:
            logits [B, kept, V] and past_key_values, or cache.
        """
        return_dict = kwargs.pop("return_dict", None)
        if wrong := sorted(k for k, v in kwargs.items() if v is not None and v is not False):
            raise ValueError(f"forward does not take {', '.join(wrong)}")
        if input_ids is None or input_ids.dim() != 2 or return_dict is False:
            raise ValueError("input_ids [B, S] is expected, and return_dict not False")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing; pass one")
        cache = past_key_values if cache is None else cache
        _check_cache(cache)
        b, s = input_ids.shape
        cache = self.new_cache() if cache is None else cache
        key_mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            key_mask = attention_mask.bool()
            if key_mask.shape != (b, cache.kv.length + s):
                raise ValueError(
                    f"attention_mask has shape {list(key_mask.shape)}; "
                    f"[{b}, {cache.kv.length + s}] is expected: cached positions and new ones"
                )
        if position_ids is None:
            position_ids = self._positions(key_mask, b, s, cache.kv.length)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        with torch.inference_mode():
            positions = position_ids.expand(b, s)
            step = cache.kv.begin(input_ids, positions, key_mask, self.model.rotary)
            hidden = self.model(step)
            cache.kv.advance(s)
            hidden = hidden.view(b, s, -1)[:, keep]
            logits = self.model.compute_logits(hidden.flatten(0, 1)).view(b, hidden.shape[1], -1)
        # In the weights' dtype. Copied outside inference mode, because the logits processors of
        # `generate` change it in place.
        logits = logits.to(self.gpt_neox.embed_in.weight.dtype, copy=True)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1])
        past = None if use_cache is False else cache
        named: dict[str, Any] = {CACHE: past}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **named)

    def _positions(self, key_mask: Tensor | None, b: int, s: int, length: int) -> Tensor:
        """Index of each token among the unpadded tokens of its row, [B, S]."""
        if key_mask is None:
            device = self.model.device.torch_device
            return torch.arange(length, length + s, device=device).expand(b, s)
        return (key_mask.long().cumsum(-1) - 1).clamp(min=0)[:, length:]


def _read_config(path: Path) -> GPTNeoXConfig:
    """config.json as transformers reads it."""
    raw = read_json(path / "config.json")
    try:
        return GPTNeoXConfig.from_dict(raw)
    except Exception as error:  # its checks raise many types
        text = " ".join(str(error).split())
        raise FileError(f"{path / 'config.json'}: transformers refuses it: {text}") from error


def _read_generation_config(path: Path) -> GenerationConfig:
    """generation_config.json, or the same keys of an older config.json."""
    file = path / "generation_config.json"
    if not file.is_file():
        raw = read_json(path / "config.json")
        if transformers.__version__.startswith("4."):  # it takes the object alone
            return GenerationConfig.from_model_config(_read_config(path))
        return GenerationConfig.from_model_config(raw)
    read_json(file)  # its errors name the file
    try:
        return GenerationConfig.from_pretrained(path)
    except (ValueError, TypeError) as error:
        raise FileError(f"{file}: transformers refuses it: {error}") from error


def _check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, NeoXCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; leave it out, or pass the one that an "
            "earlier call returned"
        )
