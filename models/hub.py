"""Hugging Face checkpoint folders, in and out.

`save` writes what `AutoModelForCausalLM` and `AutoTokenizer` open with no remote code: config.json,
model.safetensors, generation_config.json and the tokenizer's files. `load` reads such a folder of
type llama, qwen2, qwen3, smollm3, gpt2 or ponder, and refuses by name whatever a GPT would compute
differently. Neither needs Transformers.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import layout
from .config_json import from_fields, model_type, to_fields
from .gpt import GPT, GPTConfig

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
SHARD_BYTES = 5_000_000_000
QWEN2_SPLIT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"  # in the tokenizer.json of Qwen's own models
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_FILES = ["config.json", GENERATION, "tokenizer.json", "*.safetensors", INDEX]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GPT:
    """The GPT in a Hugging Face folder (model_type llama, qwen2, qwen3, smollm3, gpt2 or ponder).

    path: a folder, or the id of a model on the Hugging Face hub, fetched at the first use. dtype:
    that of the parameters (default: what the embedding is stored in); device: default the CPU.
    Weights are read from safetensors alone, whole or in shards; every name and shape is checked
    before any is read.

    Raises ValueError for a folder that is missing, broken or incomplete, holds pickled or quantized
    weights, or says anything in config.json that a GPT does not express; for another dtype.
    """
    _check_dtype(dtype)
    folder = _folder(path, HUB_FILES)
    config = load_config(folder)
    kind = model_type(config)
    with shapes_alone():
        model = GPT(config)
    expected = {n: t.shape for n, t in layout.to_checkpoint(kind, model.state_dict()).items()}
    state = read_tensors(folder, expected, config, dtype=dtype, device=device)
    embedding = state[layout.embedding(kind)]
    head = state.get(layout.HEAD, embedding) if config.tie_embeddings else embedding
    if head is not embedding and not head.allclose(embedding, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"{folder}: lm_head.weight is not {layout.embedding(kind)}, yet config.json has "
            "tie_word_embeddings true"
        )
    state[layout.HEAD] = embedding if config.tie_embeddings else state[layout.HEAD]
    model.load_state_dict(layout.from_checkpoint(kind, state), assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.rotary.reset(embedding.device)
    return model


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, *FLOATS.values()):
        known = ", ".join(str(known) for known in FLOATS.values())
        raise ValueError(f"dtype is {dtype}; weights can be {known}")


class NotAGPT(ValueError):
    """A folder's config.json asks for a model that GPT does not compute."""


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules that are made here have tensors without memory, on the meta device."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """No initial numbers for tensors that hold none: the first `normal_` on the meta device would
    import all of torch.compile, which takes a second or two."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.normal_, torch.nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_tensors(
    folder: Path,
    expected: Mapping[str, torch.Size],
    config: GPTConfig,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> dict[str, Tensor]:
    """The tensors of a folder under their standard names, every name and shape checked first.

    expected: the shapes by name. dtype None: what the embedding is stored in; errors as `load`'s.
    """
    files = _weight_files(folder)
    names, stored = _check(folder, files, expected, config)
    dtype = stored if dtype is None else dtype
    state = {}
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if (
                    names[name] in expected
                ):  # a copy: what get_tensor gives stays a view of the file
                    state[names[name]] = tensors.get_tensor(name).to(device, dtype, copy=True)
    return state


def load_config(path: str | os.PathLike[str]) -> GPTConfig:
    """The shape of the GPT in a Hugging Face folder, from its config.json; errors as `load`'s,
    `NotAGPT` where the file is one and says something else."""
    source = _folder(path, ["config.json"]) / "config.json"
    inside = sorted(source.parent.glob("*/config.json"))  # a demo's model, say
    if inside and not source.is_file():
        raise ValueError(f"{source.parent} is no checkpoint; {inside[0].parent} is one")
    kind = ValueError
    try:
        fields = read_json(source)
        kind = NotAGPT
        return from_fields(fields)
    except ValueError as error:
        raise kind(f"{source}: {error}") from None


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, from its tokenizer.json; ValueError where none is."""
    file = _folder(path, ["tokenizer.json"]) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"there is no {file}")
    return read_tokenizer(file)


def read_tokenizer(file: Path) -> Tokenizer:
    """Of a tokenizer.json; ValueError where it is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer: {first_line(error)}") from None


