# SPDX-License-Identifier: Apache-2.0
"""The result of `--task performance`: its fields, its CSV and JSON forms, its table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptneox.evaluation.report import counted, csv_text, number, percentile, share, table

FORMAT = "gptneox performance 1"
# Column of the CSV -> key of a case in the JSON. The columns are those of the original toolkit.
COLUMNS = {
    "batch_size": "batch_size",
    "input_seq_len(Encoding)": "input_len",
    "output_seq_len(Decoding)": "output_len",
    "ResponseTime(s)": "response_s",
    "forward_first_token_time(ms)": "first_ms",
    "forward_next_token_time(ms)": "next_ms",
    "pre_next_token_time(ms)": "pre_ms",
    "post_next_token_time_post(ms)": "post_ms",
}


@dataclass(frozen=True)
class TokenTimes:
    """Times of one run, or their means over several; docs/performance.md defines each."""

    response_s: float
    first_ms: float = 0.0
    next_ms: float = 0.0
    pre_ms: float = 0.0
    post_ms: float = 0.0

    @property
    def step_ms(self) -> float:
        """A whole decode step."""
        return self.next_ms + self.pre_ms + self.post_ms


@dataclass(frozen=True)
class Rates:
    """Work per second of each phase, and its share of the device's limit; None: not timed.

    Tokens count on all ranks, bytes and operations on one.
    """

    prefill_tokens_per_s: float | None = None
    prefill_tflop_per_s: float | None = None
    prefill_share_of_matmul: float | None = None
    prefill_flop_per_byte: float | None = None
    decode_tokens_per_s: float | None = None
    decode_gb_per_s: float | None = None
    decode_share_of_bandwidth: float | None = None
    decode_tflop_per_s: float | None = None
    decode_flop_per_byte: float | None = None


@dataclass(frozen=True)
class Summary:
    """The distribution of a measured time."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float


def summarize(values: Seq[float]) -> Summary | None:
    """The distribution of `values`; None of no values."""
    if not values:
        return None
    percentiles = (percentile(values, percent) for percent in (50, 90, 99))
    return Summary(len(values), sum(values) / len(values), *percentiles)


@dataclass(frozen=True)
class CaseResult:
    """One pair of input and output length."""

    batch_size: int
    input_len: int
    output_len: int
    times: TokenTimes
    rates: Rates
    first_token_ms: Summary | None = None
    inter_token_ms: Summary | None = None
    parts_ms: Mapping[str, float] | None = None  # parts of the response time on rank 0

    def to_dict(self) -> dict[str, Any]:
        """All figures in one level, as the JSON has them."""
        values = asdict(self)
        times, rates = values.pop("times"), values.pop("rates")
        shape = {key: values.pop(key) for key in ("batch_size", "input_len", "output_len")}
        return {**shape, **times, **values, **rates}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaseResult:
        """Read `to_dict`.

        Raises:
            ValueError, TypeError: a figure is missing or is not a number.
        """
        names = [f.name for kind in (TokenTimes, Rates) for f in fields(kind)]
        _check_keys(values, (*COLUMNS.values(), *names), "a case")
        rates = {f.name: values[f.name] for f in fields(Rates)}
        first, later = (values.get(key) for key in ("first_token_ms", "inter_token_ms"))
        return cls(
            batch_size=int(values["batch_size"]),
            input_len=int(values["input_len"]),
            output_len=int(values["output_len"]),
            times=TokenTimes(*(float(values[f.name]) for f in fields(TokenTimes))),
            rates=Rates(**{name: None if x is None else float(x) for name, x in rates.items()}),
            first_token_ms=Summary(**first) if first else None,
            inter_token_ms=Summary(**later) if later else None,
            parts_ms=values.get("parts_ms"),
        )


