"""What a learned merge of transformers' folders runs: an empty model, its logits, and the calibration batches of every task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.checkpoints.adapter_config import WEIGHTS
from samerge_ext.checkpoints.adapter_tensors import PREFIX
from samerge_ext.checkpoints.companions import Companions
from samerge_ext.checkpoints.converted import Conversion
from samerge_ext.checkpoints.files import SafetensorsFile
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.places import folder_of, is_adapter
from samerge_ext.checkpoints.sources import CheckpointSource, matches
from samerge_ext.checkpoints.tokenizers import MergedTokenizer, TokenizerConfig
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.passes import Logits
from samerge_ext.models.architecture import ZERO_SHOT, Kind, empty_model, find_architecture
from samerge_ext.models.clip_folders import empty_open_clip, is_open_clip, open_clips_transform, zero_shot_heads
from samerge_ext.models.pictures import find_pictures, load_image_processor, picture_batches
from samerge_ext.models.texts import load_tokenizer, read_records, text_batches
from samerge_ext.packing.opened import tokenizer_of_folders

Batch = dict[str, Tensor]
HEADS = ("classifier", "score")  # what PEFT saves with every adapter of a classifier


@dataclass(frozen=True)
class FolderModel:
    """A model of the experts' architecture without memory for its weights.

    kind: what it does, and its logits function. conversion: between its tensors and those of the folders. tokenizer: of the
    merged model, where it is not every model's own; all tasks' texts are read by it then. heads: of every task of CLIP
    (`with_heads`).
    """

    module: Any
    kind: Kind
    conversion: Conversion
    base: Path
    experts: Mapping[str, Path]
    tokenizer: MergedTokenizer | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        base: Path,
        experts: Mapping[str, Path],
        heads: Sequence[str] = (),
        tokenizer: TokenizerConfig | None = None,
    ) -> FolderModel:
        """The model that a base and its experts, model folders or adapters, are merged to.

        heads: patterns of the tasks' own tensors, and of those that are kept. tokenizer: see `PackedWeights.from_folders`.
        Raises ValueError where the folders' architecture has no logits function here.
        """
        if is_open_clip(base):
            if tokenizer is not None:
                raise ValueError(f"{base} is a model of open_clip, whose tokenizer is its own; leave out 'tokenizer'")
            module = empty_open_clip(base)
            return cls(module, ZERO_SHOT, Conversion(module), base, experts)
        folder, architecture, kind = find_architecture(base, experts)
        heads = tuple(heads)
        module = empty_model(folder, architecture)
        conversion = _conversion(module, base, experts, heads)
        merged = tokenizer_of_folders(base, experts, tokenizer, conversion=conversion, heads=heads)
        if merged is not None and merged.rows not in (None, _embeddings(module)):
            module = empty_model(folder, architecture, merged.rows)
            conversion = _conversion(module, base, experts, heads)
        return cls(module, kind, conversion, base, experts, merged)

    def with_heads(self, classes: Mapping[str, Path], templates: Mapping[str, Path]) -> FolderModel:
        """The same with the tasks' heads where the model has none of its own: CLIP's, of files of class names and templates.

        Raises ValueError for tasks without classes, and for classes of models that have heads.
        """
        if self.kind is not ZERO_SHOT:
            if classes or templates:
                raise ValueError(f"calibration: classes and templates are CLIP's; these models are for {self.kind.name}")
            return self
        for key, files in (("classes", classes), ("templates", templates)):
            unknown, missing = set(files) - set(self.experts), set(self.experts) - set(files) if key == "classes" else set()
            if unknown or missing:
                fault = f"add files for {sorted(missing)}" if missing else f"remove {sorted(unknown)}"
                raise ValueError(f"calibration: {key} are of {sorted(files)}, the tasks are {sorted(self.experts)}: {fault}")
        return replace(self, heads=zero_shot_heads(self.module, self.base, self.conversion, classes, templates))

    @property
    def logits(self) -> Logits:
        """logits(module, batch, task) of the merged model."""
        return self.kind.logits(self.heads) if self.kind is ZERO_SHOT else self.kind.logits

    def batches(
        self, files: Mapping[str, Path], *, limit: int | None = None, batch_size: int = 16, max_length: int = 128
    ) -> dict[str, list[Batch]]:
        """Every task's batches, of its file of texts or folder of pictures, by its expert's tokenizer or image processor, or else
        the base's.

        limit: use the first so many. max_length: tokens; texts are cut there, and where the model's positions end.
        """
        Calibration({task: [path] for task, path in files.items()}, tuple(self.experts))  # tasks that are missing or unknown
        if self.kind.reads == "pictures":
            found = {task: find_pictures(path, limit) for task, path in files.items()}
            return {task: self.reader(task)(pictures, batch_size) for task, pictures in found.items()}
        batches, pads, merged = {}, [], self._merged_tokenizer()
        for task, path in files.items():
            tokenizer = merged or load_tokenizer(self._at(task), self.module.config)
            pads.append(tokenizer.pad_token_id)
            batches[task] = self._texts(tokenizer, path, limit, batch_size, max_length)
        _pad_alike(self.module, batches, pads)
        return batches

    def reader(self, task: str) -> Callable[[Sequence[Path], int], list[Batch]]:
        """What makes batches, of a size, of a task's pictures."""
        channels = getattr(getattr(self.module, "config", None), "num_channels", 3)
        processor = self._image_processor(task)
        return lambda pictures, batch_size: picture_batches(pictures, processor, batch_size, channels)

    def _merged_tokenizer(self) -> Any:
        """The tokenizer as it will be written with the merged model; None where no rows are moved."""
        if self.tokenizer is None:
            return None
        with TemporaryDirectory() as folder:
            Companions(folder_of(self.base), self.tokenizer).copy(folder)
            try:
                loaded = load_tokenizer([folder], self.module.config)
            except ValueError as error:
                raise ValueError(str(error).replace(folder, str(self.tokenizer.folder))) from error
        loaded.name_or_path = str(self.tokenizer.folder)
        return loaded

    def _image_processor(self, task: str) -> Any:
        return open_clips_transform(self.module) if is_open_clip(self.base) else load_image_processor(self._at(task))

    def _at(self, task: str) -> list[Path]:
        return [self.experts[task], self.base, *self.experts.values()]

    def _texts(self, tokenizer: Any, path: Path, limit: int | None, batch_size: int, max_length: int) -> list[Batch]:
        texts, longest = read_records(path, limit), _positions(self.module)
        if longest is not None and longest < max_length:
            cut = sum(len(ids) > longest for ids in tokenizer(texts, return_attention_mask=False)["input_ids"])
            if cut:
                warnings.warn(f"{path}: {cut} of {len(texts)} texts are cut to the model's {longest} positions", stacklevel=4)
            max_length = longest
        batches = text_batches(texts, tokenizer, batch_size, max_length, special_tokens=self.kind.special_tokens)
        _check_tokens(self.module, tokenizer, path, batches)
        return batches


