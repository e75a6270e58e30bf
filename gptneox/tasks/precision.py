# SPDX-License-Identifier: Apache-2.0
"""`--task precision`: accuracy on BoolQ, MMLU or C-Eval, resumable at any question."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gptneox.cli import Settings
from gptneox.cluster.plan import need_ray
from gptneox.config.errors import ConfigError
from gptneox.config.model import ModelConfig
from gptneox.config.settings import PrecisionSection
from gptneox.engine.api import Engine
from gptneox.engine.detokenizer import load_tokenizer
from gptneox.evaluation.datasets import SHIPPED_SETS, Dataset, read_boolq, read_ceval, read_mmlu
from gptneox.evaluation.fingerprint import content_hash, model_files
from gptneox.evaluation.precision_results import ResultFolder
from gptneox.evaluation.scoring import QuestionFailed, Result, evaluate
from gptneox.session import load_engine, refuse_float, start
from gptneox.weights.formats import scheme_of
from gptneox.weights.load import check_weights, find_part

logger = logging.getLogger(__name__)

# Flags of --task inference that would have to change an accuracy, or do nothing here.
_REFUSED_FLAGS = (
    "input_texts", "input_ids", "interactive", "stream", "output_file", "ignore_eos", "temperature",
    "top_k", "top_p", "repetition_penalty", "seed", "stop", "stop_token_ids", "max_output_length",
)  # fmt: skip


def run(settings: Settings) -> None:
    """Answer the configured questions and write the results into test_result/.

    Raises:
        ValueError, OSError, RuntimeError: with a message for the user.
    """
    for name in _REFUSED_FLAGS:
        if settings.given.get(name):
            raise ConfigError(f"--{name} does not go with --task precision; see [precision]")
    section = settings.precision
    dataset = read_dataset(section)
    if settings.args.ray:
        _run_in_cluster(settings, dataset)
        return
    device, group = start(settings)
    is_flash = settings.attention == "flash"
    path, config = find_part(settings.model_path, group, prefer_parts=is_flash)
    limit = prompt_limit(dataset, config.positions(settings.engine.max_position_embeddings))
    dtype, _ = device.resolve_dtype(config.dtype, settings.model.dtype)
    formats = check_weights(path, config, group.world_size)
    refuse_float(settings, formats)
    labels = [str(dtype).removeprefix("torch."), scheme_of(formats)]
    protocol = describe_protocol(settings, dataset, limit, "_".join(filter(None, labels)))
    results: ResultFolder | None = None
    num_done = 0
    if group.rank == 0:
        fingerprint = make_fingerprint(protocol, dataset, path)
        results = ResultFolder(result_folder(section), dataset, protocol, fingerprint)
        num_done = results.resume(section.batch)
        results.log_settings({**asdict(section), "device": device.describe()})
    num_done = group.broadcast_object(num_done)
    tokenizer: Any = None
    try:
        if num_done < len(dataset.questions):
            batch = replace(settings.engine, max_batch_size=section.batch)
            engine = load_engine(settings, device, group, batch)
            tokenizer = engine.tokenizer
            ask(dataset, engine, section.batch, num_done, results)
        if results:
            _finish(results, tokenizer, path, config, limit)
    finally:
        if results:
            results.close()


def _finish(
    results: ResultFolder, tokenizer: Any, path: Path, config: ModelConfig, limit: int
) -> None:
    """Write the accuracies. A resumed run has not seen every question, so it counts them here."""
    unanswered = results.unanswered()
    if unanswered and tokenizer is None:
        tokenizer = load_tokenizer(path, config.vocab_size)
    results.finish(sum(q.fit(tokenizer, limit) is None for q in unanswered))


def _run_in_cluster(settings: Settings, dataset: Dataset) -> None:
    """The same questions in the same batches, each computed by one of several replicas."""
    need_ray()
    from gptneox.cluster.offline import ModelPlace, ask, first_rank, spread

    section = settings.precision
    path, config = find_part(settings.model_path, first_rank(settings.args.tp))
    limit = prompt_limit(dataset, config.positions(settings.engine.max_position_embeddings))
    formats = check_weights(path, config)
    refuse_float(settings, formats)
    place = ModelPlace.of(settings, config)
    labels = [place.dtype, scheme_of(formats)]
    protocol = describe_protocol(settings, dataset, limit, "_".join(filter(None, labels)))
    fingerprint = make_fingerprint(protocol, dataset, path)
    results = ResultFolder(result_folder(section), dataset, protocol, fingerprint)
    try:
        num_done = results.resume(section.batch)
        results.log_settings({**asdict(section), "ray": settings.args.ray})
        size = section.batch
        engine = replace(settings.engine, max_batch_size=size)
        pieces = [
            (i, dataset.questions[i : i + size])
            for i in range(num_done, len(dataset.questions), size)
        ]
        compute = partial(ask, scorer=dataset.scorer, max_tokens=dataset.max_prompt_tokens)
        waiting: dict[int, list[Result]] = {}
        total = len(dataset.questions)
        with tqdm(total=total, initial=num_done, desc=dataset.name, unit="q") as bar:
            settings = replace(settings, engine=engine)
            for key, answers in spread(settings, place, compute, pieces):
                waiting[key] = answers
                bar.update(len(answers))
                while batch := waiting.pop(results.num_done, None):  # the file keeps their order
                    results.add(batch)
        _finish(results, None, path, config, limit)
    except RuntimeError as error:
        kept = f"{results.num_done} answers are kept in {results.cache_path}"
        raise RuntimeError(f"{error}; {kept}; run again to go on there") from error
    finally:
        results.close()


# -- questions -------------------------------------------------------------------------------------


def read_dataset(section: PrecisionSection) -> Dataset:
    """Read the questions of [precision]: those below work_dir/data, or the shipped ones.

    Raises:
        FileNotFoundError: there are none.
        ConfigError: a file is malformed, or nothing is shipped for the mode.
    """
    folder = data_folder(section)
    if section.mode == "boolq":
        logger.info("boolq compares two tokens without examples: shot and scoring do not apply")
        return read_boolq(folder)
    read = read_mmlu if section.mode == "mmlu" else read_ceval
    return read(
        folder,
        shots=section.shot,
        scoring=section.scoring,
        num_new_tokens=section.seq_len_out,
    )


def data_folder(section: PrecisionSection) -> Path:
    """work_dir/data/{mode}, or for mmlu and ceval work_dir/data itself; see `read_dataset`."""
    mode = section.mode
    if section.work_dir:
        data = Path(section.work_dir).expanduser() / "data"
        return data / mode if mode == "boolq" or (data / mode).is_dir() else data
    if mode == "ceval":
        raise ConfigError(
            "no C-Eval questions are shipped (the models read English); set [precision] work_dir "
            "to a folder with data/dev and data/val"
        )
    folder = SHIPPED_SETS / mode
    logger.info("[precision] work_dir is empty: the questions shipped in %s are asked", folder)
    return folder


def result_folder(section: PrecisionSection) -> Path:
    """work_dir/test_result; without a work_dir that of the current directory."""
    return Path(section.work_dir or ".").expanduser() / "test_result"


def prompt_limit(dataset: Dataset, max_positions: int) -> int:
    """The longest prompt, in tokens, that is asked."""
    limit = max_positions - dataset.scorer.num_new_tokens
    return limit if dataset.max_prompt_tokens is None else min(limit, dataset.max_prompt_tokens)


def describe_protocol(
    settings: Settings, dataset: Dataset, max_prompt_tokens: int, dtype: str
) -> dict[str, Any]:
    """How the questions are asked, as every result file states it."""
    return {
        "mode": dataset.name,
        "shot": dataset.num_examples,
        "scoring": dataset.scorer.name,
        "seq_len_out": dataset.scorer.num_new_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "questions": len(dataset.questions),
        "data": str(dataset.files[0].parent),
        "dtype": dtype,
        "attention": settings.attention,
        "model_path": str(settings.model_path),
    }


def make_fingerprint(
    protocol: dict[str, Any], dataset: Dataset, checkpoint: Path
) -> dict[str, Any]:
    """What must be equal before cached answers are used in this run.

    Args:
        protocol: see `describe_protocol`; paths do not count, the content of files does.
        dataset: the questions.
        checkpoint: the directory of the model, or of rank 0 in a cut one.
    """
    files = model_files(checkpoint)
    if (checkpoint.parent / "manifest.json").is_file():  # a cut model: the other ranks' parts, too
        ranks = sorted(p for p in checkpoint.parent.iterdir() if p.is_dir() and p != checkpoint)
        files += [file for rank in ranks for file in model_files(rank)]
    compared = {k: v for k, v in protocol.items() if k not in ("data", "model_path", "questions")}
    return {"model": content_hash(files), "data": dataset.content_hash(), **compared}


def ask(
    dataset: Dataset, engine: Engine, batch_size: int, num_done: int, results: ResultFolder | None
) -> None:
    """Ask the remaining questions; rank 0 writes each batch before the next one is computed.

    Raises:
        RuntimeError: a batch failed; everything before it is kept.
    """
    hide = None if results else True  # None: hidden unless stderr is a terminal
    with tqdm(
        total=len(dataset.questions), initial=num_done, desc=dataset.name, unit="q", disable=hide
    ) as bar:

        def on_result(batch: list[Result]) -> None:
            assert results, "results are delivered on rank 0 only"
            results.add(batch)
            bar.update(len(batch))

        try:
            evaluate(
                dataset.questions[num_done:],
                dataset.scorer,
                engine,
                batch_size,
                on_result,
                max_prompt_tokens=dataset.max_prompt_tokens,
            )
        except QuestionFailed as error:
            kept = ""
            if results:
                kept = f"; {results.num_done} answers are kept in {results.cache_path}"
            raise RuntimeError(f"{error}{kept}; run again to go on there") from error
