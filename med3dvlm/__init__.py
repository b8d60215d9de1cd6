"""Med3DVLM: vision-language models for 3D medical volumes.

    from med3dvlm import load_model
    print(load_model("folder").answer("scan.nii.gz", "Which organ is abnormal?").text)

The names are imported when they are first used, so that `import med3dvlm` itself costs nothing. Importing
`med3dvlm.model`, which each of them does, makes both models known to transformers' Auto classes.
"""

from importlib import import_module

_HOME = {
    "CLIPConfig": "med3dvlm.configuration",
    "CLIPModel": "med3dvlm.model.clip",
    "VLMConfig": "med3dvlm.configuration",
    "VLMForCausalLM": "med3dvlm.model.vlm",
    "load_clip": "med3dvlm.inference",
    "load_model": "med3dvlm.inference",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