def _conversion(module: Any, base: Path, experts: Mapping[str, Path], heads: tuple[str, ...]) -> Conversion:
    if not all(is_adapter(path) for path in experts.values()):
        return Conversion(module)
    return Conversion(module, *_of_other_head(module, base, list(experts.values()), heads))


def _of_other_head(
    module: Any, base: Path, adapters: Sequence[Path], heads: tuple[str, ...]
) -> tuple[dict[str, Tensor], Collection[str]]:
    """What adapters need that their base has not, as it has another head or none: (tensors that are stored nowhere, newly
    initialised as PEFT does it; tensors of the base that the adapted model has no place for, unless ``heads`` take them)."""
    with open_checkpoint(base) as checkpoint:
        stored = CheckpointSource(checkpoint, "base")
        source = Conversion(module).base(stored)
        names = {*source.names, *source.aliases}
        left_out = set(source.names) - set(module.state_dict())
    known: dict[int, set[str]] = {}  # a tied parameter has several names
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), set()).add(name)
    missing = [min(tied, key=len) for tied in known.values() if not tied & names]
    saved = [_saved_by(path) for path in adapters]
    missing = [name for name in missing if not all(name in each for each in saved)]
    lost = [name for name in missing if any(part in HEADS for part in name.split("."))]
    if lost:
        raise ValueError(
            f"{adapters[0]} … and their base {base} store no '{lost[0]}': nothing is known of the adapters' head; save them "
            "with modules_to_save naming it"
        )
    left_out = {name for name in left_out if not matches(name, heads)}
    if missing:
        warnings.warn(
            f"{', '.join(missing)}: neither {base} nor its adapters store them; they are newly initialised, as PEFT does it, "
            "with seed 0 (adapters that were trained with other values give other logits now)",
            stacklevel=4,
        )
    if left_out:
        architecture = type(module).__name__
        warnings.warn(
            f"{', '.join(sorted(left_out))} of {base}: left out, as the adapters' {architecture} lacks them", stacklevel=4
        )
    return _initialised(module, missing), left_out


