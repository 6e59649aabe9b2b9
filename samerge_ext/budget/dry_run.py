"""A pass through a merged model without numbers: every operation runs on tensors that have shapes and no memory, and what
would be allocated is counted."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samerge_ext.budget.rehearsed_ranks import RehearsedRanks
from samerge_ext.learning.language_model import LanguageModel, OfExpert
from samerge_ext.learning.losses import Answers, Divergence, Gradient, distillation, imitation, uncertainty
from samerge_ext.learning.nested import map_tensors
from samerge_ext.learning.passes import Logits, answering, call_logits, losses_and_gradient, running
from samerge_ext.learning.prefetch import Input, Inputs
from samerge_ext.learning.teachers import expert_head
from samerge_ext.learning.turns import tasks_of
from samerge_ext.merged.model import MergedModel
from samerge_ext.merged.streamed import let_go, weights_of
from samerge_ext.ops._common import accumulator
from samerge_ext.ops.chunked_rows import workspace_for
from samerge_ext.ops.most_likely_kl import MostLikely
from samerge_ext.packing.components import Components
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.packing.shards import Shards, Spread, own
from samerge_ext.packing.stores import InMemory, WholeStore, empty_like, parts


@dataclass
class DryRun:
    """What one pass of all tasks takes.

    peak: bytes on the device beyond base and task vectors: merged weights, gradients, activations.
    answers: bytes of each task's logits, or of its last hidden states. heads: of a vector of all heads that are learned.
    fetched: of a streamed pass, (start, numbers, whether they are needed again for gradients) of every run that is fetched.
    received: bytes that come to a rank from the others.
    """

    peak: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    heads: int = 0
    fetched: list[list] = field(default_factory=list)
    received: int = 0


def dry_run(
    module: nn.Module,
    packed: PackedWeights,
    batches: Mapping[str, Any],
    logits: Logits,
    *,
    device: torch.device,
    streamed: bool,
    loss: str = "kl",
    top_k: int | None = None,
    tasks_per_batch: int | None = None,
    precision: str = "fp32",
    train_heads: str | Sequence[str] = (),
    heads: Mapping[str, nn.Module] | None = None,
    rank: int = 0,
    member: RehearsedRanks | None = None,
) -> DryRun:
    """The pass that `passes.losses_and_gradient` would make with one batch per task, on a copy of ``module``.

    loss: of a language model, "kl", "cross_entropy" or "entropy": the first two have an expert's head beside its own. top_k: an
        expert gives so many of its classes, and its head is not there. rank: of so many singular components of every matrix the
        factors count, and the search for them. train_heads, heads: of heads that are learned too, the activations and gradients.
    member: the rank that makes it, of those that weights are spread over; streamed, two of them, as only in a second
        one what comes next is known; and those of its experts.

    Raises ValueError where the model's forward depends on values that are not there.
    """
    found = DryRun()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    meter = _Meter(device)

    def fake(tensor: Tensor) -> Tensor:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        meter.ignore(empty)
        return empty

    def objective(answers: Answers, task: str) -> tuple[Tensor, Gradient]:
        if top_k is not None:
            kept = _most_likely_without_numbers(answers, top_k)
            found.answers[task] = sum(tensor.nbytes for tensor in kept)
            return distillation(answers, kept, Divergence(), None)
        if isinstance(answers, Tensor):
            found.answers[task] = answers.nbytes
            return answers.new_zeros((), dtype=torch.float32), torch.empty_like(answers)
        found.answers[task] = answers.hidden.nbytes
        teacher = OfExpert(answers.hidden.detach(), partial(expert_head, model, task))
        if loss == "kl" and not isinstance(answers.weight, Tensor):
            return distillation(answers, teacher, Divergence(), None)  # whose slabs are seen
        workspace = torch.empty(workspace_for(None, device), dtype=torch.uint8, device=device)  # where the operators put logits
        if loss == "entropy":
            result = uncertainty(answers)
        elif loss == "cross_entropy":
            result = imitation(answers, teacher, None)
        else:
            result = distillation(answers, teacher, Divergence(), None)
        del workspace
        return result

    shards = None if member is None else Shards(packed.layout, member)
    with mode:
        module = _without_memory(module, fake)
        numel = packed.layout.numel if shards is None else shards.numel
        base: Any = empty_like(own(packed.base), numel, device)
        task_vectors = empty_like(own(packed.task_vectors), numel, device)
        for part in (base, *parts(task_vectors).values()):
            meter.ignore(part)
        empty = _packed_without_memory(packed, base, task_vectors, shards, fake)
        inputs = {task: Input(map_tensors(fake, batch), task) for task, batch in batches.items()}
        store = _DryStore(base, task_vectors, found.fetched) if streamed else None
        try:
            with meter:
                model = MergedModel(module, empty, streamed=streamed, store=store)
                model.train_heads(train_heads, heads)
                if rank:
                    model.use_components(Components.rehearsed(packed, rank, WholeStore(base, task_vectors)))
                first = next(iter(inputs))
                model.select_head(first)
                logits = answering(logits, model.module, inputs[first].batch)
                if member is not None:
                    inputs = {task: inputs[task] for task in tasks_of(packed.tasks, member)}
                    if loss != "entropy" and not packed.experts:  # which are read from where they are
                        _experts(model, member, inputs, logits, precision)
                for _ in range(2 if member is not None and streamed else 1):
                    before = 0 if member is None else member.traffic.received
                    losses_and_gradient(
                        model,
                        model.coefficients.detach(),
                        inputs,
                        logits,
                        objective,
                        task_weights=dict.fromkeys(packed.tasks, 1.0),
                        tasks_per_batch=tasks_per_batch,
                        precision=precision,
                    )
                found.received = 0 if member is None else member.traffic.received - before
                found.heads = model.trained_heads.start.nbytes
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise ValueError(
                f"the memory of this model cannot be planned, since its forward asks for values ({error}); hold it as "
                "streamed=True or False says, without memory_budget"
            ) from error
        finally:
            meter.give_gradients_back()
    found.peak = meter.peak
    return found


@torch.no_grad()
def _experts(model: MergedModel, member: RehearsedRanks, inputs: Inputs, logits: Logits, precision: str) -> None:
    """What a rank's experts say, each merged by all ranks while the others merge theirs."""
    member.traffic.at_their_own = member.size > 1
    for task, given in inputs.items():
        with model.teacher(task) as module:
            if isinstance(logits, LanguageModel):
                with running(module, precision, f"the batch of task '{task}'"):
                    logits.hidden_states(module, given.batch)
            else:
                call_logits(logits, module, given.batch, task, precision)
    member.traffic.at_their_own = False


