"""Convert a checkpoint of Open-Qwen2VL, a file that torch.save wrote, to a folder that headrace runs: config.json,
safetensors and the tokenizer. The file's pickle is read, not run: code in it is refused."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.console import import_numpy
from headrace.core.errors import CheckpointError, InvalidParameter, WeightsMismatch, shorten

if TYPE_CHECKING:
    from headrace.weights.torch_file import StoredTensor

SIGLIP: Mapping[str, object] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "feature_block": 25,
}
"""The vision tower, timm's vit_so400m_patch14_siglip_384: the file does not say its number of heads. Its features are
those of the last block but one."""
PARTS = ("vision_backbone", "projector", "llm_backbone")
OPTIMIZER = "optimizer"
PROMPT_FORMS = ("train", "cli", "raw")
QUERIES = 729
ADDED = ("<|endofchunk|>", "<s>")
"""Tokens that the model's own code adds to its decoder's, in this order."""
IDS: Mapping[str, str] = {"image_token_id": "<|image_pad|>", "bos_token_id": "<s>", "eos_token_id": "<|im_end|>"}
TOKENIZER = "tokenizer.json"
COPIED = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""Copied where they are; what else a tokenizer may have is in `TOKENIZER` as well."""
DTYPES: Mapping[str, str] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_TOKENIZER = 256 * 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN.pt", type=Path, help="The checkpoint, as torch.save wrote it.")
    parser.add_argument("out", metavar="OUT", type=Path, help="The folder to make; it must not be there, or be empty.")
    parser.add_argument(
        "--decoder",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="The language model that it was trained from (Qwen2.5-1.5B-Instruct): config.json and the tokenizer's "
        "files are taken from there; the tokens that Open-Qwen2VL adds are added where they are missing.",
    )
    parser.add_argument(
        "--query-num",
        metavar="N",
        type=int,
        default=QUERIES,
        help="Tokens that an image becomes, a square number: 729 for the instruct model, 144 for the base model. "
        f"Default: {QUERIES}.",
    )
    parser.add_argument(
        "--prompt-form",
        choices=PROMPT_FORMS,
        default=PROMPT_FORMS[0],
        help="How the model is told a conversation: as in training, as its own command line does, or the text as it "
        f"is. Default: {PROMPT_FORMS[0]}.",
    )


def run(arguments: argparse.Namespace) -> int:
    import_numpy(os.environ)
    print(convert(arguments.source, arguments.out, arguments.decoder, arguments.query_num, arguments.prompt_form))
    return 0