@dataclass(frozen=True)
class PerformanceResult:
    """The cases of a run, with the provenance that is stored with every result."""

    date: str  # ISO 8601, in local time
    model_name: str
    model_path: str
    path: str  # "paged" | "flash"
    mode: str  # "normal" | "detail"
    batch_size: int
    repeat: int  # measured runs of each case
    detokenized: bool  # whether the response times contain detokenising
    device: str  # name of the hardware
    device_type: str  # as --device
    world_size: int
    threads: int | None  # of each rank, on a CPU
    dtype: str  # of the computation
    file_dtype: str  # of the checkpoint
    num_parameters: int
    measured_bandwidth_gb_per_s: float  # of one rank, while all ranks measure
    measured_matmul_tflop_per_s: float  # likewise
    versions: dict[str, str]
    notes: list[str]
    cases: list[CaseResult]

    @property
    def title(self) -> str:
        """Model, device, dtype, path and number of ranks in one line."""
        parts = [
            f"{self.model_name} on {self.device}",
            *([counted(self.threads, "thread")] if self.threads else []),
            self.dtype,
            f"{self.path} path",
            counted(self.world_size, "rank"),
            f"{self.mode} mode",
        ]
        return ", ".join(parts)

    def table(self) -> str:
        """The cases, one per line, below the title."""
        header = (
            *("batch", "in", "out", "response s", "first ms", "next ms", "pre ms", "post ms"),
            *("p99 ms", "prefill tok/s", "decode tok/s", "GB/s", "of bandwidth", "of matmul"),
        )
        rows = []
        for case in self.cases:
            times, rates = case.times, case.rates
            row = [str(n) for n in (case.batch_size, case.input_len, case.output_len)]
            row += [number(times.response_s, 3), number(times.first_ms), number(times.next_ms)]
            row += [number(times.pre_ms), number(times.post_ms)]
            row += [number(case.inter_token_ms.p99 if case.inter_token_ms else None)]
            row += [number(rates.prefill_tokens_per_s, 1), number(rates.decode_tokens_per_s, 1)]
            row += [number(rates.decode_gb_per_s, 1), share(rates.decode_share_of_bandwidth)]
            rows.append([*row, share(rates.prefill_share_of_matmul)])
        return f"{self.title}\n{table(header, rows)}"

    def to_csv(self) -> str:
        """The columns of the original toolkit."""
        rows = []
        for case in self.cases:
            values = case.to_dict()
            cells = {column: values[key] for column, key in COLUMNS.items()}
            rows.append({c: v if isinstance(v, int) else f"{v:.6f}" for c, v in cells.items()})
        return csv_text(list(COLUMNS), rows)

    def to_json(self) -> str:
        """Everything, for `from_json`."""
        values = {"format": FORMAT} | vars(self) | {"cases": [c.to_dict() for c in self.cases]}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PerformanceResult:
        """Read `to_json`; keys of later versions are ignored.

        Raises:
            ValueError, TypeError: `text` is something else.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise ValueError(f'"format" is not {FORMAT!r}')
        names = [f.name for f in fields(cls)]
        _check_keys(raw, names, "it")
        cases = [CaseResult.from_dict(case) for case in raw["cases"]]
        return cls(**{name: raw[name] for name in names} | {"cases": cases})


def _check_keys(values: Mapping[str, Any], names: Seq[str], what: str) -> None:
    if missing := set(names) - set(values):
        raise ValueError(f"{what} lacks {', '.join(sorted(missing))}")


def read_csv_cases(text: str) -> list[CaseResult]:
    """The cases of `PerformanceResult.to_csv`, without what the CSV does not hold.

    Raises:
        ValueError, TypeError: `text` is something else.
    """
    reader = csv.DictReader(io.StringIO(text))
    if reader.fieldnames is None or list(reader.fieldnames) != list(COLUMNS):
        raise ValueError("its header is another one")
    cases = []
    for row in reader:
        values = {key: float(row[column]) for column, key in COLUMNS.items()}
        batch_size, input_len, output_len = (int(values.pop(k)) for k in list(values)[:3])
        times = TokenTimes(**values)
        rate = batch_size / times.step_ms * 1e3 if times.step_ms > 0 else None
        rates = Rates(decode_tokens_per_s=rate)
        cases.append(CaseResult(batch_size, input_len, output_len, times, rates))
    return cases


def json_path(path: Path) -> Path:
    """The JSON next to a CSV file, whatever the CSV file is called."""
    is_csv = path.suffix.lower() == ".csv"
    return path.with_suffix(".json") if is_csv else path.with_name(f"{path.name}.json")
