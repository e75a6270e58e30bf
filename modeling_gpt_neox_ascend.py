# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX for Hugging Face's `generate`. A copy of this file lies beside cut weights.

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

`auto_map` in the directory's config.json names the class. Without `trust_remote_code=True`
transformers silently takes its own class instead. The model's code is not here but in the package
`gptneox`, which must be importable.
"""

try:
    from gptneox.adapter import GPTNeoXForCausalLM as _Adapter
except ImportError as error:
    raise ImportError(
        "this checkpoint runs through the GPT-NeoX toolkit's package `gptneox`, which cannot be "
        f"imported ({error}); run `pip install .` in the toolkit's directory, or put that "
        "directory on PYTHONPATH"
    ) from error


class GPTNeoXForCausalLM(_Adapter):  # type: ignore[no-untyped-call]
    """The adapter, as a class of this file: transformers tells by its module whose it is."""
