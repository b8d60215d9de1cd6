"""Weight files: reading and writing them whole, and loading them strictly into modules.

A full checkpoint holds its weights in `model.safetensors`, in shards named by `model.safetensors.index.json`, or in
`pytorch_model.bin` (one file or shards). Single files are `.safetensors` or `.bin` (a dict written by `torch.save`)
by their ending. Files appear under their name only when they are complete.
"""

import glob
import json
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# In the order they are looked for.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


ABANDONED = 24 * 3600  # seconds since a temporary file was written to: its writer, here or on another machine, is gone


class CheckpointError(ValueError):
    """A checkpoint that isn't what was asked for, or can't be read."""


@contextmanager
def checkpoint_errors(source: str | Path) -> Iterator[None]:
    """Whatever the contents of `source` (a file, a folder, a hub name) raise, as a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())  # one line
        raise CheckpointError(f"{source}: cannot be used ({type(error).__name__}: {reason})") from error


@contextmanager
def written_atomically(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it only if the block succeeds.

    It lies in a hidden folder of this writer's own, together with the temporary files of libraries (safetensors). The
    file is as readable as any other that is made there. What a writer that was killed a day ago has left goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    private = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    temporary = private / path.name
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors puts a private file in its place
            with suppress(OSError):  # a mount that refuses chmod: the file is as private as it lets it be, but whole
                temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(private, ignore_errors=True)  # what can't go now goes with a later write


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files and folders of `path` that nobody has written to for a day."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # gone meanwhile, or another user's: no reason for a write to fail
            if time.time() - max(file.stat().st_mtime for file in (left, *left.rglob("*"))) > ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def read_tensors(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a `.safetensors` or `.bin` file; on device "meta" their shapes and dtypes only, no data is read.

    Raises:
        CheckpointError: missing, damaged, another ending, or a `.bin` that holds more than a dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if device == "cpu" else _safetensors_header(path)
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path}: not a readable weight file ({error})") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(tensors).__name__}")
    return tensors


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        return {
            key: torch.empty(entry.get_shape(), dtype=SAFETENSORS_DTYPES[entry.get_dtype()], device="meta")
            for key, entry in slices.items()
        }


def write_tensors(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` or `.bin` file, atomically. Raises CheckpointError for another ending."""
    path = Path(path)
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(f"{path}: the name of a weight file ends with .safetensors or .bin")
    owned = {key: _owned(tensor) for key, tensor in tensors.items()}
    with written_atomically(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(owned, temporary, metadata={"format": "pt"})
        else:
            torch.save(owned, temporary)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory of its own (views of a larger buffer would be written whole)."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


Convert = Callable[[str, Tensor], dict[str, Tensor]]


def read_converted(path: str | Path, convert: Convert) -> dict[str, Tensor]:
    """As `read_tensors`, but each tensor is passed through `convert` as it is read, and let go before the next one.

    convert: key and tensor -> what to keep of it, in memory of its own.
    """
    path = Path(path)
    kept: dict[str, Tensor] = {}
    if path.suffix != ".safetensors":
        for key, tensor in read_tensors(path).items():
            kept |= convert(key, tensor)
        return kept
    for key in read_tensors(path, "meta"):
        with safe_open(path, framework="pt") as file:  # opened anew: what was mapped leaves memory with the mapping
            kept |= convert(key, file.get_tensor(key))
    return kept


def read_weights(folder: str | Path, device: str = "cpu", convert: Convert | None = None) -> dict[str, Tensor]:
    """All tensors of a folder in the published layout; on device "meta" without their data.

    convert: what to keep of each tensor, see `read_converted`.

    Raises:
        CheckpointError: no weights, a broken index, a shard that is missing or lacks tensors of the index, or see
            `read_tensors`.
    """
    found = [Path(folder) / name for name in WEIGHT_FILES if (Path(folder) / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")

    def read(path: Path) -> dict[str, Tensor]:
        return read_tensors(path, device) if convert is None else read_converted(path, convert)

    if found[0].suffix != ".json":
        return read(found[0])
    with checkpoint_errors(found[0]):
        index = dict(json.loads(found[0].read_text())["weight_map"])
    tensors = {}
    for shard in sorted(set(index.values())):
        tensors |= read(Path(folder) / shard)
    lost = sorted(set(index) - set(tensors))
    if lost:
        raise CheckpointError(f"{found[0]}: in none of the shards it names: {', '.join(lost)}")
    return tensors


def write_weights(tensors: dict[str, Tensor], folder: Path, max_shard_size: int | str = "5GB") -> None:
    """Write `model.safetensors`, or shards with their index, and remove weights that were there before.

    An older index goes before shards of its names are written, so that nobody reads a mixture after an interruption.
    """
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    patterns = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin", "*.index.json")
    if plan.is_sharded:
        for index in folder.glob("*.index.json"):
            index.unlink()
    stale = {file for pattern in patterns for file in folder.glob(pattern)}
    for name, keys in plan.filename_to_tensors.items():
        write_tensors({key: tensors[key] for key in keys}, folder / name)
        stale.discard(folder / name)
    for file in stale:
        file.unlink()
    if plan.is_sharded:
        write_json({"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}, folder / WEIGHT_FILES[1])


def read_config(folder: Path) -> dict[str, Any]:
    """The values in a folder's config.json, none where there is no such file. Raises CheckpointError: damaged."""
    file = folder / "config.json"
    with checkpoint_errors(file):
        return dict(json.loads(file.read_text())) if file.is_file() else {}


def write_json(value: Any, path: Path) -> None:
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def misfitting(tensors: dict[str, Tensor], wanted: dict[str, Tensor], optional: Iterable[str] = ()) -> str:
    """Every missing, unexpected and wrongly shaped key of `tensors`, as a text; "" where they are the wanted ones."""
    expected = {key: list(tensor.shape) for key, tensor in wanted.items()}
    found = {key: list(tensor.shape) for key, tensor in tensors.items()}
    missing = [key for key in expected if key not in found and key not in set(optional)]
    unexpected = [key for key in found if key not in expected]
    misshaped = [
        f"{key} (expected {expected[key]}, found {shape})"
        for key, shape in found.items()
        if key in expected and expected[key] != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": misshaped}
    return "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys)


def load_strict(
    module: nn.Module, tensors: dict[str, Tensor], source: str, optional: Iterable[str] = (), assign: bool = False
) -> None:
    """Load tensors that must be exactly the module's.

    Args:
        source: where they came from, for the error.
        optional: keys that may be missing (the second name of a tied tensor).
        assign: make them the module's own (dtypes included) instead of copying the values.
    Raises:
        CheckpointError: names every missing, unexpected and wrongly shaped key.
    """
    misfits = misfitting(tensors, module.state_dict(), optional)
    if misfits:
        raise CheckpointError(f"{source} doesn't fit {type(module).__name__}: {misfits}")
    module.load_state_dict(tensors, strict=False, assign=assign)


def resize_rows(weight: Tensor, rows: int, image_token_id: int) -> Tensor:
    """Embedding [vocabulary, H] with `rows` rows: cut or extended; new rows and the image token's are means of the old.

    The mean is taken over all other kept rows, in float32 or better (published rule for the row of a new token).
    """
    kept = torch.arange(min(rows, len(weight)), device=weight.device)
    kept = kept[kept != image_token_id]
    exact = weight[kept].to(torch.promote_types(weight.dtype, torch.float32))
    resized = exact.mean(dim=0, keepdim=True).to(weight.dtype).repeat(rows, 1)  # [rows, H]
    resized[kept] = weight[kept]
    return resized


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`state_dict()`, with the shards of DeepSpeed ZeRO-3 gathered (then to be called on every rank)."""
    sharded = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        return module.state_dict()
    from deepspeed.runtime.zero import GatheredParameters  # here: only trained with where it is installed

    with GatheredParameters(sharded):
        return {key: tensor.detach().cpu().clone() for key, tensor in module.state_dict().items()}


def parameters_on_meta() -> AbstractContextManager:
    """Modules built inside have parameters without memory, to be assigned; buffers are real."""
    from accelerate import init_empty_weights  # here: imports much that plain use of the models doesn't need

    return init_empty_weights(include_buffers=False)