def load_ends(path: str | os.PathLike[str], tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text (a chat model may have several): what the folder's
    generation_config.json, config.json and tokenizer_config.json name, or the tokenizer's <eos>.
    ValueError where they name what is no token."""
    files = [GENERATION, "config.json", SETTINGS]
    folder, found = _folder(path, files), set()
    for name in files:
        key = "eos_token" if name == SETTINGS else "eos_token_id"
        said = read_settings(folder / name).get(key)
        for token in said if isinstance(said, list) else [said]:
            if isinstance(token, dict):  # a token with its properties
                token = token.get("content")
            if isinstance(token, str):
                token = tokenizer.token_to_id(token)
            elif token is not None and type(token) is not int:
                raise ValueError(f"{folder / name}: {key} is {said!r}; it names a token or several")
            found.add(token)
    if found <= {None}:
        found = {tokenizer.token_to_id("<eos>")}
    return tuple(sorted(token for token in found if token is not None))


def load_template(path: str | os.PathLike[str]) -> str | None:
    """The chat template (Jinja) of a Hugging Face folder's tokenizer; None where it has none,
    ValueError where it is no template."""
    folder = _folder(path, [TEMPLATE, SETTINGS])
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    template = read_settings(folder / SETTINGS).get("chat_template")
    try:
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str | None):
            raise TypeError
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder / SETTINGS}: chat_template is neither a template nor a list of named ones"
        ) from None
    return template


def _folder(path: str | os.PathLike[str], files: list[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; a checkpoint is a folder")
    if not HUB_ID.fullmatch(str(path)):
        raise ValueError(f"there is no folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        ignored = ["*/*", "consolidated*"]
        return Path(snapshot_download(str(path), allow_patterns=files, ignore_patterns=ignored))
    except Exception as error:  # no network, no such model, no permission: all are told alike
        raise ValueError(
            f"there is no folder {folder}, and no model of that name could be fetched from the "
            f"Hugging Face hub: {first_line(error)}"
        ) from None


def first_line(error: BaseException) -> str:
    """The gist of another library's error, on one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where there is none."""
    if not file.is_file():
        raise ValueError("there is no such file")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"this is not JSON: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError("this is not a JSON object")
    return content


def read_settings(file: Path) -> dict[str, Any]:
    """What a JSON file says that a folder may lack; ValueError where it is no object."""
    if not file.is_file():
        return {}
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{folder} holds pickled weights ({pickled[0]}), which can run any code when they "
                f"are read; only safetensors is read"
            )
        raise ValueError(f"there is neither {WEIGHTS} nor {INDEX} in {folder}")
    try:
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError("it holds no weight_map")
        names = {str(name) for name in shards.values()}
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{name!r} is not the name of a shard beside it")
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None
    return [folder / name for name in sorted(names)]


