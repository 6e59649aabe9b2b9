"""What a merge from file to file writes, as headers alone tell it: which tensors, in which types, under which names."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from samerge_ext.checkpoints.alignment import Aligned, NamingNote
from samerge_ext.checkpoints.companions import Companions, with_dtype
from samerge_ext.checkpoints.lora import model_of
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.shards import Shard, plan_shards
from samerge_ext.checkpoints.sources import Source
from samerge_ext.checkpoints.stacked import Stack
from samerge_ext.checkpoints.tokenizers import MergedTokenizer, TokenizerConfig
from samerge_ext.elementwise.file_pieces import Extent, FilePieces
from samerge_ext.elementwise.piecewise import Combination, Rule
from samerge_ext.elementwise.sparsified import Sparsified
from samerge_ext.packing.validation import check_headers, check_heads, check_ties, shared_names
from samerge_ext.reports.inputs import described
from samerge_ext.reports.report import Report

GPU_WORKERS = 8  # that read from the page cache at 5 to 10 GB/s each, by estimate: as much as PCIe takes


@dataclass
class FileMerge:
    """What is merged from files.

    base: its folder; None where the experts themselves are combined, not their differences from it.
    experts: tasks and folders of models, of adapters of ``names_from``, or "MODEL+ADAPTER".
    heads: patterns of tensors that are kept per task. keep: of those that not all models have, and that stay as they are; where
        they are an expert's, names, configuration and companions are that expert's.
    rule_of: name, shape and dtype of a tensor -> its rule; with ``whole``, called once for all tensors as one vector, for a
        `WholeRule`.
    names_from: the folder that says which tensors there are. companions: what goes along, and of keep an expert's tokenizer too
        unless one is asked for; all of that folder's by default.
    stacks: where layers of models are merged, not whole ones: the base, where there is one, and what is merged, each as a `Stack`
        of models among the base and the experts.
    factors_of: the squares of the task vectors' norms and the tasks -> a factor for every task vector, before any rule
        (`methods.distac.shortening`).
    device: where tensors are merged, "cpu" or a GPU as torch names it; on a GPU numbers may be rounded otherwise.
    tokenizer: whose the merged model has, where that is asked for; `merged_vocabulary`.
    dtype: what tensors are read as; by default what the models' own types promote to, and at least fp32 where there are
        adapters. out_dtype: what is written; by default ``dtype``, or what the full models' types promote to.
    identity: says, as JSON, what the rules are made from.
    about: what the model card and the report say of it beyond what the merge itself finds; None for neither. with_page: whether
        report.html and report.json are written beside the card. card: the model card, in place of the report's.
    """

    experts: list[tuple[str, Path]]
    rule_of: Callable[[str, torch.Size, torch.dtype], Rule]
    names_from: Path
    base: Path | None = None
    heads: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    whole: bool = False
    stacks: tuple[Stack | None, Sequence[Stack]] | None = None
    factors_of: Callable[[Sequence[float], Sequence[str]], list[float]] | None = None
    device: str = "cpu"
    dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    tokenizer: TokenizerConfig | None = None
    companions: Companions | None = None
    identity: dict = field(default_factory=dict)
    about: Report | None = None
    with_page: bool = True
    card: str | None = None
    shard_bytes: int = 5_000_000_000


class FilePlan:
    """The tensors of a merge, and by which rule each is merged. Raises ValueError for models that do not fit together.

    names: the model that says which tensors there are. experts: tasks and models. base: None where there is none.
    heads: names of the tensors that are kept per task. layers: of those that are merged, in the order of the model.
    buffers: of those that are written but not merged. kept: of those that stay as they are, and the model each is of.
    rules: by tensor, or for "" as one vector. called: what a tensor is called where it is written. shards: what is written.
    """

    def __init__(self, merge: FileMerge, models: Aligned, tokenizer: MergedTokenizer | None = None):
        self._merge, names, experts = merge, models.base, models.experts
        check_headers(names, experts, models.heads, torch.float32, torch.float32)
        for _, expert in experts:
            check_ties(names, expert)
        check_heads(experts, models.heads)
        self.names, self.experts, self.heads, self.kept = names, experts, models.heads, models.kept
        self.base = names if merge.base is not None else None
        self.companions = merge.companions or Companions(folder_of(merge.names_from))
        host = names  # whose configuration the merged model has
        if models.host is not None:
            host = dict(experts)[models.host]
            text = "the names of its tensors, config.json, tokenizer and all else are those of this model, not the base's"
            warnings.warn(f"{host.label}: tensors of it are kept; in the merged model {text}", NamingNote, stacklevel=4)
            self.companions = replace(self.companions, folder=folder_of(model_of(dict(merge.experts)[models.host])))
        if tokenizer is not None:
            self.companions = replace(self.companions, tokenizer=tokenizer)
        self.companions.check()
        shared = shared_names(names, models.heads)
        self.buffers = {name for name in shared if names.is_buffer(name)} | self.kept.keys()
        self.layers = [name for name in shared if name not in self.buffers]
        sources = [source for _, source in experts] + ([self.base] if self.base else [])
        computed = any(source.dtype(name) != source.weight_dtype(name) for source in sources for name in self.layers)
        wide = [torch.float32] if computed else []  # where there are adapters
        self._dtypes = {
            name: merge.dtype or _promoted([*wide, *(source.dtype(name) for source in sources)]) for name in self.layers
        }
        self._written = {
            name: merge.out_dtype or merge.dtype or _promoted(source.weight_dtype(name) for source in sources)
            for name in self.layers
        }
        self.rules = self._rules_of(merge.rule_of)
        shared += [name for name in self.kept if name not in names]
        self.called = {name: host.stored_name(name) if name in host else name for name in shared}
        written = [(self.called[name], self.written_dtype(name), self.whose(name).shape(name)) for name in shared]
        self.shards = plan_shards(written, merge.shard_bytes)

    def pieces(self, device: torch.device) -> FilePieces:
        """What the layers are read by."""
        experts = [source for _, source in self.experts]
        stored = {source.dtype(name) for source in (*experts, *([self.base] if self.base else [])) for name in self.layers}
        largest = max(self._numel(name) for name in self.layers)
        longest = max(rule.unit for rule in self.rules.values())
        return FilePieces(self.base, experts, stored, self._dtypes.values(), self._written.values(), largest, longest, device)

    def workers(self, device: torch.device) -> int:
        """How many threads merge: as one vector tensors wait for each other, and so they do where a rule wants to be alone."""
        if self._merge.whole or any(rule.alone for rule in self.rules.values()):
            return 1
        at_once = torch.get_num_threads() + 1  # one of them waits for the disk
        return at_once if device.type == "cpu" else min(at_once, GPU_WORKERS)

    def buffer_bytes(self, device: torch.device) -> int:
        """What all threads hold beside what their rules do; on a GPU that, and what is read in pinned memory, too."""
        looking = self._merge.whole or self._merge.factors_of is not None
        return (self.workers(device) + looking) * self.pieces(device).thread_bytes

    def extent(self, name: str) -> Extent:
        """All of a layer."""
        rule = self.rules["" if self._merge.whole else name]
        return Extent(name, self._dtypes[name], self._numel(name), rule.unseen, rule.unit)

    def in_order(self, shard: Shard) -> list[str]:
        """The shard's tensors in the order of the model, which decides between equal magnitudes of a whole vector."""
        return [name for name in dict.fromkeys((*self.names.names, *self.kept)) if self.called.get(name) in shard.begins]

    def whose(self, name: str) -> Source:
        """The model that a tensor's shape, and what is not merged of it, is from."""
        return self.kept.get(name, self.names)

    def is_kept_buffer(self, name: str) -> bool:
        return name in self.kept and self.kept[name].is_buffer(name)

    def written_dtype(self, name: str) -> torch.dtype:
        if name not in self.buffers:
            return self._written[name]
        asked = self._merge.out_dtype or self._merge.dtype if name in self.kept and not self.is_kept_buffer(name) else None
        return asked or self.whose(name).dtype(name)

    def configuration(self, configuration: dict) -> dict:
        """config.json with the type that is written, in nested configurations too; as it was where several are written. And with
        the number of rows of tokens, and of layers."""
        asked = self._merge.out_dtype or self._merge.dtype
        configuration = self.companions.configuration(configuration)
        if self._merge.stacks is not None:
            base, merged = self._merge.stacks
            configuration = (base or merged[0]).configuration(configuration)
        written = {self.written_dtype(name) for name in (*self.layers, *self.kept) if not self.is_kept_buffer(name)}
        if asked is not None:
            configuration = {"dtype": None, **configuration}
        return with_dtype(configuration, written.pop()) if len(written) == 1 else configuration

    def described(self, about: Report) -> Report:
        """``about`` with what is known of the models and of what is written."""
        merge, layers = self._merge, self.layers
        base = [described("base", "base", merge.base)] if merge.base is not None else []
        weights: dict[str, dict[str, float]] = {}
        if all(isinstance(self.rules.get(name), Combination | Sparsified) for name in layers):
            weights = {
                task: {name: self.rules[name].shares[place] for name in layers} for place, (task, _) in enumerate(self.experts)
            }
        return replace(
            about,
            models=[*base, *(described(task, "expert", path) for task, path in merge.experts)],
            coefficients=weights,
            merged={
                "tensors": len(layers),
                "numbers": sum(map(self._numel, layers)),
                "dtypes": sorted({str(self._written[name]).removeprefix("torch.") for name in layers}),
            },
            heads=[task for task, expert in self.experts if any(name in expert.names for name in self.heads)],
        )

    def _rules_of(self, rule_of: Callable[[str, torch.Size, torch.dtype], Rule]) -> dict[str, Rule]:
        if not self._merge.whole:
            return {name: rule_of(name, self.names.shape(name), dtype) for name, dtype in self._dtypes.items()}
        if len(set(self._dtypes.values())) > 1:
            raise ValueError("trimming the whole vector needs one dtype for all tensors; set dtype")
        return {"": rule_of("", torch.Size([sum(map(self._numel, self.layers))]), next(iter(self._dtypes.values())))}

    def _numel(self, name: str) -> int:
        return self.names.shape(name).numel()


def _promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)