class _DryStore(WholeStore):
    """Records what a pass fetches."""

    def __init__(self, base: Tensor, task_vectors: InMemory, fetched: list[list]):
        super().__init__(base, task_vectors)
        self._fetched = fetched

    def begin_pass(self) -> None:
        self._fetched.clear()

    def fetch(self, start: int, length: int) -> tuple[Tensor, InMemory]:
        if self._fetched and self._fetched[-1][:2] == [start, length]:
            self._fetched[-1][2] = True
        else:
            self._fetched.append([start, length, False])
        return super().fetch(start, length)


class _Meter(TorchDispatchMode):
    """Counts the bytes of all tensors on a device that are alive. live, peak: now, and at most."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        # address of a storage -> the storage
        self._known: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        # Parameters of the user's own, which the backward gives gradients without numbers, and what they had before.
        self._leaves: dict[int, tuple[Tensor, Tensor | None]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves(args):
            # To ask a tensor of the model's own whether it is a leaf, while autograd makes a view of it, never returns.
            if isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor) and tensor.is_leaf and tensor.requires_grad:
                self._leaves.setdefault(id(tensor), (tensor, tensor.grad))
        masks: Sequence[Any] = args[1] if function is torch.ops.aten.index.Tensor else ()
        if len(masks) == 1 and masks[0].dtype == torch.bool:
            # How many are selected is not known: at most all.
            result = args[0].new_empty((masks[0].numel(), *args[0].shape[masks[0].dim() :]))
        elif function is torch.ops.aten._grouped_mm.default:
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Views of this tensor take nothing."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def give_gradients_back(self) -> None:
        for tensor, gradient in self._leaves.values():
            tensor.grad = gradient

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self._known.get(storage._cdata) is storage:
            return
        self._known[storage._cdata] = storage
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, nbytes)

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


def _grouped_product(a: Tensor, b: Tensor, offsets: Tensor | None = None, **_: Any) -> Tensor:
    """The product of a mixture's experts, which torch refuses for fp32 tensors without numbers: the rows of a two-dimensional
    a [M, K] or columns of b [K, N] are dealt to groups, and of two such each group has a product of its own."""
    shape: tuple[int, ...] = (a.shape[-2], b.shape[-1])
    if a.dim() == b.dim():
        shape = (a.shape[0] if offsets is None else offsets.numel(), *shape)
    return a.new_empty(shape)


def _most_likely_without_numbers(answers: Answers, k: int) -> MostLikely:
    rows, classes = answers.shape if isinstance(answers, Tensor) else (len(answers.hidden), answers.weight.shape[0])
    of = answers if isinstance(answers, Tensor) else answers.hidden
    log_p = of.new_empty(rows, min(k, classes), dtype=accumulator(of))
    return MostLikely(torch.zeros_like(log_p, dtype=torch.int32), log_p, log_p.new_empty(rows))


def _without_memory(module: nn.Module, fake: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the module whose parameters and buffers are fake; the module itself, which may be streamed, is not touched."""
    memo: dict[int, Any] = {id(weights): weights for weights in weights_of(module)}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = fake(tensor)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    copied = copy.deepcopy(getattr(module, "_orig_mod", module), memo)
    let_go(copied)
    return copied


def _packed_without_memory(
    packed: PackedWeights, base: Tensor, task_vectors: InMemory, shards: Shards | None, fake: Callable[[Tensor], Tensor]
) -> PackedWeights:
    names = ("unchanged", "buffers", "expert_buffers", "heads")
    others = map_tensors(fake, {name: getattr(packed, name) for name in names})
    layout = replace(packed.layout, block_layer=fake(packed.layout.block_layer))
    held: tuple[Any, Any] = base, task_vectors
    if shards is not None:
        shards.block_layer = fake(shards.block_layer)
        held = Spread.like(packed.base, base, shards), Spread.like(packed.task_vectors, task_vectors, shards)
    return replace(packed, layout=layout, base=held[0], task_vectors=held[1], **others)
