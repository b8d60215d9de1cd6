"""Loading and saving of complete models in the published layout, for both of them.

A folder holds `config.json` (published keys) and the weights under the keys of the models' `state_dict()`; see
`med3dvlm.model.weights` for the files. Loading is strict, saving is bit-exact.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers import DistilBertConfig, GenerationConfig, PreTrainedConfig

from med3dvlm.configuration import PUBLISHED_TEXT_CONFIG, CLIPConfig
from med3dvlm.model.weights import (
    CheckpointError,
    checkpoint_errors,
    full_state_dict,
    load_strict,
    parameters_on_meta,
    read_config,
    read_weights,
    write_json,
    write_weights,
    written_atomically,
)

TEXT_ENCODER_PREFIX = "language_encoder."


def main_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of most floating-point numbers; single values (the loss's `t_prime`) don't decide."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """The tensors, floating-point ones in `dtype` (or its name); None and "auto" keep each as it is."""
    if dtype in (None, "auto"):
        return tensors
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    # A clone of the rest: a single view of a mapped file would keep all of it in memory.
    return {key: tensor.to(asked) if tensor.is_floating_point() else tensor.clone() for key, tensor in tensors.items()}


class DeviceError(ValueError):
    """A device that this machine does not have."""


def device_of(device_map: torch.device | str | int | None) -> torch.device:
    """One device for a whole model; "auto" is the first GPU where there is one.

    Raises:
        TypeError: a dict.
        DeviceError: unknown, or not there.
    """
    if isinstance(device_map, dict):
        raise TypeError('device_map: a model goes to one device as a whole, expected "auto" or a device, found a dict')
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device("cpu" if device_map is None else device_map)
        torch.empty(0, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:  # torch built without it, no driver, an unknown name
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise DeviceError(f"device {device_map} cannot be used here: {reason}") from error
    return device


class PublishedLayout:
    """Mixin for a `PreTrainedModel`: strict loading and bit-exact saving of a folder in the published layout."""

    published_architecture: str  # what config.json calls the class

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters (transformers takes the first, which may be the float64 `t_prime`)."""
        return main_dtype(self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | int | None = None,
        quantizer: Any = None,
        **kwargs: Any,
    ):
        """Load a folder, or the snapshot of a hub repository, in eval mode.

        Args:
            dtype: of all floating-point tensors; None or "auto" keeps the one of each stored tensor, whatever the
                config says. `torch_dtype` is its older name.
            device_map: a device, or "auto" (see `device_of`); the CPU where None.
            quantizer: stores layers in fewer bits as they are read. `convert(key, tensor)` gives the tensors to keep,
                in the dtype to keep them in (`dtype` means nothing then), `prepare(model)` puts layers that hold them
                into a model without memory.
            kwargs: revision, cache_dir, token, local_files_only for the hub; the rest changes keys of the config.
        Raises:
            CheckpointError: another architecture, a config that cannot be used, or weights that don't fit: every key
                is named.
            TypeError: unknown arguments, or a `device_map` that spreads the model over devices.
        """
        device = device_of(device_map)
        hub = {key: kwargs.pop(key) for key in ("revision", "cache_dir", "token", "local_files_only") if key in kwargs}
        # What transformers' Auto classes and its users add: code of a checkpoint is never run, memory always spared.
        for key in ("_from_auto", "adapter_kwargs", "trust_remote_code", "low_cpu_mem_usage"):
            kwargs.pop(key, None)
        folder = local_folder(pretrained_model_name_or_path, **hub)
        check_model_type(folder, cls.config_class.model_type)
        if config is None:
            with checkpoint_errors(folder):
                config, kwargs = cls.config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
        if kwargs:
            raise TypeError(f"{cls.__name__}.from_pretrained: unknown arguments {', '.join(sorted(kwargs))}")
        tensors = read_weights(folder, convert=None if quantizer is None else quantizer.convert)
        if isinstance(config, CLIPConfig) and config.text_config is None:
            config.text_config = text_config_of(tensors, folder)
        if quantizer is None:  # its tensors are as they shall be; a copy of them all would double the memory
            tensors = cast(tensors, torch_dtype if dtype is None else dtype)
        config.dtype = main_dtype(tensors.values())
        config.name_or_path = str(pretrained_model_name_or_path)
        with checkpoint_errors(folder), parameters_on_meta():
            model = cls(config)
            if quantizer is not None:
                quantizer.prepare(model)
        load_strict(model, tensors, str(folder), optional=_tied_keys(config, tensors, folder), assign=True)
        model.tie_weights()
        if model.can_generate() and (folder / "generation_config.json").is_file():
            with checkpoint_errors(folder / "generation_config.json"):
                model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval().to(device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        state_dict: dict[str, Tensor] | None = None,
        is_main_process: bool = True,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        push_to_hub: bool = False,
    ) -> None:
        """Write config and weights (safetensors) so that an interrupted write leaves no loadable folder.

        What else belongs into the folder is to be written before, after `begin_folder`.

        Args:
            state_dict: gathered weights to write instead of the model's own.
            safe_serialization, push_to_hub: for callers that name them; no other value is possible.
        Raises:
            ValueError: another form than safetensors, or a hub to push to.
        """
        if not safe_serialization:
            raise ValueError("save_pretrained writes safetensors only: leave safe_serialization out")
        if push_to_hub:
            raise ValueError("save_pretrained writes a folder only: upload it afterwards, with `hf upload`")
        state = full_state_dict(self) if state_dict is None else dict(state_dict)
        if not is_main_process:
            return
        folder = Path(save_directory)
        begin_folder(folder)
        if _is_tied(self.config):
            state.pop("lm_head.weight", None)
        self.config.architectures = [self.published_architecture]
        self.config.dtype = main_dtype(state.values())
        write_weights(state, folder, max_shard_size)
        if self.can_generate():
            write_json(self.generation_config.to_diff_dict(), folder / "generation_config.json")
        with written_atomically(folder / "config.json") as temporary:
            self.config.to_json_file(temporary)


