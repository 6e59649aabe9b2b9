"""Models of different vocabularies: which rows each gets, what is said, what is refused; on folders of eight numbers a token."""

import json
import warnings

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file
from vocabularies import EMBEDDINGS, HEAD, LAYERS, completed, rows_of, write_model, write_tokenizer

import samerge_ext as sm
from samerge_ext.checkpoints.merged_vocabulary import VocabularyNote
from samerge_ext.checkpoints.tokenizers import TokenizerConfig, TokenRow
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

BASE = ["?", "a", "b", "c"]
WEIGHTS = (0.5, 0.25)


def merge(root, out="out", experts=("x", "y"), method="task_arithmetic", **keys):
    """The tensors and the tokens of a merge of folders, and what was said."""
    entries = [{"model": str(root / name), "parameters": {"weight": w}} for name, w in zip(experts, WEIGHTS, strict=False)]
    base = {} if method == "linear" else {"base_model": str(root / "base")}
    (root / "recipe.yaml").write_text(json.dumps({"merge_method": method, "models": entries, **base, **keys}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run_recipe(load_recipe(root / "recipe.yaml", {}), root / out, overwrite=True)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / out)
    return load_file(root / out / "model.safetensors"), tokenizer.get_vocab(), "\n".join(str(one.message) for one in said)


def check(root, tensors, vocabulary, words, tokens, missing="base", names=(EMBEDDINGS, HEAD)):
    """That every token's row is base + Σ w (expert − base) of the completed rows."""
    assert sorted(vocabulary) == sorted(tokens)
    for name in names:
        stored = [load_file(root / model / "model.safetensors")[name] for model in words]
        base, *experts = completed(tokens, [rows_of(w, t) for w, t in zip(words.values(), stored, strict=True)], missing)
        for token in tokens:
            expected = base[token] + sum(w * (e[token] - base[token]) for w, e in zip(WEIGHTS, experts, strict=True))
            assert_close(tensors[name][vocabulary[token]], expected, f"{name} of {token}")


def write(root, words, **options):
    for seed, (name, known) in enumerate(words.items()):
        write_model(root / name, known, seed=seed, **options)


@pytest.mark.parametrize(
    ("source", "missing", "tokens"),
    [
        ("base", "base", BASE),
        ("union", "base", [*BASE, "x1", "both", "y1"]),
        ("union", "mean", [*BASE, "x1", "both", "y1"]),
        ("y", "base", ["?", "a", "b", "both", "y1"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_token_is_merged_with_itself(tmp_path, source, missing, tokens, tied):
    """Tokens that all have under other numbers, that one has, that two have, that the base lacks, that an expert lacks."""
    words = {"base": BASE, "x": ["?", "b", "a", "c", "x1", "both"], "y": ["?", "a", "b", "both", "y1"]}
    write(tmp_path, words, tied=tied)
    tokenizer = {"source": source if source in ("base", "union") else str(tmp_path / source), "missing": missing}
    tensors, vocabulary, said = merge(tmp_path, tokenizer=tokenizer)
    names = (EMBEDDINGS,) if tied else (EMBEDDINGS, HEAD)
    check(tmp_path, tensors, vocabulary, words, tokens, missing, names)
    assert len(tensors[EMBEDDINGS]) == len(tokens)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == len(tokens)
    if source == "union":
        assert [vocabulary[token] for token in BASE] == [0, 1, 2, 3]
        assert "'x1', 'both', 'y1', in 7 rows, of 4 and 6 and 5 before" in said
        how = "from base" if missing == "base" else "as the mean of 2 models"
        assert f"expert 'y' ({tmp_path / 'y'}): the row of 'c' {how}" in said and "of its tokens 2 in another row" in said


def test_what_no_token_is_in_stays(tmp_path):
    write(tmp_path, {"base": BASE, "x": [*BASE, "x1"], "y": BASE})
    tensors, _, _ = merge(tmp_path, tokenizer="union")
    folders = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "x", "y")]
    base, x, y = ({name: tensor.double() for name, tensor in one.items()} for one in folders)
    for name in LAYERS:
        expected = base[name] + WEIGHTS[0] * (x[name] - base[name]) + WEIGHTS[1] * (y[name] - base[name])
        assert_close(tensors[name], expected, name)


def packed(root, said=False, **options):
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        found = sm.PackedWeights.from_folders(root / "base", {name: root / name for name in "xy"}, **options)
    return (found, "\n".join(str(note.message) for note in notes)) if said else found


def at(found, coefficient=0.5):
    return found.state_dict(found.merge(found.coefficients(coefficient)))


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("file", [False, True])
def test_packed_weights_have_the_rows_of_a_union(tmp_path, form, file):
    """In memory or in a file, and opened again; of quantised ones the experts, which are read again, too."""
    words = {"base": BASE, "x": ["?", "b", "a", "c", "x1"], "y": ["?", "a", "b", "y1"]}
    write(tmp_path, words)
    options = {"file": tmp_path / "packed.safetensors"} if file else {}
    found = packed(tmp_path, tokenizer="union", task_vector_dtype=form, **options)
    if file:
        found = sm.PackedWeights.open(tmp_path / "packed.safetensors")
    tokens = [*BASE, "x1", "y1"]
    stored = [load_file(tmp_path / name / "model.safetensors")[HEAD] for name in words]
    rows = completed(tokens, [rows_of(w, t) for w, t in zip(words.values(), stored, strict=True)])
    for task, expected in zip(("x", "y"), rows[1:], strict=True):
        with found.expert_source(task) as source:
            if form:
                tensor = source.read(HEAD)
            else:
                tensor = found.state_dict(found.merge(found.one_hot(task)))[HEAD]
        for number, token in enumerate(tokens):
            assert_close(tensor[number], expected[token], token)
    assert found.tokenizer.rows == 6 and found.tokenizer.config == TokenizerConfig("union")


def test_the_written_folder_of_packed_weights_goes_with_its_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    write(tmp_path, {"base": BASE, "x": [*BASE, "<x>"], "y": [*BASE, "<y>"]})
    write_tokenizer(tmp_path / "y", [*BASE, "<y>"], ("<y>",), template="{{ of y }}")
    found = packed(tmp_path, tokenizer="union")
    sm.task_arithmetic(found, 0.5).save_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes.values()), notes
    assert tokenizer("a <x> c <y>")["input_ids"] == [1, 4, 3, 5]
    added = tokenizer.added_tokens_decoder
    assert (added[5].special, added[5].rstrip, added[5].normalized) == (True, True, False)  # as in y
    assert (added[4].special, added[4].rstrip) == (False, False)  # x has it among its words
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 6
    for name, tensor in at(found).items():
        assert_close(model.state_dict()[name], tensor.double(), name)


def test_rows_that_only_pad_are_cut_or_filled_and_others_are_asked_about(tmp_path):
    """151,936 rows beside 152,064 of the same tokens, on a small scale; and a base that knows more than an expert."""
    write_model(tmp_path / "base", BASE, 6, seed=0)
    write_model(tmp_path / "x", BASE, 8, seed=1)
    write_model(tmp_path / "y", BASE[:3], seed=2)
    found, said = packed(tmp_path, said=True)
    base, x, y = (load_file(tmp_path / name / "model.safetensors")[HEAD].double() for name in ("base", "x", "y"))
    expected = torch.stack([base[i] + 0.5 * (x[i] - base[i] + ((y[i] - base[i]) if i < 3 else 0)) for i in range(4)])
    assert_close(at(found)[HEAD], torch.cat([expected, base[4:]]))
    assert "in 6 rows, of 6 and 8 and 3 before" in said and "the row of 'c' from base" in said
    write_model(tmp_path / "y", [*BASE, "<y>"], seed=2)
    with pytest.raises(ValueError, match="has 5 rows, in base .* 6. There are tokens that the base's tokenizer lacks: '<y>'"):
        packed(tmp_path)
    assert "'<y>' of its own left out" in packed(tmp_path, said=True, tokenizer="base")[1]


def test_models_of_one_vocabulary_are_read_as_they_are(tmp_path):
    """Rows without a token, too, and nothing is said."""
    for seed, name in enumerate(("base", "x", "y")):
        write_model(tmp_path / name, BASE, 6, seed=seed)
    plain = at(packed(tmp_path))
    for source in ("base", "union", tmp_path / "x"):
        found, said = packed(tmp_path, said=True, tokenizer=source)
        assert all(torch.equal(tensor, plain[name]) for name, tensor in at(found).items()) and not said


def test_rows_of_single_tokens(tmp_path):
    words = {"base": BASE, "x": [*BASE, "<x>"], "y": BASE}
    write(tmp_path, words)
    tokens = {
        "<x>": TokenRow("zero"),
        "b": TokenRow(tmp_path / "x", force=True),
        "<new>": TokenRow(tmp_path / "y", token="c"),
        "<number>": TokenRow(tmp_path / "x", token=4),
    }
    base, x, y = (load_file(tmp_path / name / "model.safetensors")[HEAD].double() for name in words)
    found = at(packed(tmp_path, tokenizer=TokenizerConfig("union", tokens=tokens, pad_to_multiple_of=4)))[HEAD]
    assert found.shape[0] == 8
    assert_close(found[2], x[2])  # of all models
    assert_close(found[4], 0.5 * x[4])  # the base and y have zeros
    assert_close(found[5], y[3])
    assert_close(found[6], x[4])
    assert_close(found[7], found[:7].double().mean(0))
    for wrong, message in (
        ({"q": TokenRow(tmp_path / "z")}, "'q': .*z is none of the merged models"),
        ({"<x>": TokenRow(tmp_path / "y")}, "'<x>': .*expert 'y' .* has no row for '<x>'"),
        ({"a": TokenRow(tmp_path / "x", token=5)}, "'a': expert 'x' .* has no row for 5 among its 5"),
    ):
        with pytest.raises(ValueError, match=message):
            packed(tmp_path, tokenizer=TokenizerConfig("union", tokens=wrong))


def test_a_token_that_no_model_has_is_said_to_be_of_zeros(tmp_path):
    write(tmp_path, {"base": BASE, "x": BASE, "y": BASE})
    write_tokenizer(tmp_path / "other", [*BASE, "<other>"])
    found, said = packed(tmp_path, said=True, tokenizer=tmp_path / "other")
    assert not at(found)[HEAD][4].any() and "no model has a row for '<other>', so that it is of zeros" in said


def test_numbers_with_gaps_take_no_more_tokens(tmp_path):
    gaps = {"?": 0, "a": 1, "b": 2, "c": 7}
    write(tmp_path, {"base": gaps, "x": {**gaps, "<x>": 8}, "y": gaps})
    with pytest.raises(ValueError, match="cannot be given '<x>': the numbers of 4 tokens have gaps"):
        packed(tmp_path, tokenizer="union")
    assert packed(tmp_path, tokenizer=tmp_path / "x").tokenizer.rows == 9


def test_special_tokens_that_stand_among_the_words_too(tmp_path):
    """As BERT's: the tokenizers library numbers what is added behind all words, these among them."""
    transformers = pytest.importorskip("transformers")
    write(tmp_path, {"base": BASE, "x": [*BASE, "<x>"], "y": BASE})
    for name in ("base", "x", "y"):
        file = tmp_path / name / "tokenizer.json"
        content = json.loads(file.read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        file.write_text(json.dumps(content | {"added_tokens": [{"id": 0, "content": "?", "special": True, **flags}]}))
    sm.task_arithmetic(packed(tmp_path, tokenizer="union"), 0.5).save_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<x>"] == 4


@pytest.mark.parametrize("form", ["vocab.txt", "vocab.json", "tokenizer.model"])
def test_older_tokenizers_are_read_and_given_tokens(tmp_path, form):
    write(tmp_path, {"base": BASE, "x": ["?", "b", "a", "c", "<x>"], "y": BASE})
    for name, words in {"base": BASE, "x": ["?", "b", "a", "c"], "y": BASE}.items():
        (tmp_path / name / "tokenizer.json").unlink()
        content = {
            "vocab.txt": "\n".join(words).encode(),
            "vocab.json": json.dumps({word: i for i, word in enumerate(words)}).encode(),
            "tokenizer.model": b"".join(b"\x0a" + bytes([len(w) + 2]) + b"\x0a" + bytes([len(w)]) + w.encode() for w in words),
        }[form]
        (tmp_path / name / form).write_bytes(content)
    (tmp_path / "x/added_tokens.json").write_text('{"<x>": 4}')
    found = packed(tmp_path, tokenizer="union")
    base, x = (load_file(tmp_path / name / "model.safetensors")[HEAD].double() for name in ("base", "x"))
    merged = found.state_dict(found.merge(found.one_hot("x")))[HEAD]
    for row, theirs in enumerate((0, 2, 1, 3, 4)):
        assert_close(merged[row], x[theirs])
    sm.task_arithmetic(found, 0.5).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/added_tokens.json").read_text()) == {"<x>": 4}
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]["4"]["content"] == "<x>"


def test_a_sentencepiece_model_of_moved_numbers_is_refused(tmp_path):
    write(tmp_path, {"base": BASE, "x": [*BASE, "<x>"], "y": BASE})
    (tmp_path / "x/tokenizer.json").rename(tmp_path / "x/sentencepiece.bpe.model")
    with pytest.raises(ValueError, match="sentencepiece.bpe.model does not tell the numbers of all tokens; write a"):
        packed(tmp_path, tokenizer="union")


def test_any_range_of_numbers_is_that_of_the_whole(tmp_path):
    """Pieces that begin and end within rows, of one's own, of others', of means and of padding."""
    write(tmp_path, {"base": BASE, "x": ["?", "b", "a", "x1", "both"], "y": ["?", "a", "both"]})
    config = TokenizerConfig("union", missing="mean", pad_to_multiple_of=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from samerge_ext.packing.opened import opened_models

        with opened_models(tmp_path / "base", {name: tmp_path / name for name in "xy"}, None, config) as (base, experts, _):
            for source in (base, *(expert for _, expert in experts)):
                whole = source.read(EMBEDDINGS).flatten()
                for start in range(0, whole.numel(), 7):
                    for length in (1, 9, whole.numel() - start):
                        out = torch.empty(min(length, whole.numel() - start))
                        source.read_into(EMBEDDINGS, start, out)
                        assert torch.equal(out, whole[start : start + len(out)])


def test_an_interrupted_merge_begins_anew_with_another_tokenizer(tmp_path):
    """What rows are told by is an input: it is watched as the weights are."""
    from samerge_ext.packing.opened import opened_models

    write(tmp_path, {"base": BASE, "x": [*BASE, "x1"], "y": BASE})
    with pytest.warns(VocabularyNote):
        with opened_models(tmp_path / "base", {"x": tmp_path / "x"}, None, TokenizerConfig("union")) as (base, _, _):
            assert {file.name for file in base.files} == {"model.safetensors", "tokenizer.json"}
