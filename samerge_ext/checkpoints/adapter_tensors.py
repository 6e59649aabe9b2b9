"""The tensors of a LoRA adapter's file: what each is for, and which tensor of the base it changes."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from samerge_ext.checkpoints.adapter_config import MERGE_IT, AdapterConfig
from samerge_ext.checkpoints.adapter_edits import Edit, Pair
from samerge_ext.checkpoints.architecture import Architecture
from samerge_ext.checkpoints.files import SafetensorsFile
from samerge_ext.checkpoints.naming import correspondence
from samerge_ext.checkpoints.reading import CheckpointError, read_json
from samerge_ext.checkpoints.sources import Source

PREFIX = "base_model.model."  # PEFT wraps the model that it adapts twice
# How a pair of factors is named, of layers and of embeddings.
FACTORS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
TOKENS = (".token_adapter.trainable_tokens_delta", ".trainable_tokens_delta")
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)")
NAMED = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\.(\w+?)(?:\.weight)?$")  # as in a state dict of the whole model
# The layers of the GPT-2 family that transformers keeps as Conv1D, whose weight is [n, m] where a Linear's is [m, n].
CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")
EMBEDDINGS = ("embed_tokens", "embed_in", "shared", "tok_embeddings", "tokens_embed", "word_embeddings", "wte")
HEADS = ("decoder", "embed_out", "lm_head", "output_projection")
GENERATIVE = ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM", "DoubleHeads")


def edits_of(file: SafetensorsFile, config: AdapterConfig, base: Source, label: str) -> dict[str, Edit]:
    """Tensor of the base, or of a head that it lacks -> what the adapter does to it. Raises CheckpointError."""
    return _Sorted(file, config, base, label).edits


def _places(file: SafetensorsFile, base: Source) -> dict[str, str]:
    """What the adapted model calls tensors -> what the base does, where these differ: a base may do without the prefix that its
    backbone has below a head, or have old names; of those that transformers itself changed its tables tell."""
    targets = set()
    for stored in file.names:
        name = WRAPPERS.sub("", stored.removeprefix(PREFIX))
        targets.add(f"{name.rpartition('.lora_')[0]}.weight" if ".lora_" in name else name)
    if all(target in base for target in targets):
        return {}
    ours, theirs = dict.fromkeys(base.names, torch.Size()), dict.fromkeys(sorted(targets), torch.Size())
    found = correspondence(ours, theirs)
    if base.files and not targets <= {*found.values(), *base.aliases}:
        found = correspondence(ours, theirs, Architecture.of_folder(base.files[0]).rename)
    return {theirs: ours for ours, theirs in found.items() if ours != theirs}


class _Sorted:
    """The tensors of an adapter's file, sorted by what they do and checked against the base.

    edits: what comes of it.
    """

    def __init__(self, file: SafetensorsFile, config: AdapterConfig, base: Source, label: str):
        self._file, self._config, self._base, self._label = file, config, base, label
        self._places = _places(file, base)
        self.edits: dict[str, Edit] = {}
        left = self._take_pairs(dict.fromkeys(file.names))
        left = self._take_tokens(left)
        for stored in left:
            if "lora_" in stored:
                raise self._no_pair(stored)
            self._add_whole(stored)
        self._check_tied_embeddings()

    def _no_pair(self, stored: str) -> CheckpointError:
        if named := NAMED.search(stored):
            return CheckpointError(
                f"{self._label}: '{stored}' is named after the adapter '{named[1]}', and PEFT's files are not: save it with "
                f"save_pretrained(), or take '.{named[1]}' out of the names"
            )
        return CheckpointError(f"{self._label}: '{stored}' is not a pair of LoRA factors; {MERGE_IT}")

    def _place(self, name: str) -> str | None:
        """The name under which the base stores a tensor of the model that was adapted; None where it lacks it."""
        name = name if name in self._base else self._places.get(name, name)
        return self._base.aliases.get(name, name) if name in self._base else None

    def _take_pairs(self, names: dict[str, None]) -> dict[str, None]:
        """Adds the pairs of factors; the names that are left."""
        left = dict(names)
        for first in names:
            for a, b in FACTORS:
                if first.endswith(f".{a}"):
                    second = first.removesuffix(a) + b
                    if second not in names:
                        raise CheckpointError(f"{self._label}: '{first}' has no place: '{second}' is missing; save it again")
                    magnitude, bias = (first.removesuffix(a) + name for name in ("lora_magnitude_vector", "lora_B.bias"))
                    pair = self._add_pair(first, second, a.startswith("lora_embedding"), magnitude if magnitude in left else None)
                    if pair and bias in left:
                        self._add_bias(bias, pair.scaling)
                    for name in (first, second, magnitude, bias):
                        left.pop(name, None)
        return left

    def _add_pair(self, first: str, second: str, embedding: bool, magnitude: str | None) -> Pair | None:
        """Adds the change of a layer; None where it is that of the embeddings which the layer is tied to."""
        module = WRAPPERS.sub("", first.removeprefix(PREFIX)).rpartition(".lora_")[0]
        target = f"{module}.weight"
        if not embedding and (tied := self._tied_to(target)):
            if self._changes_alike(first, second, tied):
                return None
            raise CheckpointError(
                f"{self._label}: '{first}' changes '{target}', which is tied to '{tied}' in {self._base.label}; a change of one "
                "cannot be merged into both. Untie them in the base (tie_word_embeddings: false, a copy of the embeddings stored "
                f"as '{target}'), or leave '{module}' out of target_modules"
            )
        place = self._place(target)
        if place is None:
            raise CheckpointError(
                f"{self._label}: '{first}' has no place: {self._base.label} lacks '{target}'; is it an adapter of this base?"
            )
        a, b = self._file.shape(first), self._file.shape(second)
        if min(len(a), len(b)) < 2 or 0 in (*a, *b):
            raise CheckpointError(f"{self._label}: '{first}' {list(a)} and '{second}' {list(b)} are no factors; save it again")
        transposed = embedding or self._is_transposed(place, a, b)
        self._check_shapes(first, a, b, place, transposed)
        if magnitude and (embedding or len(a) != 2 or list(self._file.shape(magnitude)) != [b[0]]):
            raise CheckpointError(f"{self._label}: '{magnitude}' is DORA of no linear layer; {MERGE_IT}")
        pair = Pair(first, second, transposed, self._config.scaling(module, a[0]), magnitude)
        if place in self.edits:
            raise CheckpointError(f"{self._label}: '{first}' is a second pair of factors of '{place}'; {MERGE_IT}")
        self.edits[place] = Edit(pair=pair)
        return pair

    def _changes_alike(self, first: str, second: str, tied: str) -> bool:
        """Whether the embeddings that a head is tied to have its factors, transposed (PEFT's ensure_weight_tying)."""
        for a in self._file.names:
            if a.endswith(FACTORS[1][0]):
                module = WRAPPERS.sub("", a.removeprefix(PREFIX)).rpartition(".lora_")[0]
                b = a.removesuffix(FACTORS[1][0]) + FACTORS[1][1]
                if self._place(f"{module}.weight") == tied and b in self._file.names:
                    read = self._file.read
                    return torch.equal(read(a).T, read(second)) and torch.equal(read(b).T, read(first))
        return False

    def _add_bias(self, stored: str, scaling: float) -> None:
        """Adds the bias of the second factor (lora_bias), which belongs to the layer's own."""
        target = f"{WRAPPERS.sub('', stored.removeprefix(PREFIX)).rpartition('.lora_')[0]}.bias"
        place = self._place(target)
        if place is None or self._base.shape(place) != self._file.shape(stored):
            raise CheckpointError(f"{self._label}: '{stored}' has no place: {self._base.label} lacks a '{target}' of its shape")
        self.edits[place] = Edit(bias=stored, scaling=scaling)

    def _check_shapes(self, first: str, a: torch.Size, b: torch.Size, place: str, transposed: bool) -> None:
        weight = self._adapted_shape(place)
        made = [b[0], *a[1:]] if not transposed else [*a[1:], b[0]]
        if len(a) == len(b) and a[0] == b[1] and all(n == 1 for n in b[2:]) and made == list(weight):
            return
        if transposed and len(made) == len(weight) == 2 and made[1] == weight[1] and _last(place) in EMBEDDINGS:
            raise self._other_vocabulary(first, made[0], place)
        raise CheckpointError(
            f"{self._label}: factors {list(b)} · {list(a)} do not make a change of '{place}' {list(weight)}; is it an adapter of "
            "this base? Linear layers, embeddings and convolutions of one group can be merged"
        )

    def _is_transposed(self, place: str, a: torch.Size, b: torch.Size) -> bool:
        """Whether a layer stores its weight [n, m]: by the shapes, of a square one by its kind."""
        weight = self._base.shape(place)
        if len(a) != 2 or len(b) != 2 or len(weight) != 2 or weight[0] != weight[1]:
            return len(a) == len(b) == 2 and [b[0], a[1]] != list(weight) == [a[1], b[0]]
        kinds = {self._is_conv1d(name) for name in self._base.names if _last(name) in CONV1D and name.endswith(".weight")}
        if kinds - {None}:
            return _last(place) in CONV1D and True in kinds
        return self._config.fan_in_fan_out

    def _is_conv1d(self, name: str) -> bool | None:
        """Whether a layer is a Conv1D and no Linear, by its bias, which has the length of its output; None where it is square."""
        weight, bias = self._base.shape(name), f"{name.removesuffix('weight')}bias"
        if len(weight) != 2 or weight[0] == weight[1] or bias not in self._base:
            return None
        return self._base.shape(bias)[0] == weight[1]

    def _take_tokens(self, names: dict[str, None]) -> dict[str, None]:
        """Adds the rows of tokens that were trained one by one; the names that are left."""
        left = dict(names)
        for stored in names:
            if suffix := next((suffix for suffix in TOKENS if stored.endswith(suffix)), None):
                self._add_tokens(stored, stored.removeprefix(PREFIX).removesuffix(suffix))
                del left[stored]
        return left

    def _add_tokens(self, stored: str, module: str) -> None:
        target = f"{module}.weight"
        if tied := self._tied_to(target):
            raise self._tied(stored, target, tied)
        place, tokens, rows = self._place(target), self._config.tokens(module), self._file.shape(stored)
        if place is None:
            raise CheckpointError(
                f"{self._label}: '{stored}' has no place: {self._base.label} lacks '{target}'; is it an adapter of this base?"
            )
        weight = self._adapted_shape(place)
        if len(weight) != 2 or not tokens or list(rows) != [len(tokens), *weight[1:]]:
            raise CheckpointError(
                f"{self._label}: '{stored}' {list(rows)} are not rows of {len(tokens)} tokens of '{place}' {list(weight)}; is it "
                "an adapter of this base?"
            )
        tokens = [token + weight[0] if token < 0 else token for token in tokens]
        if min(tokens) < 0:
            raise CheckpointError(f"{self._label}: its tokens count from the end, beyond the first of '{place}' {list(weight)}")
        if max(tokens) >= weight[0]:
            raise self._other_vocabulary(stored, max(tokens) + 1, place)
        self.edits[place] = replace(self.edits.get(place, Edit()), rows=stored, tokens=tokens)

    def _add_whole(self, stored: str) -> None:
        name = stored.removeprefix(PREFIX)
        target = name if name in self._base else WRAPPERS.sub("", name)
        if ".original_module." in f".{name}":  # what modules_to_save took the place of
            return
        if ".token_adapter." in name:
            raise CheckpointError(
                f"{self._label}: '{stored}': modules_to_save and trainable_token_indices of one embedding are not merged, nor "
                "are they by peft; leave one of the two out"
            )
        if tied := self._tied_to(target):
            other = self.edits.get(tied, Edit()).own or self._stored_as(tied)
            held = self._file.read(other) if other else self._base.read(tied)
            own = self._file.read(stored)
            if held.shape != own.shape or not torch.equal(held.to(own.dtype), own):
                raise self._tied(stored, target, tied)
            return
        place = self._place(target) or target
        self.edits[place] = replace(self.edits.get(place, Edit()), own=stored)

    def _adapted_shape(self, place: str) -> torch.Size:
        """Of the tensor that was adapted: the base's, or where the vocabulary was changed before, the one in the file."""
        own = next((n for n in self._file.names if self._is_whole(n) and self._place(_without_wrappers(n)) == place), None)
        return self._base.shape(place) if own is None else self._file.shape(own)

    @staticmethod
    def _is_whole(stored: str) -> bool:
        """Whether a tensor in the file is one of the model."""
        return not ("lora_" in stored or stored.endswith(TOKENS) or ".original_module." in stored or ".token_adapter." in stored)

    def _stored_as(self, target: str) -> str | None:
        """The name of a tensor in the file that is saved whole."""
        return next((n for n in self._file.names if WRAPPERS.sub("", n.removeprefix(PREFIX)) == target), None)

    def _tied_to(self, target: str) -> str | None:
        """The tensor of the base that another one of the model is, by storage or configuration; None for one of its own."""
        if target in self._base.aliases:
            return self._base.aliases[target]
        if target in self._base or _last(target) not in HEADS or not self._ties_its_head():
            return None
        if target.endswith(".bias"):  # in masked language models the head's, as decoder.bias too
            above = f"{target.removesuffix('.bias').rpartition('.')[0]}.bias"
            return above if above in self._base else None
        return self._embedding

    @property
    def _embedding(self) -> str | None:
        return next((n for n in self._base.names if n.endswith(".weight") and _last(n) in EMBEDDINGS), None)

    def _ties_its_head(self) -> bool:
        """Whether the base is a language model without an output layer of its own."""
        if any(_last(name) in HEADS and name.endswith(".weight") for name in self._base.names) or not self._base.files:
            return False
        path = self._base.files[-1].parent / "config.json"
        config = read_json(path) if path.is_file() else {}
        generative = any(kind in str(config.get("architectures")) for kind in GENERATIVE)
        return generative and config.get("tie_word_embeddings") is not False

    def _check_tied_embeddings(self) -> None:
        """An embedding that is saved whole, and that the head is tied to, must be the head's too."""
        name = self._embedding
        own = self.edits.get(name, Edit()).own if name else None
        if name is None or own is None or not self._ties_its_head():
            return
        heads = [n for n in self._file.names if _last(n) in HEADS]  # found equal before
        if not heads and not torch.equal(self._file.read(own), self._base.read(name).to(self._file.dtype(own))):
            raise self._tied(own, name, "lm_head.weight")

    def _tied(self, stored: str, target: str, other: str) -> CheckpointError:
        return CheckpointError(
            f"{self._label}: '{stored}' changes '{target}', which is tied to '{other}' in {self._base.label}, and not the other; "
            "train both (ensure_weight_tying=True), or untie them in the base (tie_word_embeddings: false, both stored)"
        )

    def _other_vocabulary(self, stored: str, tokens: int, place: str) -> CheckpointError:
        return CheckpointError(
            f"{self._label}: '{stored}' is of a vocabulary of {tokens} tokens, '{place}' of {self._base.label} of "
            f"{self._base.shape(place)[0]}; call resize_token_embeddings({tokens}) on the base, save it, with the adapter's "
            "tokenizer, and pass that as the base"
        )


def _without_wrappers(stored: str) -> str:
    return WRAPPERS.sub("", stored.removeprefix(PREFIX))


def _last(name: str) -> str:
    """The name of the module that a tensor belongs to."""
    return name.rpartition(".")[0].rpartition(".")[2]