def convert(
    source: Path,
    out: Path,
    decoder: Path,
    query_num: int = QUERIES,
    prompt_form: str = PROMPT_FORMS[0],
    vision: Mapping[str, object] = SIGLIP,
) -> str:
    """Writes the folder `out`; returns what was done, for a reader. `vision`: `vision_config` of config.json.

    `out` is there only when it is whole. Raises InvalidParameter, CheckpointError, UnsupportedModel or WeightsMismatch
    before anything is written; OSError where the disk does.
    """
    from headrace.models.registry import describe
    from headrace.weights.checkpoint import read_json
    from headrace.weights.loader import stream
    from headrace.weights.safetensors_writer import write_safetensors
    from headrace.weights.torch_file import TorchCheckpoint, TorchFile

    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidParameter("OUT", str(out), "a folder that is not there, or is empty")
    file = TorchFile(source)
    text_config = read_json(decoder / "config.json")
    tensors = _without_tied_head(read_parts(file.root, shorten(source.name)), text_config)
    tokenizer, ids = read_tokenizer(decoder / TOKENIZER)
    config = {
        "architectures": ["OpenQwen2VL"],
        "model_type": "open_qwen2vl",
        "vision_config": dict(vision),
        "projector": {"type": "avgpool", "layers": 2, "query_num": query_num},
        "text_config": text_config,
        **ids,
        "prompt_form": prompt_form,
        "dtype": _usual_dtype(tensors),
    }
    checkpoint = TorchCheckpoint(file, config, tensors)
    weight_map = describe(config, "hf", checkpoint.shapes()).weight_map
    stream(checkpoint, weight_map)  # compares every name and shape; nothing is read yet
    used = dict.fromkeys(name for rule in weight_map.rules for name in rule.sources)
    weights = {name: checkpoint.tensor(name) for name in used}

    partial = out.with_name(f"{out.name}.partial")
    partial.mkdir(parents=True)
    try:
        write_safetensors(
            partial / "model.safetensors", weights, {"format": "pt"}, lambda name: checkpoint.drop_pages()
        )
        (partial / TOKENIZER).write_text(tokenizer, encoding="utf-8")
        for name in COPIED:
            if (decoder / name).is_file():
                shutil.copyfile(decoder / name, partial / name)
        (partial / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    mib = sum(weight.nbytes for weight in weights.values()) / 2**20
    unused = len(tensors) - len(weights)
    return f"{out}: {len(weights)} tensors, {mib:.1f} MiB; left out: {unused} tensors that no answer depends on"


def read_parts(root: object, where: str) -> dict[str, StoredTensor]:
    """The model's tensors, under their part's name and their own. Raises CheckpointError, WeightsMismatch."""
    from headrace.weights.torch_file import StoredTensor

    if not isinstance(root, dict) or not isinstance(root.get("model"), dict):
        raise CheckpointError(f"{where}: holds no dictionary `model`, which a checkpoint of Open-Qwen2VL is")
    model = root["model"]
    for name, holder in (("", root), ("model", model)):
        allowed = PARTS if name else ("model", OPTIMIZER)
        if surplus := sorted(shorten(key) for key in holder if key not in allowed):
            raise WeightsMismatch(f"{where}: left over beside {', '.join(allowed)}: {', '.join(surplus[:5])}")
    if missing := [part for part in PARTS if not isinstance(model.get(part), dict)]:
        raise WeightsMismatch(
            f"{where}: missing: {', '.join(missing)}; needed: {', '.join(PARTS)} (a part that was not trained may not "
            "have been saved: join it in with torch first)"
        )
    tensors: dict[str, StoredTensor] = {}
    for part in PARTS:
        for key, tensor in model[part].items():
            if not isinstance(key, str) or not isinstance(tensor, StoredTensor):
                raise CheckpointError(f"{where}: {part}: {shorten(key)} is a {type(tensor).__name__}, not a tensor")
            tensors[f"{part}.{key}"] = tensor
    return tensors


def _without_tied_head(tensors: dict[str, StoredTensor], text_config: Mapping[str, object]) -> dict[str, StoredTensor]:
    """A head that is the embedding once more is left out, where the decoder's config ties the two."""
    import numpy as np

    for decoder in ("llm_backbone.llm.", "llm_backbone."):
        head, embedding = tensors.get(decoder + HEAD), tensors.get(decoder + EMBEDDING)
        if text_config.get("tie_word_embeddings") is not True or head is None or embedding is None:
            continue
        if head.kind == embedding.kind and np.array_equal(head.data, embedding.data):
            return {name: tensor for name, tensor in tensors.items() if name != decoder + HEAD}
    return tensors


def _usual_dtype(tensors: Mapping[str, StoredTensor]) -> str:
    """Of most numbers: what config.json calls the model's type."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.kind] += tensor.data.size
    return DTYPES.get(max(counts, key=lambda kind: counts[kind], default=""), "float32")


def read_tokenizer(path: Path) -> tuple[str, dict[str, int]]:
    """tokenizer.json with `ADDED` among its tokens, and `IDS` as config.json has them. Raises CheckpointError."""
    from tokenizers import AddedToken, Tokenizer

    from headrace.weights.files import read_file

    data = read_file(path, MAX_TOKENIZER)
    try:
        raw = Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and PanicException, a BaseException
        raise CheckpointError(f"{TOKENIZER}: {shorten(str(error), 160)}") from None
    missing = [text for text in ADDED if raw.token_to_id(text) is None]
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
    ids = {}
    for key, text in IDS.items():
        token_id = raw.token_to_id(text)
        if token_id is None:
            raise CheckpointError(f"{TOKENIZER}: no token {text}, which a prompt of this model needs ({key})")
        ids[key] = token_id
    return raw.to_str(), ids
