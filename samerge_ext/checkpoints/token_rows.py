"""A model whose embeddings and output matrix have the rows of another vocabulary: its own rows and those of other models."""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samerge_ext.checkpoints.sources import Source

Row = tuple[int, int]  # the place of a model among all, and a row of its tensors


@dataclass(frozen=True)
class Run:
    """Rows ``begin`` … ``end`` of a tensor: as many rows of a model from ``rows``' on; of several the mean; none, zeros.

    of_tokens: the mean of the rows of all tokens.
    """

    begin: int
    end: int
    rows: tuple[Row, ...] = ()
    of_tokens: bool = False


class TokenRows(Source):
    """A source under another vocabulary.

    models: all that rows come from. tensors: name of a tensor with a row (or a number) for each token -> its name in each of the
    models. runs: its rows, in order and without gaps. is_token: [rows], which of them stand for a token.
    """

    def __init__(
        self,
        source: Source,
        models: Sequence[Source],
        tensors: Mapping[str, Sequence[str]],
        runs: Sequence[Run],
        is_token: Tensor,
    ):
        self.label, self.names, self.aliases, self.files = source.label, source.names, source.aliases, source.files
        self._source, self._models, self._tensors, self._runs, self._is_token = source, models, tensors, runs, is_token
        self._stored = frozenset(source.names)
        self._begins = [run.begin for run in runs]
        self._means: dict[str, Tensor] = {}
        self._used = sorted({model for run in runs for model, _ in run.rows})

    def is_buffer(self, name: str) -> bool:
        return self._source.is_buffer(name)

    def stored_name(self, name: str) -> str:
        return self._source.stored_name(name)

    def weight_dtype(self, name: str) -> torch.dtype:
        name = self.aliases.get(name, name)
        if name not in self._tensors:
            return self._source.weight_dtype(name)
        theirs = (self._models[i].weight_dtype(self._tensors[name][i]) for i in self._used)
        return functools.reduce(torch.promote_types, theirs, self._source.weight_dtype(name))

    def _shape(self, name: str) -> torch.Size:
        shape = self._source.shape(name)
        return torch.Size((len(self._is_token), *shape[1:])) if name in self._tensors else shape

    def _dtype(self, name: str) -> torch.dtype:
        if name not in self._tensors:
            return self._source.dtype(name)
        theirs = (self._models[i].dtype(self._tensors[name][i]) for i in self._used)
        return functools.reduce(torch.promote_types, theirs, self._source.dtype(name))

    def _read(self, name: str) -> Tensor:
        if name not in self._tensors:
            return self._source.read(name)
        out = torch.empty(self._shape(name), dtype=self._dtype(name))
        self._read_into(name, 0, out.view(-1))
        return out

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        if name not in self._tensors:
            self._source.read_into(name, start, out)
            return
        width, end = self._width(name), start + out.numel()
        for run in self._runs[bisect_right(self._begins, start // width) - 1 :]:
            first, last = max(start, run.begin * width), min(end, run.end * width)
            if first >= last:
                break
            self._read_run(name, run, first - run.begin * width, out[first - start : last - start])

    def _read_run(self, name: str, run: Run, skipped: int, out: Tensor) -> None:
        """Numbers ``skipped`` … of a run."""
        if run.of_tokens:
            mean = self._mean_of_tokens(name)
            out.copy_(mean.repeat((skipped + out.numel()) // len(mean) + 1)[skipped:][: out.numel()])
        elif len(run.rows) == 1:
            self._read_model(name, run.rows[0], skipped, out)
        else:
            total = torch.zeros(out.shape, dtype=torch.promote_types(out.dtype, torch.float32))
            for row in run.rows:
                numbers = torch.empty_like(out)
                self._read_model(name, row, skipped, numbers)
                total += numbers
            out.copy_(total / max(1, len(run.rows)))

    def _read_model(self, name: str, row: Row, skipped: int, out: Tensor) -> None:
        model, first = self._models[row[0]], row[1] * self._width(name)
        there = self._tensors[name][row[0]]
        numbers = out if model.dtype(there) == out.dtype else torch.empty(out.shape, dtype=model.dtype(there))
        model.read_into(there, first + skipped, numbers)
        if numbers is not out:
            out.copy_(numbers)

    def _mean_of_tokens(self, name: str) -> Tensor:  # [width]
        if name not in self._means:
            width = self._width(name)
            total = torch.zeros(width, dtype=torch.float64)
            for run in self._runs:
                for begin in range(run.begin, run.end if not run.of_tokens else run.begin, 4096):
                    rows = torch.empty(min(4096, run.end - begin), width, dtype=self._dtype(name))
                    self._read_run(name, run, (begin - run.begin) * width, rows.view(-1))
                    total += rows[self._is_token[begin : begin + len(rows)]].sum(0, dtype=torch.float64)
            self._means[name] = total / self._is_token.sum().clamp_min(1)
        return self._means[name]

    def _width(self, name: str) -> int:
        return self._source.shape(name)[1:].numel()