def _saved_by(adapter: Path) -> set[str]:
    """Names of the whole tensors that an adapter stores."""
    if not (adapter / WEIGHTS).is_file():
        return set()
    file = SafetensorsFile(adapter / WEIGHTS)
    file.close()
    return {name.removeprefix(PREFIX).replace(".modules_to_save", "").replace(".default", "") for name in file.names}


def _initialised(module: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """New values of some parameters, by the model's own initialisation."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            owner = module.get_submodule(path)
            for leaf, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    owner._parameters[leaf] = nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu"))
            module._init_weights(owner)
    values = {name: module.get_parameter(name).detach() for name in names}
    for name, value in values.items():
        if value.isnan().any():
            raise ValueError(
                f"'{name}' is stored nowhere, and {type(module).__name__} has no initial value for it; save the base with it"
            )
    return values


def _positions(module: Any) -> int | None:
    """How many tokens a text may have; None where there is no bound."""
    config = module.config.get_text_config()
    bound = getattr(config, "max_position_embeddings", None)
    if not isinstance(bound, int) or bound <= 0:
        return None
    for name, part in module.named_modules():  # RoBERTa's positions begin after that of padding
        if isinstance(part, nn.Embedding) and name.endswith("position_embeddings") and part.padding_idx is not None:
            return part.num_embeddings - part.padding_idx - 1
    return bound


def _embeddings(module: Any) -> int:
    """The number of rows that stand for tokens."""
    return module.get_input_embeddings().weight.shape[0]


def _check_tokens(module: Any, tokenizer: Any, path: Path, batches: Sequence[Batch]) -> None:
    """Raises ValueError where a tokenizer has tokens that the model lacks; warns where it knows no word."""
    rows = _embeddings(module)
    highest = max(int(batch["input_ids"].max()) for batch in batches)
    if highest >= rows:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer makes token {highest} of {path}, the model has embeddings of {rows} "
            "tokens; put the tokenizer that the model was trained with into its folder"
        )
    unknown = tokenizer.unk_token_id
    words = {i for batch in batches for i in batch["input_ids"][batch["attention_mask"].bool()].tolist()}
    if unknown in words and words <= {*tokenizer.all_special_ids}:
        warnings.warn(
            f"{tokenizer.name_or_path}: to its tokenizer every word of {path} is unknown ({tokenizer.unk_token}), so nothing is "
            "learned of the words; put the tokenizer that the model was trained with into its folder",
            stacklevel=5,
        )


def _pad_alike(module: Any, batches: Mapping[str, Sequence[Batch]], pads: Sequence[int]) -> None:
    """Pads with what the module's configuration says. Where it says nothing it is told: the tokenizer's token, unless texts end
    with it (one that pads with its end of text): a decoder's classifier reads at the last token that is not padding."""
    config = module.config.get_text_config()
    held = [batch for of_task in batches.values() for batch in of_task]
    pad = getattr(config, "pad_token_id", None)
    if pad is None:
        last = (batch["input_ids"].gather(1, batch["attention_mask"].sum(1, keepdim=True) - 1) for batch in held)
        ends = {token for tokens in last for token in tokens[:, 0].tolist()}
        pad = next(token for token in (*pads, *range(len(ends) + 1)) if token not in ends)
        config.pad_token_id = module.config.pad_token_id = pad
    for batch in held:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)