def _check(
    folder: Path, files: list[Path], expected: Mapping[str, torch.Size], config: GPTConfig
) -> tuple[dict[str, str], torch.dtype]:
    """Compare the files' headers with what the model needs; the standard name of each tensor in
    them, and the embedding's stored dtype."""
    found: dict[str, tuple[torch.Size, str]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"the shard {file} is missing")
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():
                    part = tensors.get_slice(name)
                    found[name] = torch.Size(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or not safetensors: {error}") from None
    kind = model_type(config)
    names = layout.standard_names(kind, found)
    found = {names[name]: header for name, header in found.items()}
    optional = {layout.HEAD} if config.tie_embeddings else set()
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [n for n in found if n not in expected and not layout.DERIVED.fullmatch(n)]
    faults = []
    if missing:
        faults.append(f"lacks {_listed(missing)} that its config.json asks for")
    if extra:
        faults.append(f"holds {_listed(extra)} that a {kind} model does not have")
    if faults:
        raise ValueError(f"{folder} {' and '.join(faults)}")
    wrong = [
        f"{name} is {tuple(found[name][0])} and not {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name][0] != shape
    ]
    if wrong:
        raise ValueError(f"{folder}: other shapes than config.json says for {_listed(wrong)}")
    packed = [f"{n} in {found[n][1]}" for n in expected if n in found and found[n][1] not in FLOATS]
    if packed:
        raise ValueError(f"{folder} is quantized, which is not read: it holds {_listed(packed)}")
    return names, FLOATS[found[layout.embedding(kind)][1]]


def _listed(names: list[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(names[:3])}{more})"


def save(
    model: GPT,
    path: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype = torch.float32,
    eos: str = "<eos>",
    bos: str | None = None,
    template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a Hugging Face folder; returns a sentence that says what opens it.

    The folder is written aside and renamed, so that a reader never sees half of it; into a folder
    that exists, file by file, and whatever else is in there stays. Without a tokenizer, that of the
    folder stays, and what the folder says of where its texts end. dtype: that of the weights on
    disk. eos: the special token of the tokenizer that ends a text; bos: the one that begins it, if
    one does; template: the tokenizer's chat template (Jinja), which chat with the model in vLLM or
    Transformers needs. Weights above shard_bytes are split into shards.

    Raises ValueError for a tokenizer with more tokens than the model, a template or bos without a
    tokenizer, a wrapped model, one with other parameters than its config says (adapters), or a
    dtype that weights cannot have.
    """
    path = Path(path)
    if not isinstance(model, GPT):
        raise ValueError(f"only a GPT can be saved, not a {type(model).__name__}: unwrap it first")
    _check_dtype(dtype)
    for name, given in (("bos", bos), ("template", template)):
        if given is not None and tokenizer is None:
            raise ValueError(f"{name} is {given[:40]!r}, and no tokenizer is given to save it with")
    config, kind = model.config, model_type(model.config)
    with shapes_alone():
        check_parameters(model, GPT(config))
    state, fields = checkpoint(model, kind, dtype), to_fields(config)
    spoken: dict[str, Any] = dict(eos=eos, bos=bos, template=template)
    write_folder(path, state, config, fields, tokenizer, **spoken, shard_bytes=shard_bytes)
    if kind == "ponder":
        return (
            f"{path} has model_type ponder, as no standard type expresses this model: "
            "AutoModelForCausalLM opens it after ponder.models.register()"
        )
    said = f"{path} has model_type {kind}: AutoModelForCausalLM opens it"
    if kind == "qwen2" and tokenizer is not None and QWEN2_SPLIT not in tokenizer.to_str():
        # Transformers 5 sets its own splitting of text for this type, whatever is in the folder.
        said += "; PreTrainedTokenizerFast opens the tokenizer (AutoTokenizer takes it for Qwen2's)"
    return said


def write_folder(
    path: Path,
    state: dict[str, Tensor],
    config: GPTConfig,
    fields: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    *,
    eos: str,
    bos: str | None = None,
    template: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the tensors of `state` in their shapes, `fields` as config.json, and the tokenizer
    aside, then rename; see `save`, errors as there."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a checkpoint is a folder")
    highest = -1 if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {highest}; the model has only {config.vocab_size} tokens"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # Inside a folder that exists, which may be a mount: a rename does not cross file systems.
    aside = (path if path.is_dir() else path.parent) / f".{path.name}.saving"
    shutil.rmtree(aside, ignore_errors=True)  # of a save that was killed
    aside.mkdir()
    dtype = next(iter(state.values())).dtype
    try:
        _write_weights(aside, state, shard_bytes, path)
        _write_settings(aside, path, config, fields, dtype, tokenizer, bos, eos)
        if tokenizer is not None and template is not None:
            (aside / TEMPLATE).write_text(template, encoding="utf-8")
        for file in aside.iterdir():
            # safetensors makes files that only their owner can read
            shutil.copymode(aside / "config.json", file)
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if path.is_dir():
            _move(aside, path)
        else:
            aside.rename(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_parameters(model: nn.Module, plain: nn.Module) -> None:
    """ValueError where the model has other parameters, or ties others, than a plain one has."""
    # A shared parameter is named once, by the first of its names.
    found, expected = ({n: p.shape for n, p in m.named_parameters()} for m in (model, plain))
    wrong = [name for name in expected | found if found.get(name) != expected.get(name)]
    if wrong:
        raise ValueError(
            f"the model is not what its config says in {_listed(wrong)}; adapters must be merged, "
            "and parametrizations removed, before it is saved"
        )


def checkpoint(model: GPT, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A GPT's parameters on the CPU under the names of model type `kind` in its shapes, in `dtype`,
    a tied head left out."""
    state = {  # named_parameters names a shared parameter once
        name: p.detach().to("cpu", dtype).contiguous() for name, p in model.named_parameters()
    }
    return layout.to_checkpoint(kind, state)


def _write_weights(aside: Path, state: dict[str, Tensor], shard_bytes: int, path: Path) -> None:
    if sum(t.numel() * t.element_size() for t in state.values()) <= shard_bytes:
        return save_file(state, aside / WEIGHTS, {"format": "pt"})
    from huggingface_hub import split_torch_state_dict_into_shards

    # A name that the present shards do not have: the new index replaces them all at once.
    present = (path / INDEX).read_text(encoding="utf-8") if (path / INDEX).is_file() else ""
    stem = "model-b" if '"model-0' in present else "model"
    split = split_torch_state_dict_into_shards(
        state, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, aside / file, {"format": "pt"})
    _write_json(aside / INDEX, dict(metadata=split.metadata, weight_map=split.tensor_to_filename))


def _write_settings(
    aside: Path,
    path: Path,
    config: GPTConfig,
    fields: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
    bos: str | None,
    eos: str,
) -> None:
    """config.json, generation_config.json, and the tokenizer's files where there is one."""
    begin = end = None
    if tokenizer is not None:
        special = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        begin, end = (
            tokenizer.token_to_id(token) if token in special else None for token in (bos, eos)
        )
        roles = dict(bos_token=bos, eos_token=eos, pad_token=eos, unk_token="<unk>")
        roles = {role: token for role, token in roles.items() if token in special}
        text = tokenizer.to_str(pretty=True)  # tokenizers raises no OSError on a full disk
        (aside / "tokenizer.json").write_text(text, encoding="utf-8")
        _write_json(aside / "special_tokens_map.json", roles)
        _write_json(
            aside / SETTINGS,
            dict(
                tokenizer_class="PreTrainedTokenizerFast",  # what tokenizer.json says, no more
                model_max_length=config.context,
                clean_up_tokenization_spaces=False,
                **roles,
            ),
        )
    tokens = dict(bos_token_id=begin, eos_token_id=end, pad_token_id=end)
    if tokenizer is None:  # the tokenizer that is there, if one is, stays
        with suppress(ValueError):
            present = read_settings(path / "config.json")
            tokens = {name: present.get(name) for name in tokens}
    name = str(dtype).removeprefix("torch.")
    _write_json(aside / "config.json", dict(fields) | tokens | dict(dtype=name))
    if tokenizer is not None or not (path / GENERATION).is_file():
        _write_json(aside / GENERATION, tokens | dict(do_sample=False))


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move(aside: Path, path: Path) -> None:
    """Put every new file in its place, config.json last, then remove the old weights' files."""
    old = {p.name for p in (*path.glob(WEIGHTS), *path.glob(INDEX))}
    old |= {p.name for p in path.glob("model-*-of-*.safetensors")}
    new = {p.name for p in aside.iterdir()}
    # Shards before their index.
    for name in sorted(new, key=lambda n: (not n.endswith(".safetensors"), n == "config.json")):
        os.replace(aside / name, path / name)
    # The single file first: readers prefer it, so until it goes they would read the old weights.
    for name in sorted(old - new, key=lambda n: (n != WEIGHTS, n != INDEX)):
        (path / name).unlink()


def register() -> None:
    """Tell Transformers what is ours: `AutoConfig` and `AutoModelForCausalLM` open folders of
    model_type ponder, and every model takes attn_implementation="ponder"."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from . import hf_attention
    from .auto import PonderConfig, PonderForCausalLM

    AutoConfig.register("ponder", PonderConfig, exist_ok=True)
    AutoModelForCausalLM.register(PonderConfig, PonderForCausalLM, exist_ok=True)
    hf_attention.register()