def begin_folder(folder: Path, last: str = "config.json") -> None:
    """Make a folder to write a model into, without the file that is written `last`.

    No stage accepts the folder without that file: neither half of it, nor what is new beside what was there before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / last).unlink(missing_ok=True)


def local_folder(name_or_path: str | Path, **hub: Any) -> Path:
    """The folder itself, or where the hub's repository of that name lies after fetching it.

    Raises:
        CheckpointError: neither is to be had.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: name the folder of the checkpoint")
    patterns = ["*.json", "*.safetensors", "pytorch_model*.bin", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub))
    except HFValidationError as error:  # a path, or no name at all
        raise CheckpointError(f"{name_or_path}: no such folder; name a folder, or `owner/name` on the hub") from error
    except Exception as error:  # the errors of huggingface_hub and of its HTTP client have no other base in common
        raise CheckpointError(
            f"{name_or_path}: no such folder, and not to be had from the hub ({' '.join(str(error).split())}); check "
            "the name and the connection, run `hf auth login` where access is restricted, or name a local folder"
        ) from error


def check_model_type(folder: Path, expected: str) -> None:
    """Raise CheckpointError unless the folder's config.json is of the expected model type (or names none)."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json; expected a complete checkpoint of type {expected}")
    found = read_config(folder).get("model_type")
    if found not in (None, expected):
        raise CheckpointError(f"{folder}: expected a checkpoint of type {expected}, found {found}")


def _is_tied(config: PreTrainedConfig) -> bool:
    return config.model_type == "vlm_qwen" and config.tie_word_embeddings


def _tied_keys(config: PreTrainedConfig, tensors: dict[str, Tensor], folder: Path) -> tuple[str, ...]:
    """Keys that may be missing because the config ties them; raises CheckpointError when a stored one differs."""
    if not _is_tied(config):
        return ()
    head, embeddings = (tensors.get(key) for key in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is not None and embeddings is not None and not torch.equal(head, embeddings):
        raise CheckpointError(
            f"{folder}: expected lm_head.weight to equal model.embed_tokens.weight, which config.json ties, "
            "found other values"
        )
    return ("lm_head.weight",)


def text_config_of(tensors: dict[str, Tensor], source: str | Path) -> DistilBertConfig:
    """Sizes of the text encoder of a published contrastive checkpoint, from its weights; heads are 64 wide.

    Widths are those of most tensors, so that a single missing or wrongly shaped one is found by the strict loading.

    Raises:
        CheckpointError: the text encoder isn't a DistilBERT.
    """
    layer = f"{TEXT_ENCODER_PREFIX}transformer.layer."
    layers = [int(key.removeprefix(layer).split(".")[0]) for key in tensors if key.startswith(layer)]
    if not layers:
        raise CheckpointError(
            f"{source}: config.json has no text_config, so a DistilBERT was expected, found no {layer}*; "
            "write the text encoder's config as text_config"
        )

    def most_common_length(*endings: str) -> int:
        lengths = [len(t) for key, t in tensors.items() if key.startswith(layer) and key.endswith(endings) and t.ndim]
        return Counter(lengths).most_common(1)[0][0] if lengths else 0

    def rows(name: str, otherwise: int) -> int:
        table = tensors.get(f"{TEXT_ENCODER_PREFIX}embeddings.{name}.weight")
        return otherwise if table is None or table.ndim == 0 else len(table)

    width = most_common_length("layer_norm.weight", "layer_norm.bias", "lin2.bias", "q_lin.bias", "k_lin.bias")
    return DistilBertConfig(
        vocab_size=rows("word_embeddings", PUBLISHED_TEXT_CONFIG["vocab_size"]),
        dim=width,
        n_layers=max(layers) + 1,
        n_heads=max(1, width // 64),
        hidden_dim=most_common_length("lin1.bias", "lin1.weight"),
        max_position_embeddings=rows("position_embeddings", PUBLISHED_TEXT_CONFIG["max_position_embeddings"]),
    )
