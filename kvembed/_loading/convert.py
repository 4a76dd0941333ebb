"""GGUF files turned once into folders that transformers reads fast, on disk in float32.

Why convert at all: transformers can read a GGUF file directly, but takes 10 to 50 s to dequantise it and
to rebuild the tokenizer, at every start. Why float32: a dequantised weight is a scale times an integer,
plus an offset, which neither float16 nor bfloat16 holds exactly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvembed._errors import ConfigError
from kvembed._loading.gguf import read_gguf_metadata
from kvembed._loading.progress import quiet
from kvembed._paths import make_private_dir, models_dir
from kvembed._units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvembed._loading.progress import ProgressCallback

__all__ = ["CONVERSION", "converted_dir", "is_converted", "make_once", "require_gguf", "write_converted"]

CONVERSION = 1
"""Raised whenever the same GGUF file would give another folder, so that old folders are not used."""

_MARKER = "kvembed.json"
_STEPS = 3

# llama.cpp's names of pre-tokenizers that cut out every digit and then split like GPT-2. transformers
# (5.23) knows other names but not these, and splits like GPT-2 only. It shows on numerals such as "½" or
# "²", which then join the letters beside them.
_DIGIT_PRE_TOKENIZERS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}

# A GGUF file names one end token, and some chat models end a turn with another.
_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")


def converted_dir(name: str, sha256: str) -> Path:
    """Return the folder of a converted GGUF file with this checksum."""
    return models_dir() / f"{name}-{sha256[:16]}-v{CONVERSION}"


def is_converted(folder: Path) -> bool:
    """Return True when ``folder`` is a finished conversion."""
    return (folder / _MARKER).is_file()


def require_gguf(what: str) -> None:
    """Raise `ConfigError` when the ``gguf`` extra is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"{what} comes as a GGUF file, which needs one more package: pip install 'kvembed[gguf]'")


def make_once(folder: Path, build: Callable[[Path], Path]) -> None:
    """Make ``folder`` with ``build``, in one process at a time, so that it is either absent or whole.

    Args:
        folder: The finished folder.
        build: Given an empty folder for its work, returns the folder inside that is moved into place.

    Raises:
        ConfigError: The folder of models cannot be written, or its disk is full.
    """
    if is_converted(folder):
        return
    import filelock

    try:
        parent = make_private_dir(folder.parent)
        lock = filelock.FileLock(parent / f".{folder.name}.lock", mode=0o600)
        with lock:
            if is_converted(folder):
                return  # another process made it while this one waited
            # Whoever made these is gone: it would hold the lock.
            for left in parent.glob(f".{folder.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=parent))
            try:
                done = build(work)
                _sync(done)
                if folder.exists():
                    folder.replace(work / "unfinished")
                done.replace(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write models to {folder.parent}: {error}. Free some space there, or set KVEMBED_MODELS_DIR."
        ) from error


def _sync(folder: Path) -> None:
    # Without it a power cut after the rename may leave a finished folder of empty files.
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def write_converted(
    gguf: Path, into: Path, *, title: str, source: dict[str, Any], on_progress: ProgressCallback
) -> Path:
    """Write the model and tokenizer of a GGUF file to the folder ``into``, in Hugging Face format.

    Args:
        gguf: The file.
        into: A folder to create.
        title: What the model is called in errors.
        source: Recorded in the folder, next to the versions used.
        on_progress: Told of the steps.

    Returns:
        ``into``.

    Raises:
        ConfigError: The file is damaged, of an architecture that transformers cannot read, or too large
            for the disk.
    """
    require_gguf(title)
    metadata = read_gguf_metadata(gguf)
    on_progress("convert", 0, _STEPS)
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name}
    with quiet(), _no_gguf_bar():
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **options)
            on_progress("convert", 1, _STEPS)
            # Older releases dequantise without being told to, and lack the class.
            if (config_class := getattr(transformers, "GgufConfig", None)) is not None:
                options["quantization_config"] = config_class(dequantize=True)
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), dtype=torch.float32, output_loading_info=True, **options
            )
            model, report = loaded
        except Exception as error:
            architecture = metadata.get("general.architecture", "unknown")
            raise ConfigError(
                f"{title}: transformers {transformers.__version__} cannot read this GGUF file "
                f"(architecture {architecture!r}): {error}. Use the model's hub id or a folder in Hugging Face format."
            ) from error
        # transformers fills weights that it does not find with random numbers, and only logs it.
        if missing := sorted(report["missing_keys"]):
            raise ConfigError(f"{title}: the GGUF file lacks {len(missing)} weights, such as {missing[0]}")
        on_progress("convert", 2, _STEPS)
        _fix_tokenizer(tokenizer, metadata)
        _fix_model(model, tokenizer)
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        into.mkdir()
        if (free := shutil.disk_usage(into).free) < needed * 1.05:
            raise ConfigError(
                f"{title}: converted it takes {format_bytes(needed)}, and the disk of {into.parent.parent} has "
                f"{format_bytes(free)} free. Free some space, or set KVEMBED_MODELS_DIR to a folder on another disk."
            )
        tokenizer.save_pretrained(str(into))
        model.save_pretrained(str(into))
    from kvembed import __version__

    record = source | {"conversion": CONVERSION, "kvembed": __version__, "transformers": transformers.__version__}
    (into / _MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    on_progress("convert", _STEPS, _STEPS)
    return into


def _fix_tokenizer(tokenizer: Any, metadata: dict[str, Any]) -> None:
    if metadata.get("tokenizer.ggml.model") == "gpt2" and metadata.get("tokenizer.ggml.pre") in _DIGIT_PRE_TOKENIZERS:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # Without this the length is 10**30, and a prompt that is too long is not noticed.
    if length := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        tokenizer.model_max_length = int(length)
    for leftover in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
        tokenizer.init_kwargs.pop(leftover, None)


def _fix_model(model: Any, tokenizer: Any) -> None:
    import transformers

    vars(model.config).pop("_model_name_or_path", None)
    ends = [model.config.eos_token_id]
    if template := tokenizer.chat_template:
        vocabulary = tokenizer.get_vocab()
        ends += [vocabulary[token] for token in _TURN_ENDS if token in template and token in vocabulary]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    # A fresh one: the one made from the model's config is marked as such, and is made anew at every call.
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=model.config.pad_token_id,
    )


@contextlib.contextmanager
def _no_gguf_bar() -> Iterator[None]:
    # transformers' older GGUF reader, which most architectures still go through, draws a tqdm bar that its
    # own switch does not reach. Redirecting stderr would also swallow what other threads print.
    try:
        module: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        bar = module.tqdm
    except (ImportError, AttributeError):
        yield
        return
    module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar
